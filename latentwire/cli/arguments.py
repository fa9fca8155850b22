"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentwire.errors import RunError

if TYPE_CHECKING:
    from latentwire.run.directory import Attempt, Run

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or directory.", show_default=False)]
StepArgument = Annotated[int | None, typer.Argument(metavar="STEP", help="Step of the checkpoint.", min=0)]
RunsDirOption = Annotated[Path, typer.Option("--runs-dir", help="The folder of the runs.")]
AttemptOption = Annotated[int | None, typer.Option("--attempt", metavar="N", help="Number of the attempt.", min=1)]
FollowOption = Annotated[
    bool, typer.Option("--follow", "-f", help="Go on as more is written, until the run is finished or cancelled.")
]


def refuse_no_file(path: Path) -> None:
    """Of an option that names a file to write.

    Raises:
        RunError: it is a folder, or in none.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise RunError(f"{path} cannot be written: name a file in a folder that exists")


def find_attempt(run: Run, number: int | None) -> Attempt:
    """The attempt of that number, or the newest.

    Raises:
        RunError: there is no such attempt; names those that there are.
    """
    attempts = run.attempts()
    if not attempts:
        raise RunError(f"{run.name} has not been started yet: there is no attempt in {run.path}")
    if number is None:
        return attempts[-1]
    chosen = next((attempt for attempt in attempts if attempt.number == number), None)
    if chosen is None:
        numbers = ", ".join(str(attempt.number) for attempt in attempts)
        raise RunError(f"{run.name} has no attempt {number}; it has: {numbers}")
    return chosen
