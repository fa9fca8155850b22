"""The items of CHECKLIST.md: a claim, the command that proves it, and how its output is judged."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable

Judgement = tuple[bool, str]
"""Passed, and the figure in words (or the reason, where it did not pass)."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One claim.

    Attributes:
        name: for ``--only``.
        claim: what is promised, in a sentence.
        command: what is run, from the top of the repository.
        judge: (exit code, output) -> judgement.
        needs_gpu: cannot be shown without one.
    """

    name: str
    claim: str
    command: tuple[str, ...]
    judge: Callable[[int, str], Judgement]
    needs_gpu: bool = False


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
    """Processor time a GPU, and the median difference of the steps of both loops."""
    cores = dict(re.findall(r"^\| (host only|a GPU) \| [\d.-]+ \| ([\d.-]+) \|", output, re.MULTILINE))
    steps = dict(re.findall(r"^\| (\w+) kernels \| [\d.]+ \| ([+-][\d.]+) %", output, re.MULTILINE))
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
    """Both pages within two seconds of a cold server."""
    rows = re.findall(
        r"^\| (fleet|run) of [\d,]+ \w+, (first load|again): (?:.*) \| ([\d.]+) s \|$", output, re.MULTILINE
    )
    found = {(page, when): float(seconds) for page, when, seconds in rows}  # of a page that comes in parts the last
    if code or len(found) < 4:
        return False, "it did not run to its end"
    figures = ", ".join(f"{page} {when} {seconds} s" for (page, when), seconds in found.items())
    return max(found.values()) < 2, figures


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


def _pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-q", "-s", *arguments)


ITEMS = (
    Item(
        "quickstart",
        "The pair trains on a machine without GPU, weights or network, and its loss falls",
        ("sh", "-c", "rm -rf build/checklist && make quickstart RUNS=build/checklist"),
        loss_falls,
    ),
    Item(
        "drill",
        "A run preempted in every phase, killed, and given a corrupt checkpoint keeps the bits of an undisturbed one",
        (sys.executable, "-m", "latentwire", "drill", "--json"),
        drill_passes,
    ),
    Item(
        "kills",
        "SIGKILL at every write point of a save loses no committed checkpoint",
        _pytest("tests/unit/test_checkpoint_kill.py"),
        kills_pass,
    ),
    Item(
        "crash-states",
        "No power cut at any operation of a save, a deletion or a recovery leaves a disk that loses a commit",
        _pytest("tests/crash"),
        states_pass,
    ),
    Item(
        "faults",
        "Disks that are full, fail, stall or rot, clocks that jump, two processes on one run: no commit is lost",
        _pytest("tests/faults"),
        faults_pass,
    ),
    Item(
        "checkpoints",
        "Corrupt, unsafe, torn and foreign checkpoints are found, kept aside and never used",
        _pytest(
            *(f"tests/unit/test_{name}.py" for name in ("checkpoint", "checkpoint_rivals", "checkpoint_disk", "layout"))
        ),
        tests_pass,
    ),
    Item(
        "never-torn",
        "Each checkpoint holds one step's state while training goes on, written by one rank or by several",
        _pytest("tests/train/test_staging.py", "tests/unit/test_shares.py"),
        tests_pass,
    ),
    Item(
        "save-cost",
        "A save with SHA-256, durable, is faster than torch.save without, and training waits for about one copy (2 GB)",
        (sys.executable, "benchmarks/checkpoint.py", "--size-gb", "2", "--rounds", "3"),
        saves_cost_little,
    ),
    Item(
        "attacks",
        "A hostile checkpoint is refused in bounded time and memory, and the one before it taken",
        _pytest("tests/attacks"),
        attacks_pass,
    ),
    Item(
        "mirror",
        "Checkpoints are copied to a second home, whole or invisible, and a run that lost its own goes on from there",
        _pytest("tests/unit/test_mirror.py", "tests/train/test_second_home.py"),
        mirror_passes,
    ),
    Item(
        "own-loop",
        "The README's 15-line loop survives preemption with the same bits",
        _pytest("tests/train/test_readme.py"),
        tests_pass,
    ),
    Item(
        "ranks",
        "One and several ranks give the same bits, also when the number changes at a restart",
        _pytest("tests/train/test_ranks.py", "tests/train/test_reduction.py", "tests/unit/test_schedule.py"),
        tests_pass,
    ),
    Item(
        "plan",
        "The planner's footprints are exact for weights and kept activations, and every plan fits and covers the batch",
        _pytest(
            "tests/unit/test_planner.py",
            "tests/unit/test_footprint.py",
            "tests/train/test_pair_footprint.py",
            "tests/unit/test_cli_plan.py",
        ),
        tests_pass,
    ),
    Item(
        "hang",
        "A rank that does not come is named and given up; out of memory on one rank is no deadlock",
        _pytest("tests/train/test_hang.py"),
        tests_pass,
    ),
    Item(
        "streams",
        "A stream goes on at the exact byte, also on another number of ranks; in an epoch no file is read twice",
        _pytest("tests/unit/test_lanes.py", "tests/unit/test_jsonl.py", "tests/train/test_stream.py"),
        tests_pass,
    ),
    Item(
        "goodput",
        "Every millisecond of a run is in one class, whatever happened to it: the sum is the wall clock",
        _pytest("tests/unit/test_goodput.py", "tests/train/test_life.py", "tests/train/test_failures.py"),
        tests_pass,
    ),
    Item(
        "diagnosis",
        "Each of nine causes of a slow run is found in a trace made for it, and no other; a healthy run has none",
        _pytest("tests/unit/test_diagnose.py"),
        tests_pass,
    ),
    Item(
        "alerts",
        "A run that stands still, diverges or is given up is told of to a real webhook; a preempted one is not",
        _pytest("tests/unit/test_alerts.py", "tests/unit/test_sinks.py", "tests/train/test_alerting.py"),
        tests_pass,
    ),
    Item(
        "simulator",
        "The simulator, given a drill's preemptions and costs, comes to its goodput within 5 %",
        (sys.executable, "benchmarks/simulator.py"),
        simulator_is_close,
    ),
    Item(
        "dashboard",
        "In a real browser: a live run preempted by a button, hostile files, a phone, a keyboard; no token, no data",
        _pytest("tests/dashboard"),
        tests_pass,
    ),
    Item(
        "dashboard-speed",
        "200 runs with their states; a run's status and tables, and with a warm browser a million points: under 2 s",
        (sys.executable, "benchmarks/dashboard.py"),
        dashboard_is_fast,
    ),
    Item(
        "curve",
        "Out of many attempts one curve, each step once: as JSON lines, in TensorBoard, for Prometheus",
        _pytest(
            *(f"tests/unit/test_{name}.py" for name in ("curve", "cli_metrics", "prometheus")),
            "tests/train/test_tracking.py",
        ),
        tests_pass,
    ),
    Item(
        "long-curve",
        "A curve of a million steps is read in bounded memory, for charts three times as fast as by json.loads",
        (sys.executable, "benchmarks/curve.py"),
        long_curve_is_cheap,
    ),
    Item(
        "orchestrator",
        "The orchestrator can be killed at any moment and resumed; no second copy of a job ever runs",
        _pytest("tests/train/test_orchestrate.py"),
        tests_pass,
    ),
    Item(
        "status",
        "`latentwire status` answers in under 0.3 s",
        ("sh", "-c", f"for i in 1 2 3 4 5; do {sys.executable} benchmarks/startup.py; done"),
        fast_enough(0.3),
    ),
    Item(
        "terminal",
        "status, watch and timeline fit their terminal, obey no file, and no half line or vanished folder upsets them",
        _pytest(
            "tests/unit/test_cli_status.py",
            "tests/unit/test_seen.py",
            "tests/unit/test_cli_timeline.py",
            "tests/unit/test_watch.py",
        ),
        tests_pass,
    ),
    Item(
        "layers",
        "Rooms import downwards only, and one heavy dependency lives in one room",
        ("lint-imports",),
        lambda code, output: (code == 0, next((w for w in output.splitlines() if w.startswith("Contracts:")), "-")),
    ),
    Item(
        "gpu-monitor",
        "The monitor records a real GPU's utilisation, SM activity, memory and processes",
        _pytest("tests/gpu/test_monitor_gpu.py"),
        tests_pass,
        needs_gpu=True,
    ),
    Item(
        "monitor-files",
        "A month of the monitor stays below its stated size, and readers see each second of it once, also after kills",
        _pytest("tests/unit/test_monitor_stats.py"),
        tests_pass,
    ),
    Item(
        "monitor-fallback",
        "Where NVML's library is missing the monitor reads nvidia-smi, and leaves none behind",
        _pytest("tests/unit/test_monitor_smi.py"),
        tests_pass,
    ),
    Item(
        "monitor-overhead",
        "The monitor costs less than 0.1 % of a core a GPU, and the steps of a loop take as long beside it",
        (sys.executable, "benchmarks/monitor.py"),
        monitor_is_cheap,
        needs_gpu=True,
    ),
    Item(
        "overlap-gpu",
        "On a GPU, copies beside training hold the bits of their step, and a change that no optimizer made is seen",
        _pytest("tests/gpu/test_overlap.py"),
        tests_pass,
        needs_gpu=True,
    ),
    Item(
        "drill-gpu",
        "The drill on a GPU, in bf16",
        (sys.executable, "-m", "latentwire", "drill", "--json"),
        drill_passes,
        needs_gpu=True,
    ),
    Item(
        "pair-gpu",
        "The pair at its full 8B + 7B shapes (random weights), preempted and killed, keeps its bits",
        _pytest("tests/gpu/test_full_pair.py"),
        pair_passes,
        needs_gpu=True,
    ),
    Item(
        "elastic-gpu",
        "The full pair on other GPUs at every start, split, data-parallel or on one, keeps its bits",
        _pytest("tests/gpu/test_elastic.py"),
        tests_pass,
        needs_gpu=True,
    ),
    Item(
        "memory-gpu",
        "The peak memory of the full pair is as the planner expects, to a tenth, for three micro-batches",
        _pytest("tests/gpu/test_memory.py"),
        tests_pass,
        needs_gpu=True,
    ),
    Item(
        "pair-step",
        "A step of the full pair is 1.3 times as fast as a plain transformers loop's, in less memory",
        (sys.executable, "benchmarks/pair_step.py", "--shape", "full"),
        pair_step_is_faster,
        needs_gpu=True,
    ),
    Item(
        "reduction-cost",
        "One order of additions on 2 GPUs costs less than 3 % of a step over torch's DDP",
        (sys.executable, "benchmarks/reduction.py", "--ranks", "2", "--shape", "full"),
        reduction_is_cheap,
        needs_gpu=True,
    ),
    Item(
        "slurm-signals",
        "On a real Slurm: preempted with and without grace, at its time limit, signalled, requeued, cancelled",
        _pytest("-m", "slurm", "tests/slurm/test_signals.py", "tests/slurm/test_time_limit.py"),
        tests_pass,
    ),
    Item(
        "slurm-twenty",
        "Twenty preemptions of one run lose no step",
        _pytest("-m", "slurm", "tests/slurm/test_twenty.py", "-k", "20"),
        twenty_pass,
    ),
    Item(
        "slurm-nodes",
        "Ranks on two nodes; a node that failed is replaced, and what still runs on it commits nothing",
        _pytest("-m", "slurm", "tests/slurm/test_nodes.py"),
        tests_pass,
    ),
    Item(
        "slurm-ladder",
        "A job asks for fewer GPUs while many are not to be had, and for more at its next start: same bits on 4, 1, 4",
        _pytest("-m", "slurm", "tests/slurm/test_ladder.py"),
        tests_pass,
    ),
    Item(
        "slurm-fleet",
        "Fleets: arrays, a cap, successors, a controller that is down, the orchestrator's own job preempted",
        _pytest(
            "-m", "slurm and not slow", *(f"tests/slurm/test_{n}.py" for n in ("slurm_fleet", "successors", "scripts"))
        ),
        tests_pass,
    ),
    Item(
        "fleet-cost",
        "The orchestrator of 200 runs takes less than 100 MB and 1 % of a core",
        (sys.executable, "benchmarks/orchestrator.py"),
        costs_little,
    ),
    Item(
        "drill-slurm",
        "The drill through sbatch and scancel on a real Slurm, with a real preemption",
        _pytest("-m", "slurm", "tests/slurm/test_slurm_drill.py"),
        slurm_drill_passes,
    ),
)
