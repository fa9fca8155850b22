"""Text for people: durations and sizes in words, aligned columns, and nothing in it that a terminal would obey."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

NOTHING = "-"
GAP = "  "
_RECENT_S = 2.0
_ANSI = {"green": "\x1b[32m", "yellow": "\x1b[33m", "cyan": "\x1b[36m", "red": "\x1b[31m"}
_AS_BEFORE = "\x1b[0m"
_BLOCKS = "▁▂▃▄▅▆▇█"

# C0 but for tab and newline, DEL and C1; marks that turn the direction of writing; halves of characters
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text with control characters written out (``\x1b``); lines and tabs stay."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """As ``visible``, with lines and tabs written out too."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def duration(seconds: float | None) -> str:
    """``45 s``, ``3 min``, ``2 h 5 min``, ``3 d 4 h``."""
    if seconds is None or not 0 <= seconds < float("inf"):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def ago(then: float | None, now: float) -> str:
    """``3 min ago``; the clocks of two hosts may differ, so that the near future counts as now."""
    if then is None:
        return NOTHING
    return "just now" if now - then < _RECENT_S else f"{duration(now - then)} ago"


def nothing_in(runs_dir: Path) -> str:
    """Why no runs are shown."""
    where = runs_dir.absolute()
    return f"no runs in {where}" if where.is_dir() else f"there is no folder {where}"


def size(num_bytes: int) -> str:
    """``17.1 kB``; powers of 1000."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    power = next((p for p in (1, 2, 3) if num_bytes < 999.95 * 1000**p), 4)
    return f"{num_bytes / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def figure(value: Any) -> str:
    """A number with four significant digits or more, anything else as it is, nothing as a dash."""
    if value is None:
        return NOTHING
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"
    return str(value)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line for each row, its cells aligned; on a terminal cut to its width."""
    lines = [GAP.join(row).rstrip() for row in aligned(rows)]
    limit = terminal_width()
    return lines if limit is None else [cut(line, limit) for line in lines]


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[list[str]]:
    """The cells on one line each and as wide as their columns; those of the columns ``right`` end alike."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.rjust if index in right else str.ljust for index in range(len(widths))]
    return [[side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)] for row in cells]


def cut(line: str, limit: int) -> str:
    """The line, or as much of it as there is room for."""
    return line if len(line) <= limit else line[: max(0, limit - 1)] + "…"


def terminal_width() -> int | None:
    """How many columns the terminal has; None where what is printed goes to a file or another program."""
    return max(20, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None


def sparkline(values: Sequence[float | None], low: float, high: float) -> str:
    """One block for each value, the higher the larger; a gap where there is none."""
    return "".join(" " if value is None else _BLOCKS[_eighth(value, low, high)] for value in values)


def _eighth(value: float, low: float, high: float) -> int:
    share = (value - low) / (high - low) if high > low else 0.0
    return min(7, max(0, int(share * 8)))


def bar(share: float, width: int) -> str:
    """How much is done."""
    done = round(min(1.0, max(0.0, share)) * width)
    return "━" * done + "╌" * (width - done)


def coloured() -> bool:
    """Whether colours are welcome: a terminal, and NO_COLOR (https://no-color.org) not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def painted(text: str, colour: str) -> str:
    """The text in that colour, where colours are welcome; ``""`` is none."""
    return f"{_ANSI[colour]}{text}{_AS_BEFORE}" if colour and coloured() else text
