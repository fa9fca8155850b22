"""docs/slurm.md and the README's Slurm section: every command there is one that the programs understand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from click import Command, Group
from cluster import Cluster
from running import wait_for
from site_folder import TOP, Site

from latentwire import orchestrate
from latentwire.cli.app import app
from latentwire.fleet import load_fleet

pytestmark = pytest.mark.slurm

PAGE = (TOP / "docs" / "slurm.md").read_text(encoding="utf-8")
README = (TOP / "README.md").read_text(encoding="utf-8")
FOR_PEOPLE = ("$EDITOR slurm/site.env", ". slurm/site.env", "tail -f runs/latentwire-orchestrator-*.out")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """What a reader may type, without the comments."""
    (section,) = re.findall(r"<!-- slurm -->\n(.*?^```$)", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks(PAGE + section, "sh") for line in block.splitlines()]
    return sorted({re.sub(r"\s+#.*", "", line) for line in lines})


def read(command: Command, words: list[str]) -> None:
    """Parse the words as the program does; nothing is done."""
    with command.make_context("a program", words) as context:
        if isinstance(command, Group):
            _, inner, rest = command.resolve_command(context, [*context.protected_args, *context.args])
            assert inner is not None
            read(inner, rest)


def read_as_its_program_does(script: str, words: list[str]) -> None:
    """Parse what a script hands on."""
    if "orchestrator" in script:
        program = typer.Typer()
        program.command()(orchestrate.main)
        read(typer.main.get_command(program), ["--config", *words] if words else ["--resume"])
    elif "experiment" in script:
        read(typer.main.get_command(app), ["run", *words])


def check(site: Site, line: str, job: str) -> None:
    """Run what changes nothing, test what sbatch would take, parse the rest."""
    first, *words = shlex.split(line)
    if line in FOR_PEOPLE:
        return
    if first == "latentwire" and words[0] != "status":
        read(typer.main.get_command(app), words)
        return
    if first == "sbatch":
        place = next(index for index, word in enumerate(words) if word.endswith(".slurm"))
        read_as_its_program_does(words[place], words[place + 1 :])
    line = line.replace("8841", job).replace("sbatch ", "sbatch --test-only ")
    line = re.sub("^make ", f"make -n -C {TOP} ", line)
    assert first in ("sbatch", "scontrol", "scancel", "make", "latentwire"), f"{line}: nothing checks it"
    done = site.shell(line)
    assert done.returncode == 0, f"$ {line}\n{done.stdout}{done.stderr}"


def test_the_commands_are_understood(cluster: Cluster, tmp_path: Path) -> None:
    site = Site(cluster, tmp_path)
    job = site.sbatch("--output=/dev/null --wrap 'srun sleep 300'")
    try:
        wait_for(lambda: site.show(job)["JobState"] == "RUNNING", "the job to be signalled")
        assert len(commands()) > 15
        for line in commands():
            check(site, line, job)
    finally:
        cluster.run("scancel", job)


def test_the_configs_load(cluster: Cluster, tmp_path: Path) -> None:
    site = Site(cluster, tmp_path)
    names = []
    for block in blocks(PAGE, "yaml"):
        path = site.folder / block.splitlines()[0].removeprefix("# ")
        path.write_text(block, encoding="utf-8")
        names += [config.name for config in load_fleet(path).configs]
    assert names == ["mine", "seed-1", "seed-2"]
