"""The agent's watch over an attempt: reads what its processes write, and tells when a person is needed."""

from __future__ import annotations

import contextlib
import time

from latentwire.config import Config
from latentwire.monitor.alerts import Alerts
from latentwire.monitor.sinks import Sinks
from latentwire.monitor.stats import StatsFollower
from latentwire.run.directory import Attempt
from latentwire.run.journal import Follower, Journal

LOOK_EVERY_S = 2.0
CLOSE_WITHIN_S = 5.0
"""So long the end of an attempt waits for a sink; after a notice not at all."""


class AlertWatch:
    """Turns what an attempt's files say into events ``alert`` and ``alert_over``, and into messages.

    Args:
        attempt: the one that is watched.
        config: the run's.
        journal: the agent's.
        num_nodes: of the job; each has a monitor.
    """

    def __init__(self, attempt: Attempt, config: Config, journal: Journal, num_nodes: int) -> None:
        self._attempt, self._journal = attempt, journal
        self._alerts = Alerts(config.alerts, config.checkpoint.interval_s)
        self._sinks = Sinks(config.alerts, attempt.run, self._tell_failure)
        stats = ["gpu_stats.jsonl", *(f"gpu_stats.node{node}.jsonl" for node in range(1, num_nodes))]
        journals = ["events.agent.jsonl", "events.rank0.jsonl", "metrics.jsonl"]
        self._followers: list[Follower | StatsFollower] = [
            *(Follower(attempt.path / name) for name in journals),
            *(StatsFollower(attempt.path / name) for name in stats),
        ]
        self._next_look = 0.0

    def look(self) -> None:
        """Judge every few seconds what was added since; called all the time. Blocks for as long as reading takes."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY_S
        try:
            self._look()
        except Exception as error:  # whatever it is, the ranks must train on: told once, and looked no more
            self._next_look = float("inf")
            self._journal.event("alerts_failed", error=f"{type(error).__name__}: {error}")

    def _look(self) -> None:
        for follower in self._followers:
            with contextlib.suppress(OSError):  # an attempt must not end for what we wanted to know of it
                for record in follower.read():
                    self._alerts.take(record)
        for change in self._alerts.look():
            self._journal.event("alert" if change.is_raised else "alert_over", **change.fields())
            self._sinks.send(change, self._attempt.number)

    def close(self, at_once: bool) -> None:
        """The attempt ends. Waits a little for messages under way, unless the machine is to be given back."""
        self._sinks.close(0.0 if at_once else CLOSE_WITHIN_S)

    def _tell_failure(self, sink: str, reason: str) -> None:
        self._journal.event("alert_not_sent", sink=sink, error=reason)
