"""What is shown, as JSON that every browser reads."""

from __future__ import annotations

import json
from typing import Any

from latentwire.run.atomic import json_safe


def as_json(value: Any) -> str:
    """One line of JSON; NaN and the infinities, which JSON does not have, become words."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"), default=str)
    except ValueError:  # rare, and to look for them costs more than the rest
        return json.dumps(json_safe(value), allow_nan=False, separators=(",", ":"), default=str)


def as_script(value: Any) -> str:
    """The same for a script element, which nothing in it can end."""
    return as_json(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
