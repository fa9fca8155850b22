"""``latentwire checklist run``: run the items, and tick CHECKLIST.md by what came out."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from latentwire import __version__
from latentwire.checklist.items import ITEMS, Item
from latentwire.elastic.inventory import cpu_model
from latentwire.errors import ConfigError
from latentwire.monitor.gpu import list_gpus
from latentwire.run.atomic import write_text

PATH = Path("CHECKLIST.md")
_HEAD = """# Checklist

Every box is ticked by a command that ran: `latentwire checklist run --write` writes this file. An open box says why.
"""


def main(only: Sequence[str], write: bool) -> int:
    """Run items one after the other and print what came out; 0 if all that could run passed. Blocks for minutes.

    Args:
        only: names of items; empty: all.
        write: put the results into CHECKLIST.md, leaving the items that were not run as they are.

    Raises:
        ConfigError: there is no item of that name, or this is not the top of the repository.
    """
    unknown = sorted(set(only) - {item.name for item in ITEMS})
    if unknown:
        raise ConfigError(f"there is no item {unknown[0]!r}; there are: {', '.join(item.name for item in ITEMS)}")
    if not Path("pyproject.toml").is_file():
        raise ConfigError("the checklist runs from the top of the repository: there is no pyproject.toml here")
    blocks = current_blocks(PATH.read_text(encoding="utf-8") if PATH.exists() else "")
    failed = 0
    for item in ITEMS:
        if only and item.name not in only:
            continue
        lacking = _lacking(item)
        if lacking and item.name in blocks:
            print(f"[-] {item.name}: {lacking}, left as it is", flush=True)
            continue
        passed, figure = (False, f"open: {lacking}") if lacking else _run(item)
        failed += not passed and not lacking
        print(f"[{'x' if passed else ' '}] {item.name}: {figure}", flush=True)
        blocks[item.name] = _block(item, passed, figure)
        if write:  # at once: the next may take an hour
            ordered = [blocks.get(item.name) or f"{_head(item, False)}  - never ran in this form\n" for item in ITEMS]
            write_text(PATH, _HEAD + "\n" + "".join(ordered))
    return 1 if failed else 0


def current_blocks(text: str) -> dict[str, str]:
    """The items of a CHECKLIST.md by name: those whose claim and command are what they were when they ran."""
    blocks = re.split(r"(?m)^(?=- \[)", text)[1:]
    return {
        item.name: block
        for item in ITEMS
        for block in blocks
        if block.startswith((_head(item, True), _head(item, False))) and block.endswith(_command(item))
    }


def _lacking(item: Item) -> str:
    """Why it cannot be shown here; nothing where it can."""
    num_gpus = len(list_gpus())
    if num_gpus >= item.num_gpus:
        return ""
    needed = "a GPU" if item.num_gpus == 1 else f"{item.num_gpus} GPUs"
    return f"needs {needed}, and this machine has {num_gpus or 'none'}"


def _run(item: Item) -> tuple[bool, str]:
    started = time.monotonic()
    programs = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    try:
        done = subprocess.run(
            item.command, env=os.environ | programs, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:
        return False, f"{item.command[0]} is not installed: pip install -e '.[dev]'"
    passed, figure = item.judge(done.returncode, done.stdout)
    if not passed:
        sys.stderr.write(done.stdout[-3000:] + done.stderr[-3000:])
    return passed, f"{figure}; took {time.monotonic() - started:.0f} s"


def _block(item: Item, passed: bool, figure: str) -> str:
    when = f"  - when, where: {datetime.date.today().isoformat()}, {_machine()}\n"
    return f"{_head(item, passed)}  - figure: {figure}\n{when}{_command(item)}"


def _head(item: Item, passed: bool) -> str:
    return f"- [{'x' if passed else ' '}] `{item.name}` {item.claim}\n"


def _command(item: Item) -> str:
    command = shlex.join(item.command).replace(shlex.quote(sys.executable), "python")
    return f"  - command: `{command}`\n"


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = cpu_model(cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
    gpus = ", ".join(gpu.name for gpu in list_gpus()) or "no GPU"
    return (
        f"{os.cpu_count()} cores of {model}, {gpus}, {platform.system()} {platform.machine()}, "
        f"Python {platform.python_version()}, torch {metadata.version('torch')}, latentwire {__version__}"
    )
