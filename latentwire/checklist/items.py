"""The items of CHECKLIST.md: a claim, the command that proves it, and who judges its output."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

from latentwire.checklist.judges import (
    Judgement,
    attacks_pass,
    costs_little,
    dashboard_is_fast,
    drill_passes,
    fast_enough,
    faults_pass,
    kills_pass,
    long_curve_is_cheap,
    loss_falls,
    memory_is_foretold,
    mirror_passes,
    monitor_is_cheap,
    pair_passes,
    pair_step_is_faster,
    pipelining_pays,
    reduction_is_cheap,
    saves_cost_little,
    simulator_is_close,
    slurm_drill_passes,
    states_pass,
    tests_pass,
    twenty_pass,
)


@dataclasses.dataclass(frozen=True)
class Item:
    """One claim.

    Attributes:
        name: for ``--only``.
        claim: what is promised, in a sentence.
        command: what is run, from the top of the repository.
        judge: (exit code, output) -> judgement.
        num_gpus: cannot be shown with fewer.
    """

    name: str
    claim: str
    command: tuple[str, ...]
    judge: Callable[[int, str], Judgement]
    num_gpus: int = 0


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
        "full-disk",
        "A notice on a full disk loses no step: older checkpoints make room; the orchestrator waits until there is",
        _pytest("tests/unit/test_checkpoint_disk.py", "tests/train/test_full_disk.py"),
        tests_pass,
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
        "own-loop-refused",
        "A loop of one's own that would lose something silently is refused, and one that is left by break is saved",
        _pytest("tests/train/test_own_loop.py", "tests/train/test_left_loop.py"),
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
            "tests/unit/test_planner_laws.py",
            "tests/unit/test_footprint.py",
            "tests/train/test_pair_footprint.py",
            "tests/unit/test_cli_plan.py",
        ),
        tests_pass,
    ),
    Item(
        "memory",
        "The full pair's step needs the memory that the planner expects, to a tenth, in a model of PyTorch's allocator",
        _pytest("tests/train/test_pair_memory.py"),
        memory_is_foretold,
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
        "Each of ten causes of a slow run is found in a trace made for it, and no other; a healthy run has none",
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
        "Under 2 s, first load: 200 runs' states, a run's status and tables; again: these and all its million points",
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
        num_gpus=1,
    ),
    Item(
        "monitor-files",
        "A month of the monitor stays below its stated size, in one attempt or many, and readers see each second once",
        _pytest("tests/unit/test_monitor_stats.py", "tests/unit/test_monitor_earlier.py"),
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
        num_gpus=1,
    ),
    Item(
        "overlap-gpu",
        "On a GPU, copies beside training hold the bits of their step, and a change that no optimizer made is seen",
        _pytest("tests/gpu/test_overlap.py"),
        tests_pass,
        num_gpus=1,
    ),
    Item(
        "drill-gpu",
        "The drill on a GPU, in bf16",
        (sys.executable, "-m", "latentwire", "drill", "--json"),
        drill_passes,
        num_gpus=1,
    ),
    Item(
        "pair-gpu",
        "The pair at its full 8B + 7B shapes (random weights), preempted and killed, keeps its bits",
        _pytest("tests/gpu/test_full_pair.py"),
        pair_passes,
        num_gpus=1,
    ),
    Item(
        "elastic-gpu",
        "The full pair on other GPUs at every start, split, data-parallel or on one, keeps its bits",
        _pytest("tests/gpu/test_elastic.py", "-k", "compiled"),
        tests_pass,
        num_gpus=2,
    ),
    Item(
        "memory-gpu",
        "On one GPU the full pair's peak memory is as the planner expects, to a tenth, for three micro-batches",
        _pytest("tests/gpu/test_memory.py", "-k", "on_one_gpu"),
        memory_is_foretold,
        num_gpus=1,
    ),
    Item(
        "memory-gpus",
        "So it is on each of two GPUs that share the full pair",
        _pytest("tests/gpu/test_memory.py", "-k", "on_two_gpus"),
        memory_is_foretold,
        num_gpus=2,
    ),
    Item(
        "micro-batch-gpu",
        "The largest micro-batch of the full pair that fits is found on a GPU",
        _pytest("tests/gpu/test_memory.py", "-k", "auto"),
        tests_pass,
        num_gpus=1,
    ),
    Item(
        "pair-step",
        "A step of the full pair is 1.3 times as fast as a plain transformers loop's, in less memory",
        (sys.executable, "benchmarks/pair_step.py", "--shape", "full"),
        pair_step_is_faster,
        num_gpus=1,
    ),
    Item(
        "pipelining",
        "A model over two GPUs computes two micro-batches at once, faster and with the same bits",
        (sys.executable, "benchmarks/split.py", "--shape", "full"),
        pipelining_pays,
        num_gpus=2,
    ),
    Item(
        "reduction-cost",
        "One order of additions on 2 GPUs costs less than 3 % of a step over torch's DDP",
        (sys.executable, "benchmarks/reduction.py", "--ranks", "2", "--shape", "full"),
        reduction_is_cheap,
        num_gpus=2,
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
