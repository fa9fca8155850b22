"""Where alerts go: a webhook, a command. Nothing waits for either, but the end of an attempt for a few seconds.

A message is one JSON object: ``state`` (``raised`` or ``over``), ``alert``, ``text``, ``value``, ``threshold``,
``time``, ``run``, ``attempt``, ``host``, ``directory``. It is posted as it is, or given to the command on its standard
input. A sink that fails is told of once and goes on being tried with every further message.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from latentwire.monitor.alerts import Alert
from latentwire.run.atomic import json_safe
from latentwire.run.process import node_name

if TYPE_CHECKING:
    from latentwire.config import AlertsSection
    from latentwire.run.directory import Run

ANSWER_WITHIN_S = 5.0
"""A webhook has so long for each try."""
NUM_TRIES = 3
PAUSE_S = 1.0
"""Before the second try; doubles."""
COMMAND_WITHIN_S = 10.0
"""Then the command is killed."""
_MOST_WAITING = 100
_TAIL_BYTES = 4096


class NotSent(Exception):
    """A message did not get through; says why, and nothing of a URL."""


class Sinks:
    """Delivers alerts in the order in which they come; each sink by itself, so that none waits for another.

    Args:
        settings: the config's ``alerts``.
        run: whose alerts they are.
        failed: called once for each sink that fails, with its name and the reason; from a thread, in ``send`` or in
            ``close``.
        environ: where ``webhook: $NAME`` is looked up, when there is something to send.
    """

    def __init__(
        self,
        settings: AlertsSection,
        run: Run,
        failed: Callable[[str, str], None],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._run = run
        self._sinks: list[_Sink] = []
        if settings.webhook is not None:
            self._sinks.append(_Webhook(settings.webhook, environ, failed))
        if settings.command is not None:
            self._sinks.append(_Command(settings.command, failed))

    def send(self, alert: Alert, attempt: int) -> None:
        """Deliver an alert to all sinks. Does not block; where a hundred wait already, this one is not sent.

        Args:
            alert: what has changed.
            attempt: number of the newest.
        """
        if not self._sinks:
            return
        message = {"state": "raised" if alert.is_raised else "over", **alert.fields(), "time": time.time()}
        message |= {"run": self._run.name, "attempt": attempt, "host": node_name(), "directory": str(self._run.path)}
        data = f"{json.dumps(json_safe(message), allow_nan=False)}\n".encode()
        for sink in self._sinks:
            sink.put(data)

    def close(self, within_s: float) -> None:
        """Wait for what is under way, at most so long; what is still to be sent then is told of, and never sent.

        A command that still runs is killed with all that it has started.
        """
        until = time.monotonic() + within_s
        for sink in self._sinks:
            sink.close(until)


class _Sink(abc.ABC):
    """One of them, with a daemon thread that begins with the first message."""

    def __init__(self, name: str, failed: Callable[[str, str], None]) -> None:
        self._name, self._failed = name, failed
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_told = self._is_closed = False

    def put(self, data: bytes) -> None:
        try:
            self._waiting.put_nowait(data)
        except queue.Full:
            self._tell(f"{_MOST_WAITING} messages wait already")
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver_all, name="alerts", daemon=True)
            self._thread.start()

    def close(self, until: float) -> None:
        while self._waiting.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)
        if self._waiting.unfinished_tasks:
            self._tell("it had not answered when this process had to end")
        with self._lock:
            self._is_closed = True  # from here on the thread says nothing more
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._give_up()

    @abc.abstractmethod
    def _deliver(self, data: bytes) -> None:
        """Send one message; blocks, in the sink's thread. Raises NotSent."""

    def _give_up(self) -> None:  # noqa: B027
        """End what is under way, if that can be, and let nothing more begin."""

    def _deliver_all(self) -> None:
        while (data := self._waiting.get()) is not None and not self._is_closed:
            try:
                self._deliver(data)
            except NotSent as error:
                self._tell(str(error))
            self._waiting.task_done()

    def _tell(self, reason: str) -> None:
        with self._lock:
            if not self._is_told and not self._is_closed:
                self._is_told = True
                self._failed(self._name, reason)


class _Webhook(_Sink):
    def __init__(self, webhook: str, environ: Mapping[str, str], failed: Callable[[str, str], None]) -> None:
        super().__init__("webhook", failed)
        self._webhook, self._environ = webhook, environ

    def _deliver(self, data: bytes) -> None:
        _post(_url(self._webhook, self._environ), data)


class _Command(_Sink):
    """Leads a session of its own: a signal to the job is not meant for it, and what it starts is killed with it."""

    def __init__(self, command: Sequence[str], failed: Callable[[str, str], None]) -> None:
        super().__init__("command", failed)
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._may_start = threading.Lock()

    def _deliver(self, data: bytes) -> None:
        try:
            # A file: the end of a pipe would only come when all have ended that the command left in the background.
            with tempfile.TemporaryFile() as stderr, self._start(stderr) as process:
                try:
                    process.communicate(data, COMMAND_WITHIN_S)
                except subprocess.TimeoutExpired:
                    _kill_group(process)
                    raise NotSent(f"it took more than {COMMAND_WITHIN_S:g} s and was killed") from None
                if process.returncode:
                    raise NotSent(": ".join([f"it ended with {process.returncode}", *_last_line(stderr)])[:300])
        except OSError as error:
            raise NotSent(f"{self._command[0]}: {error.strerror}") from None

    def _start(self, stderr: IO[bytes]) -> subprocess.Popen[bytes]:
        with self._may_start:
            if self._is_closed:
                raise NotSent("this process had to end")
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            return self._process

    def _give_up(self) -> None:
        with self._may_start:
            if self._process is not None:
                _kill_group(self._process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a command that still runs, and all that it started. What it leaves behind when it ends is its own affair."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _last_line(stderr: IO[bytes]) -> list[str]:
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - _TAIL_BYTES))
    return stderr.read().decode(errors="replace").strip().splitlines()[-1:]


def _url(webhook: str, environ: Mapping[str, str]) -> str:
    if not webhook.startswith("$"):
        return webhook
    url = environ.get(webhook[1:], "")
    if not re.fullmatch(r"https?://\S+", url):
        raise NotSent(f"the environment variable {webhook[1:]} holds no http(s) URL in this process")
    return url


def _post(url: str, data: bytes) -> None:
    """One POST, tried again where that may help. Never says the URL: whoever has it may post too."""
    for number in range(NUM_TRIES):
        reason, may_pass = _try_to_post(url, data)
        if reason is None:
            return
        if not may_pass:
            break
        if number < NUM_TRIES - 1:
            time.sleep(PAUSE_S * 2**number)
    raise NotSent(reason)


def _try_to_post(url: str, data: bytes) -> tuple[str | None, bool]:
    """Why it failed, None where it did not, and whether it may go well another time."""
    import http.client  # with ssl they take longer to load than the agent takes to start
    import urllib.error
    import urllib.request

    class NoRedirects(urllib.request.HTTPRedirectHandler):
        """Following one would turn the POST into a GET."""

        def redirect_request(self, *_: Any, **__: Any) -> None:
            return None

    headers = {"Content-Type": "application/json", "User-Agent": "latentwire"}
    try:
        request = urllib.request.Request(url, data, headers, method="POST")
        with urllib.request.build_opener(NoRedirects).open(request, timeout=ANSWER_WITHIN_S):
            return None, False
    except urllib.error.HTTPError as error:
        error.close()
        return f"it answered with HTTP {error.code}", error.code >= 500 or error.code == 429
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            return f"no answer within {ANSWER_WITHIN_S:g} s", True
        words = cause.strerror if isinstance(cause, OSError) and cause.strerror else type(cause).__name__
        return f"no connection: {words}", not isinstance(cause, ValueError)
