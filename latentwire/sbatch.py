"""Which options of sbatch a config may give, and which have a key of their own. Names are those of Slurm's manual."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

OWN_KEYS = {
    "account": "scheduler.account",
    "constraint": "scheduler.constraint",
    "cpus_per_task": "scheduler.cpus",
    "exclude": "scheduler.exclude",
    "gpus": "scheduler.gpus",
    "gpus_per_node": "scheduler.gpus and scheduler.nodes",
    "gres": "scheduler.gpus",
    "mem": "scheduler.mem_gb",
    "nodes": "scheduler.nodes",
    "no_requeue": "scheduler.requeue",
    "partition": "scheduler.partition",
    "qos": "scheduler.qos",
    "requeue": "scheduler.requeue",
    "reservation": "scheduler.reservation",
    "signal": "preemption.grace_s",
    "time": "scheduler.time_min",
    "dependency": "scheduler.successors",
}
"""Option -> the config's key that sets it."""

_OURS = (
    "array", "comment", "error", "export_file", "gpus_per_task", "input", "job_name", "ntasks", "ntasks_per_node",
    "open_mode", "output", "parsable", "test_only", "wait", "wrap",
)  # fmt: skip
"""Set by the submission itself: another value would break it."""

EXTRA = frozenset((
    "acctg_freq", "batch", "bb", "bbf", "begin", "chdir", "clusters", "cluster_constraint", "container",
    "container_id", "contiguous", "core_spec", "cores_per_socket", "cpu_freq", "cpus_per_gpu", "deadline",
    "delay_boot", "distribution", "exclusive", "export", "extra", "extra_node_info", "get_user_env", "gid",
    "gpu_bind", "gpu_freq", "gpus_per_socket", "gres_flags", "hint", "hold", "kill_on_invalid_dep", "licenses",
    "mail_type", "mail_user", "mcs_label", "mem_bind", "mem_per_cpu", "mem_per_gpu", "mincpus", "network", "nice",
    "no_kill", "nodefile", "nodelist", "ntasks_per_core", "ntasks_per_gpu", "ntasks_per_socket", "overcommit",
    "oversubscribe", "power", "prefer", "priority", "profile", "propagate", "reboot", "resv_ports", "segment",
    "sockets_per_node", "spread_job", "stepmgr", "switches", "thread_spec", "threads_per_core", "time_min", "tmp",
    "tres_bind", "tres_per_task", "uid", "use_min_nodes", "wait_all_nodes", "wckey",
))  # fmt: skip
"""Every other option of sbatch, Slurm 22.05 to 25.11, with underscores."""


def refuse_unknown(options: Iterable[str]) -> None:
    """Check the names under ``scheduler.extra``.

    Raises:
        ValueError: one is no option of sbatch, or is set by something else; the message says what is valid.
    """
    for option in options:
        if option in OWN_KEYS:
            raise ValueError(f"{option} has a key of its own: {OWN_KEYS[option]}")
        if option in _OURS:
            raise ValueError(f"{option} is set by the submission and cannot be chosen")
        if option not in EXTRA:
            near = difflib.get_close_matches(option.replace("-", "_"), EXTRA | set(OWN_KEYS), n=3)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"{option} is no option of sbatch; {hint}valid here: {', '.join(sorted(EXTRA))}")
