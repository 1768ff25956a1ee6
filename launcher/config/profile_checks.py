"""Checks of the values of a profile."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from launcher.config.cluster import BACKENDS, Cluster, Slurm
from launcher.config.durations import MAX_DAYS
from launcher.errors import BadRequest
from training.flags.typed import brief

MOST = 1_000_000
"""The largest number of nodes, GPUs, cores or gigabytes."""

LONGEST = MAX_DAYS * 24 * 60 * 60
"""The longest duration, in seconds."""

LONGEST_TEXT = 4096
"""Characters of a value; a variable of ``[environment]`` may be longer."""


def check_cluster(cluster: Cluster, where: str) -> None:
    """Check the values of a profile, which `where` names in errors.

    Raises:
        BadRequest: no engine could use one of them.
    """
    if cluster.backend not in BACKENDS:
        raise BadRequest(f"{where}: backend: {cluster.backend!r} is not one of {', '.join(BACKENDS)}.")
    numbers = [cluster.nodes, cluster.node.gpus or 0, cluster.node.cpus, cluster.node.memory_gb]
    numbers += [n for kind in cluster.kinds for n in (kind.count, kind.gpus or 0, kind.cpus, kind.memory_gb, kind.down)]
    if min(numbers) < 0 or max(numbers) > MOST or cluster.grace <= 0:
        raise BadRequest(
            f"{where}: numbers of nodes, GPUs and cores and memory are 0 or more and at most {MOST}, and grace is more than"
            " 0 seconds."
        )
    seconds = {"grace": cluster.grace, "hang_after": cluster.hang_after, "ray.wait": cluster.ray.wait}
    for name, value in seconds.items():
        if not 0 <= value <= LONGEST:
            raise BadRequest(f"{where}: {name} = {value:g}: seconds are needed, 0 or more and at most {LONGEST}.")
    if not 0 <= cluster.requeues_without_progress <= MOST:
        raise BadRequest(
            f"{where}: requeues_without_progress = {brief(cluster.requeues_without_progress, 40)}: 0 to {MOST} is allowed."
        )
    if cluster.preflight and cluster.ray.inside:
        raise BadRequest(
            f"{where}: preflight = true: a Ray inside a job has no other nodes than the job's, which SLURM chose. Leave it"
            " out; `launch doctor --on-nodes` looks at the nodes."
        )
    for name in cluster.environment:
        check_variable(name, f"{where}: environment")
    if cluster.proxy is not None and not re.fullmatch(r"(https?|socks5h?)://[^\s/]+", cluster.proxy):
        raise BadRequest(f"{where}: proxy = {cluster.proxy!r}: write http://host:port.")
    _check_slurm(cluster.slurm, where)


def check_variable(name: str, where: str) -> None:
    """Check the name of a variable for the ranks.

    Raises:
        BadRequest: it cannot be the name of a variable, or `launch` sets the variable itself.
    """
    if not name or "=" in name or "\0" in name:
        raise BadRequest(f"{where}: {brief(name, 80)} cannot be the name of a variable.")
    if name in OWN_VARIABLES or name.startswith("TORCHELASTIC_"):
        raise BadRequest(f"{where}: {name} is set by launch for each rank. Remove it.")


OWN_VARIABLES = frozenset(
    (
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    )
)
"""Variables that a rank gets from its place in the run; those of a profile would be replaced without a word."""

TAKEN = {
    "nodes": "--nodes",
    "ntasks": "--gpus or --cpus; a job has one task a node, and the task starts the ranks",
    "ntasks-per-node": "--gpus or --cpus; a job has one task a node, and the task starts the ranks",
    "gpus": "--gpus",
    "gpus-per-node": "--gpus",
    "gpus-per-task": "--gpus; a job has one task a node, which needs all GPUs of the node",
    "cpus-per-task": "node.cpus: a rank gets its share of the node's cores",
    "cpus-per-gpu": "node.cpus: a rank gets its share of the node's cores",
    "mem": "slurm.mem",
    "time": "--time, or `time` in the profile",
    **dict.fromkeys(
        ("ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket"),
        "--gpus or --cpus; a job has one task a node, and the task starts the ranks",
    ),
    **dict.fromkeys(("mem-per-cpu", "mem-per-gpu"), "node.memory_gb: a job gets its share of the node's memory"),
    "job-name": "--name",
    "signal": "grace",
    **{
        name: f"slurm.{name}"
        for name in ("partition", "account", "qos", "reservation", "constraint", "exclude", "nodelist")
    },
    "clusters": "SLURM_CONF: a job is sent to, and asked of, the cluster of this host",
    **dict.fromkeys(
        ("output", "error", "open-mode", "array", "wrap", "wait"), "nothing: the run directory holds the logs"
    ),
    **dict.fromkeys(
        ("parsable", "quiet", "test-only", "help", "usage", "version"), "nothing: launch reads the answer of sbatch"
    ),
}
"""Options of sbatch that are decided elsewhere, and where."""


def _check_slurm(slurm: Slurm, where: str) -> None:
    for name, value in slurm.sbatch.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", name) or not isinstance(value, str | int | float):
            raise BadRequest(f"{where}: slurm.sbatch: {name!r} = {value!r} is not an option of sbatch and its value.")
        if len(name) == 1:
            raise BadRequest(f"{where}: slurm.sbatch: {name!r}: write the long name of the option, such as mail-type.")
        # sbatch takes the beginning of a name for the option.
        taken = [option for option in TAKEN if option.startswith(name.replace("_", "-"))]
        if taken:
            raise BadRequest(f"{where}: slurm.sbatch: {name!r} is decided elsewhere; use {TAKEN[taken[0]]}.")
    if slurm.mem is not None and not re.fullmatch(r"[0-9]{1,12}[KMGT]?B?", slurm.mem, re.IGNORECASE):
        raise BadRequest(f"{where}: slurm.mem = {brief(slurm.mem, 40)}: write the memory of a node, such as 64G.")
    if slurm.scratch is not None and not re.fullmatch(r"/([\w./-]|\$\w+|\$\{\w+\})+", slurm.scratch):
        raise BadRequest(
            f"{where}: slurm.scratch = {slurm.scratch!r}: write an absolute path of letters, digits and the node's variables,"
            " such as /local/$SLURM_JOB_ID."
        )
    if slurm.scratch is not None and "$SLURM_JOB_ID" not in slurm.scratch.replace("{", "").replace("}", ""):
        raise BadRequest(f"{where}: slurm.scratch is removed after the job, so it needs $SLURM_JOB_ID in its name.")
    container = slurm.container
    if container is None:
        return
    for mount in container.mounts:
        if not re.fullmatch(r"/[^:,]*(:/[^:,]*)?(:(ro|rw))?", mount):
            raise BadRequest(
                f"{where}: slurm.container.mounts: {mount!r}: write /path or /on/the/node:/in/the/container."
            )
    clash = [a for a in slurm.srun_args if a.startswith("--container-image")]
    if clash:
        raise BadRequest(f"{where}: slurm.srun_args: {clash[0]!r} beside slurm.container: write it in one place.")


def check_texts(data: Mapping[str, Any], where: str) -> None:
    """Check all strings of a profile: its values end up on one line of a script, or in an argument.

    Raises:
        BadRequest: one has line breaks or control characters, is empty, or is too long; a variable's value may be empty.
    """
    for key, item in data.items():
        _check_text(key, where, free=False)
        _check_text(item, f"{where}: {key}", free=key in ("environment", "description"))


def _check_text(value: Any, where: str, free: bool) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_text(key, where, free)
            _check_text(item, f"{where}: {key}", free)
    elif isinstance(value, list):
        for item in value:
            _check_text(item, where, free)
    elif isinstance(value, str) and not free and not value.strip():
        raise BadRequest(f"{where}: the value {value!r} is empty. Leave it out.")
    elif isinstance(value, str) and not free and len(value) > LONGEST_TEXT:
        raise BadRequest(
            f"{where}: {brief(value, 40)} has {len(value)} characters; at most {LONGEST_TEXT} are allowed."
        )
    elif isinstance(value, str) and any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise BadRequest(f"{where}: line breaks and control characters are not allowed in {brief(value)}; use a list.")
