"""Numbers out of records that others wrote: a figure may be missing, null, a word, or nonsense."""

from __future__ import annotations

from typing import Any

MAX_NUMBER = 1e300
"""A larger number is garbage; so are NaN and the infinities, which JSON does not have and Python reads all the same."""


_NUMBERS = frozenset((int, float))
"""Exactly these: a bool is an int too, and a fleet asks for hundreds of thousands."""


def number(value: Any) -> float | None:
    """The number as it is; None for anything else, such as the word that stands for NaN in a journal, or a bool.

    For whoever reads files. Safe for all that JSON can hold, also for an integer that no float can.
    """
    return value if type(value) in _NUMBERS and -MAX_NUMBER < value < MAX_NUMBER else None


def whole(value: object, otherwise: int) -> int:
    """A whole number, such as a step; ``otherwise`` for anything else."""
    return value if isinstance(value, int) and number(value) is not None else otherwise
