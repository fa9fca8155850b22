"""Judges of CHECKLIST.md: each reads a command's exit code and output, and says whether the claim holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

Judgement = tuple[bool, str]
"""Passed, and the figure in words (or the reason, where it did not pass)."""


def tests_pass(code: int, output: str) -> Judgement:
    """The tests passed: something ran and nothing was skipped."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.+)$", output, re.MULTILINE)
    summary = ", ".join(f"{number} {word}" for word, number in counts.items())
    passed = code == 0 and counts.get("passed", 0) > 0 and not counts.get("skipped")
    return passed, "; ".join([summary or "no test ran", *reasons])


def slurm_drill_passes(code: int, output: str) -> Judgement:
    """The test of the drill passed; the figures are those of the drill that it ran."""
    passed, summary = tests_pass(code, output)
    return drill_passes(code, output) if passed else (False, summary)


def memory_is_foretold(code: int, output: str) -> Judgement:
    """The tests passed; the figure is the largest error of what was expected."""
    passed, summary = tests_pass(code, output)
    errors = [float(error) for error in re.findall(r"\| ([+-][\d.]+)% \|$", output, re.MULTILINE)]
    if not passed or not errors:
        return False, summary
    return True, f"at most {max(errors, key=abs):+.1f} % off in {len(errors)} cases"


def pair_step_is_faster(code: int, output: str) -> Judgement:
    """Ours, compiled, against the plain loop of the same run."""
    rows = re.findall(r"^\| ([^*|]+?) \| ([\d.]+) \| \d+ \| \d+ \| ([\d.]+) \|", output, re.MULTILINE)
    found = {name: (float(speed), float(peak)) for name, speed, peak in rows}
    plain, ours = found.get("plain transformers"), found.get("ours: and compiled layers")
    if code or plain is None or ours is None:
        return False, "it did not run to its end on a GPU"
    ratio = ours[0] / plain[0]
    figure = (
        f"{ours[0]:.1f} against {plain[0]:.1f} samples/s, {ratio:.2f} x; peak {ours[1]:.0f} against {plain[1]:.0f} GiB"
    )
    return ratio >= 1.3 and ours[1] < plain[1], figure


def monitor_is_cheap(code: int, output: str) -> Judgement:
    """Processor time a GPU, and what the steps of both loops take longer, at one sample a second."""
    cores = dict(re.findall(r"^\| (host only|a GPU) \| [\d.-]+ \| ([\d.-]+) \|", output, re.MULTILINE))
    steps = dict(re.findall(r"^\| (\w+) kernels \|.* \| ([+-][\d.]+) % \|$", output, re.MULTILINE))
    if code or "a GPU" not in cores or set(steps) != {"large", "small"}:
        return False, "it did not run to its end on a GPU"
    figure = (
        f"{cores['a GPU']} % of a core a GPU, {cores['host only']} % the host; "
        f"steps of large kernels {steps['large']} %, of small ones {steps['small']} %"
    )
    return float(cores["a GPU"]) < 0.1 and max(map(float, steps.values())) < 0.5, figure


def reduction_is_cheap(code: int, output: str) -> Judgement:
    """The exact exchange against torch's DDP of the same run."""
    found = dict(re.findall(r"^\| ([^|]+?) \| [\d.]+ \| ([+-][\d.]+)% \|", output, re.MULTILINE))
    if code or "ours, exact" not in found:
        return False, "it did not run to its end"
    return float(found["ours, exact"]) < 3, f"{found['ours, exact']} % of a step against DDP"


def pipelining_pays(code: int, output: str) -> Judgement:
    """A model over two GPUs, one and two micro-batches at once; the bits of no layout may differ."""
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| ([^|]+?) \|$", output, re.MULTILINE)
    found = {name: (float(one), float(two), digests) for name, one, two, digests in rows}
    if code or "Llama over two" not in found:
        return False, "it did not run to its end on two GPUs"
    one, two, digests = found["Llama over two"]
    same = digests == found["Llama on one"][2] and found["both on one"][2] == found["Llama, Qwen on one each"][2]
    figure = f"Llama over two GPUs: {two:.0f} ms a micro-batch instead of {one:.0f}; "
    return same and two < 0.9 * one, figure + ("the same bits" if same else "other bits")


def simulator_is_close(code: int, output: str) -> Judgement:
    """Goodput foretold against measured, of the same drill."""
    found = re.search(r"^goodput measured .* its own costs .*: ([+-][\d.]+) % off$", output, re.MULTILINE)
    if code or found is None:
        return False, "it did not run to its end"
    return abs(float(found[1])) <= 5, found[0]


def long_curve_is_cheap(code: int, output: str) -> Judgement:
    """A million steps: columns against json.loads of the same run, and the memory."""
    memory = re.search(r"(\d+) MB of memory taken", output)
    columns = re.search(r"^\| columns \| ([\d.]+) \| ([\d.]+) \|", output, re.MULTILINE)
    if code or memory is None or columns is None:
        return False, "it did not run to its end"
    figure = f"{columns[1]} s of processor time, {columns[2]} x as fast as json.loads, {memory[1]} MB"
    return float(columns[2]) >= 3 and int(memory[1]) < 200, figure


def dashboard_is_fast(code: int, output: str) -> Judgement:
    """Under 2 s, first load: 200 runs' states, a run's status and tables; again: these and all its million points.

    What a run's first load shows after its tables is named with its time and not judged: charts wait until the browser
    has compiled plotly's script.
    """
    rows = re.findall(
        r"^\| (fleet|run) of [\d,]+ \w+, (first load|again): (?:.*) \| ([\d.]+) s \|$", output, re.MULTILINE
    )
    found = {(page, when): float(seconds) for page, when, seconds in rows}  # of a page that comes in parts the last
    if code or len(found) < 4:
        return False, "it did not run to its end"
    figures = ", ".join(f"{page} {when} {seconds} s" for (page, when), seconds in found.items())
    later = "; ".join(map(" ".join, re.findall(r"^\| (and .+) \| ([\d.]+ s) \|$", output, re.MULTILINE)))
    return max(found.values()) < 2, f"{figures}; not judged, of the run's first load: {later}"


def kills_pass(code: int, output: str) -> Judgement:
    """The kill tests passed; the figure is the number of kills that they printed."""
    passed, summary = tests_pass(code, output)
    kills = sum(int(number) for number in re.findall(r"(\d+) kills", output))
    return passed and kills >= 200, f"{kills} kills, 0 committed checkpoints lost ({summary})"


def attacks_pass(code: int, output: str) -> Judgement:
    """The attacks were refused; the figures are the largest that they printed."""
    passed, summary = tests_pass(code, output)
    costs = re.findall(r"refused in ([\d.]+) s of processor time, (\d+) MB", output)
    if not costs:
        return False, summary
    seconds, megabytes = max(float(cost[0]) for cost in costs), max(int(cost[1]) for cost in costs)
    figure = f"{len(costs)} attacks, each in at most {seconds:.1f} s of processor time and {megabytes} MB"
    return passed, f"{figure} ({summary})"


def mirror_passes(code: int, output: str) -> Judgement:
    """The tests of the mirror passed; the figure is the number of kills that one of them printed."""
    passed, summary = tests_pass(code, output)
    kills = sum(int(number) for number in re.findall(r"(\d+) kills", output))
    return passed and kills > 0, f"{kills} kills within a copy, nothing half visible ({summary})"


def states_pass(code: int, output: str) -> Judgement:
    """The tests of power cuts passed; the figure is the number of states that they printed."""
    passed, summary = tests_pass(code, output)
    states = sum(int(number) for number in re.findall(r"^(\d+) states", output, re.MULTILINE))
    return passed and states > 2000, f"{states} states of the disk, 0 committed checkpoints lost ({summary})"


def faults_pass(code: int, output: str) -> Judgement:
    """The tests of faults passed; the figure is the total of the matrix that they wrote."""
    passed, summary = tests_pass(code, output)
    totals = re.findall(r"^\*\*(\d+) faults, (\d+) lost commits\*\*$", output, re.MULTILINE)
    struck, lost = map(int, totals[-1]) if totals else (0, 0)
    return passed and struck > 0 and lost == 0, f"{struck} faults struck, {lost} committed checkpoints lost ({summary})"


def saves_cost_little(code: int, output: str) -> Judgement:
    """The table: with a digest in less time than torch.save takes without, and a stall of about one copy."""
    rows = {cells[0]: cells for line in output.splitlines() if len(cells := line.strip("| ").split(" | ")) >= 7}
    ours, plain, copy = (rows.get(name) for name in ("latentwire", "torch.save", "*limit:* copy to host"))
    if code != 0 or ours is None or plain is None or copy is None:
        return False, f"exit {code}, no table"
    stall_s, durable_s, copy_s = float(ours[1]), float(ours[2]), float(copy[2])
    passed = durable_s < float(plain[2]) and stall_s <= 1.2 * copy_s
    costs = f"durable in {durable_s} s, {ours[5]} x the raw write (torch.save {plain[2]} s)"
    return passed, f"{costs}; stall {stall_s} s, one copy {copy_s} s"


def loss_falls(code: int, output: str) -> Judgement:
    """The quickstart finished and its evaluation loss fell."""
    figures = [float(figure) for figure in re.findall(r"eval/loss ([\d.]+)", output)]
    if code != 0 or len(figures) < 2:
        return False, f"exit {code}, {len(figures)} evaluations"
    return figures[-1] < figures[0], f"evaluation loss {figures[0]:.2f} -> {figures[-1]:.2f}"


def drill_passes(code: int, output: str) -> Judgement:
    """Every row passed and the final digests are the same."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        return False, f"exit {code}, no result"
    result = json.loads(lines[-1])
    rows = result["rows"]
    lost = sum(row["steps_lost"] for row in rows if row["may_lose"] == 0)
    same = result["undisturbed"] == result["disturbed"]
    slowest = max(row["resume_s"] for row in rows)
    return code == 0 and result["passed"], (
        f"{sum(row['passed'] for row in rows)} of {len(rows)} disturbances recovered in {result['attempts']} attempts, "
        f"{lost} steps lost with a notice, slowest resume {slowest:.1f} s, weights "
        f"{'identical' if same else 'DIFFERENT'} ({result['undisturbed'].get('model', '-')[:16]})"
    )


def pair_passes(code: int, output: str) -> Judgement:
    """The drill's table was printed and its test passed; the figures are the table's."""
    passed, summary = tests_pass(code, output)
    rows = [" ".join(line.split()) for line in output.splitlines() if re.search(r"\d+\.\d s$", line)]
    equal = re.findall(r"^(\w+) +\w+ +\w+ +equal$", output, re.MULTILINE)
    return passed, f"{'; '.join(rows)}; equal: {', '.join(equal)} ({summary})"


def fast_enough(limit_s: float) -> Callable[[int, str], Judgement]:
    """The median of the printed seconds is under a limit."""

    def judge(code: int, output: str) -> Judgement:
        seconds = sorted(float(figure) for figure in re.findall(r"^([\d.]+) s$", output, re.MULTILINE))
        if code != 0 or not seconds:
            return False, f"exit {code}"
        median = seconds[len(seconds) // 2]
        return median < limit_s, f"median {median:.3f} s of {len(seconds)} starts"

    return judge


def twenty_pass(code: int, output: str) -> Judgement:
    """All twenty recovered and nothing was lost; the figures are those of the printed report."""
    passed, summary = tests_pass(code, output)
    said = [line for line in output.splitlines() if re.match(r"recovered|notice to|grace given|final SHA", line)]
    return passed and "recovered 20/20, steps lost 0" in said, "; ".join(said) or summary


def costs_little(code: int, output: str) -> Judgement:
    """Less than 100 MB and 1 % of a core."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if code != 0 or not lines:
        return False, f"exit {code}, no result"
    cost = json.loads(lines[-1])
    figure = "{percent_of_a_core} % of a core, {resident_mb} MB; {runs} runs, {running} of them training".format(**cost)
    return cost["percent_of_a_core"] < 1 and cost["resident_mb"] < 100, figure
