"""Put on PYTHONPATH: unpickling is an error in every process below."""

from __future__ import annotations

import _pickle
import pickle
import sys
from typing import Any, NoReturn

sys.stderr.write("nothing is unpickled here\n")


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("something was about to be unpickled")


class _NoUnpickler(pickle.Unpickler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _refuse()


for module in (pickle, _pickle):
    module.load = module.loads = _refuse  # type: ignore[attr-defined]
    module.Unpickler = _NoUnpickler  # type: ignore[misc, attr-defined]
