"""JSON that anybody may have written: parsed in bounded time and memory, whatever it holds. Pure."""

from __future__ import annotations

import json
from typing import Any

from latentwire.errors import CheckpointCorrupt, CheckpointError
from latentwire.run.atomic import json_safe

# Far above what is written.
MAX_JSON_BYTES = 64 << 20
MAX_JSON_VALUES = 2_000_000
MAX_DIGITS = 4300


def parse_json(text: str | bytes, where: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a text that anybody may have written. Time and memory are bounded, whatever it holds.

    Raises:
        CheckpointCorrupt: it is not JSON, is larger or deeper than what we write, or names something twice.
    """
    if len(text) > max_bytes:
        raise CheckpointCorrupt(f"{where} has {len(text)} bytes, more than any that latentwire writes")
    try:
        text = text if isinstance(text, str) else text.decode()
        if not _is_small(text, max_bytes):
            raise ValueError(f"more than {MAX_JSON_VALUES} values")
        return json.loads(text, object_pairs_hook=_each_once, parse_int=_digits)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorrupt(f"{where} is not JSON: {short(error)}") from None


def encode_json(value: Any, where: str) -> bytes:
    """The text of a file of JSON that ``parse_json`` will take.

    Raises:
        CheckpointError: it would not.
    """
    text = json.dumps(json_safe(value), indent=1, sort_keys=True, allow_nan=False) + "\n"
    if not _is_small(text, MAX_JSON_BYTES):
        raise CheckpointError(
            f"{where} would take {len(text)} bytes: put large values into tensors, or out of the state"
        )
    return text.encode()


def _is_small(text: str, max_bytes: int) -> bool:
    """Every value but the first comes after one of these: so their number is known before any is made."""
    return len(text) <= max_bytes and sum(map(text.count, ",[{")) <= MAX_JSON_VALUES


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a name is there twice")
    return tree


def _digits(text: str) -> int:
    """Python's own limit, also where somebody has switched it off: the time grows with the square."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def whole(value: Any) -> int:
    """A number that can count bytes or steps."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.100} is not a count")
    return value


def short(error: Exception) -> str:
    """What is said of an error: it may repeat what it met, however long."""
    return f"{type(error).__name__}: {error!s:.200}"
