"""An alarm for saves that go on and on with the same weights. Pure."""

from __future__ import annotations

from typing import Any

from latentwire.checkpoint.layout import Manifest


class Unchanged:
    """Counts saves of different steps whose watched group has one digest.

    A saver that stages the wrong tensors, an optimizer that was given other parameters than those tracked, a learning
    rate of zero: all look healthy from outside, and all are seen here.

    Args:
        group: what training is to change.
        most: so many saves in a row without a change are the alarm.
    """

    def __init__(self, group: str, most: int) -> None:
        self._group, self._most = group, most
        self._step = -1
        self._sha256: str | None = None
        self._count = 0

    def seen(self, manifest: Manifest) -> dict[str, Any] | None:
        """Take in a save; what to tell if the alarm is due, which it is once."""
        sha256 = manifest.group_sha256(self._group)
        if sha256 is None or manifest.step <= self._step:
            return None
        self._count = self._count + 1 if sha256 == self._sha256 else 0
        self._step, self._sha256 = manifest.step, sha256
        if self._count != self._most:
            return None
        return {"group": self._group, "sha256": sha256, "saves": self._count + 1}
