"""CHECKLIST.md is what its command wrote, for the claims and commands of now."""

from __future__ import annotations

from pathlib import Path

from latentwire.checklist.items import ITEMS
from latentwire.checklist.run import current_blocks

TEXT = (Path(__file__).parents[2] / "CHECKLIST.md").read_text(encoding="utf-8")


def test_every_item_stands_there_as_it_is_run() -> None:
    """Whoever changes a claim or a command runs it again: ``latentwire checklist run --write --only NAME``."""
    missing = [item.name for item in ITEMS if item.name not in current_blocks(TEXT)]
    assert missing == []


def test_an_item_of_another_claim_or_command_counts_as_never_run() -> None:
    (item, *_) = ITEMS
    assert item.name in current_blocks(TEXT)
    for old, new in ((item.claim, "Something else"), ("quickstart RUNS", "elsewhere RUNS")):
        assert old in TEXT
        assert item.name not in current_blocks(TEXT.replace(old, new))
