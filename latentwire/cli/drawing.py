"""What is drawn on a terminal again and again, by ``latentwire watch`` and by the orchestrator: rich's texts."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from rich.text import Text

from latentwire.cli.fleet import ALIVE, COLOURS, STATE_COLUMN, Row, table
from latentwire.cli.text import GAP

_OVER = ("DONE", "CANCELLED", "STOPPED")


def fleet_text(rows: Sequence[Row], now: float, width: int, height: int) -> Text:
    """The table of the runs that there is room for: those that run first, those that are over last."""
    in_order = sorted(rows, key=lambda row: _place(row.status.state))
    room = max(1, height - 2)  # the header, and what is left out
    shown = in_order[:room] if len(in_order) > room else in_order
    (header, *lines), notes = table(shown, now, width)
    text = Text(GAP.join(header).rstrip(), style="bold", no_wrap=True, overflow="crop")
    for cells, row in zip(lines, shown, strict=True):
        text.append("\n").append_text(_coloured(cells, row.status.state))
    left_out = collections.Counter(row.status.state for row in in_order[room:])
    more = ", ".join(f"{number} {state}" for state, number in left_out.items())
    below = [f"and {more}"] if more else ["", *notes][: max(0, height - len(lines) - 1)]
    for line in below:
        text.append(f"\n{line}", style="not bold dim")
    return text


def _place(state: str) -> int:
    return 0 if state in ALIVE else 2 if state == "PENDING" else 3 if state in _OVER else 1


def state_text(state: str) -> Text:
    """A state in its colour."""
    return Text(state, style=COLOURS.get(state.strip(), "none"))


def _coloured(cells: Sequence[str], state: str) -> Text:
    before, after = GAP.join(cells[:STATE_COLUMN]), GAP.join(cells[STATE_COLUMN + 1 :])
    words = Text(style="not bold").append(f"{before}{GAP}").append_text(state_text(cells[STATE_COLUMN]))
    return words.append(f"{GAP}{after}".rstrip())
