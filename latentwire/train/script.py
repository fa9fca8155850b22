"""A program of one's own as an attempt: it is agent and rank 0 in one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentwire.config import Config, parse_config
from latentwire.errors import ConfigError, RunBusy
from latentwire.preemption.handler import Preempted, PreemptionHandler
from latentwire.run.directory import PREFIX, create_run
from latentwire.run.journal import Journal
from latentwire.target import SCRIPT


class Script:
    """Claims an attempt and installs the handlers, as an agent does; says in the end how it went.

    Args:
        path: the run's directory.
        seed: the run's.
        settings: sections of the config.

    Raises:
        ConfigError: the settings are wrong.
        RunConflict: the directory belongs to another seed.
        RunBusy: the same script is already running on this host.
    """

    def __init__(self, path: Path, seed: int, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self.config = _config_of(path, seed, settings)
        self.run = create_run(self.config, path.parent)
        running = self.run.running_attempt()
        if running is not None and running.ended() is None:  # this process may have ended one before, in a notebook
            raise RunBusy(f"{path} is in use by attempt {running.number}, {running.agent()}: wait for it, or end it")
        self.attempt = self.run.claim_attempt(os.environ.get("SLURM_JOB_ID", str(os.getpid())), "script")
        self._journal = Journal(self.attempt.path / "events.agent.jsonl")
        self._journal.event("attempt_started", total_steps=None)
        self.handler = PreemptionHandler(self.config.preemption.save_signal)
        self.handler.install()

    def end(self, error: BaseException | None, step: int) -> None:
        """The last word, and the signals as they were before.

        Args:
            error: what ended the program, None where nothing did.
            step: completed steps.
        """
        if error is None:
            self._journal.event("attempt_ended", outcome="finished", step=step)
        elif isinstance(error, Preempted):
            why = {"error": error.error} if error.error is not None else {}
            self._journal.event("attempt_ended", outcome="preempted", step=error.step, **why)
        else:
            said = f"{type(error).__name__}: {error}"
            self._journal.event("attempt_ended", outcome="failed", cause="other", step=step, error=said)
        self.handler.uninstall()


def _config_of(path: Path, seed: int, settings: Mapping[str, Mapping[str, Any]]) -> Config:
    name = path.name.removeprefix(PREFIX)
    if not path.name.startswith(PREFIX):
        raise ConfigError(f"{path.name}: a run's directory is named {PREFIX}<name>; try {PREFIX}{name}")
    return parse_config({"name": name, "seed": seed, "workload": {"target": SCRIPT}, **settings}, where=str(path))
