"""Queries to SLURM: kinds of nodes, partitions, and a test of a job before its submission."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from launcher.backends.slurm import shell
from launcher.config import durations
from launcher.config.cluster import Cluster, NodeKind
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest

GONE = ("DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "FUTURE", "INVAL", "INVALID_REG", "ERROR", "UNKNOWN")
"""Node states without new jobs. Source: "NODE STATE CODES" of sinfo(1)."""


class Unreachable(BadRequest):
    """SLURM does not answer on this machine."""


class Hidden(BadRequest):
    """SLURM keeps the answer from this user (PrivateData)."""


def ask(*command: str, stdin: str | None = None, stderr: bool = False) -> str:
    """Run a command of SLURM and return its output: stdout, or with `stderr` its stderr.

    Raises:
        Unreachable: the command is missing, or the controller does not answer.
        Hidden: this user may not ask that.
        BadRequest: the command failed.
    """
    try:
        done = shell.run(*command, input=stdin, timeout=TIMEOUTS.slurm_command)
    except FileNotFoundError:
        raise Unreachable(UNREACHABLE.format(f"the command {command[0]} is missing.")) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(UNREACHABLE.format(f"{command[0]} took more than {TIMEOUTS.slurm_command:.0f} s.")) from None
    if done.returncode:
        message = done.stderr.strip()
        if re.search("Unable to contact|Unable to process conf|Could not establish a configuration", message):
            raise Unreachable(UNREACHABLE.format(refusal_text(message)))
        if "Access/permission denied" in message:
            raise Hidden(f"{command[0]}: {message}")
        raise BadRequest(f"{command[0]}: {message}")
    return done.stderr if stderr else done.stdout


UNREACHABLE = "SLURM cannot be reached from here: {} Log in to a submission host of the cluster."


# ---- nodes ------------------------------------------------------------------------------------------------------


def kinds(cluster: Cluster) -> tuple[NodeKind, ...]:
    """The kinds of nodes that jobs of the profile `cluster` can use, the largest first; none if they are hidden.

    Raises:
        BadRequest: SLURM cannot be reached.
    """
    try:
        listed = ask("scontrol", "show", "node", "--oneliner")
    except Hidden:
        return ()
    name = cluster.slurm.partition or default_partition(partitions())
    return node_kinds(listed, name, cluster.slurm.constraint)


def node_kinds(listed: str, partition: str | None, constraint: str | None = None) -> tuple[NodeKind, ...]:
    """Parse the kinds of nodes of a partition, or several with commas, from ``scontrol show node --oneliner``.

    Nodes with the same number and type of GPUs are of one kind; so are nodes without GPUs and with the same number of
    cores. If they differ in other values (cores, memory, features), the smallest value of each counts. A `constraint` of
    one feature selects nodes; a longer expression is left to SLURM.
    """
    found: dict[tuple[object, ...], list[NodeKind]] = {}
    wanted = set((partition or "").split(","))
    for line in listed.splitlines():
        node = _fields(line)
        if "NodeName" not in node or (partition and wanted.isdisjoint(node.get("Partitions", "").split(","))):
            continue
        features = tuple(f for f in node.get("ActiveFeatures", "").split(",") if f and f != "(null)")
        if constraint and re.fullmatch(r"[\w.-]+", constraint) and constraint not in features:
            continue
        for kind in _kinds_of_node(node, features):
            # If the GPUs have no type, a feature may name it.
            types = () if kind.accelerator else tuple(f for f in features if GPU_NAME.search(f))
            key = (kind.gpus, kind.accelerator, types) if kind.gpus else (0, kind.cpus)
            found.setdefault(key, []).append(kind)
    merged = (_merged(alike) for alike in found.values())
    return tuple(sorted(merged, key=lambda k: (-(k.gpus or 0), -k.cpus, k.accelerator or "")))


GPU_NAME = re.compile(r"(?i)(?:^|[_-])(?:[abhklptv]|g[bh]|rtx|gtx|mi)-?\d{1,4}")
"""Matches names of GPU types: a100, H100, l40s, rtx6000, mi250, tesla_v100."""


def _merged(alike: Sequence[NodeKind]) -> NodeKind:
    names = [kind.names for kind in alike if kind.count]
    return replace(
        alike[0],
        count=len(names),
        down=len(alike) - len(names),
        cpus=min(kind.cpus for kind in alike),
        memory_gb=min(kind.memory_gb for kind in alike),
        features=tuple(f for f in alike[0].features if all(f in kind.features for kind in alike)),
        names=",".join(names[:8]) + ",..." * (len(names) > 8),
    )


def _kinds_of_node(node: dict[str, str], features: tuple[str, ...]) -> Iterable[NodeKind]:
    """One kind, or one for each GPU type of the node with its share of cores and memory."""
    gone = not set(GONE).isdisjoint(re.split(r"[+*]", node.get("State", "")))
    cpus = int(node.get("CPUEfctv", node.get("CPUTot", "0")))
    memory = int(node.get("RealMemory", "0")) - int(node.get("MemSpecLimit", "0"))
    gpus = gpus_of(node.get("Gres", ""))
    total = sum(gpus.values())
    for accelerator, count in gpus.items() or [(None, 0)]:
        share = count / total if total else 1.0
        yield NodeKind(
            int(not gone),
            count,
            int(cpus * share),
            memory / 1024 * share,
            accelerator,
            features,
            node["NodeName"],
            gone,
        )


def gpus_of(gres: str) -> dict[str | None, int]:
    """GPU type -> count, from generic resources: ``gpu:a100:8(S:0-1),gpu:1g.5gb:7,shard:8`` or ``(null)``."""
    found: dict[str | None, int] = {}
    for accelerator, count in re.findall(r"(?:^|,)gpu(?::([^:,()]+))?(?::[a-z_]+)?:(\d+)", gres):
        found[accelerator or None] = found.get(accelerator or None, 0) + int(count)
    return found


def _fields(line: str) -> dict[str, str]:
    """The ``Key=value`` pairs of a line. The first of a key counts, since free text (a reason) comes last."""
    return dict(reversed(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", line)))


# ---- partitions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """Limits of a partition; None or empty: no limit."""

    name: str
    default: bool = False
    state: str = "UP"
    max_minutes: int | None = None
    max_nodes: int | None = None
    min_nodes: int = 0
    accounts: tuple[str, ...] = ()
    denied_accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()
    denied_qos: tuple[str, ...] = ()


def partitions() -> list[Partition]:
    """All partitions, from ``scontrol show partition``; none if they are hidden from this user.

    Raises:
        BadRequest: SLURM cannot be reached.
    """
    try:
        listed = ask("scontrol", "show", "partition", "--all", "--oneliner")  # also those with Hidden=YES
    except Hidden:
        return []
    return [parse_partition(line) for line in listed.splitlines() if line.startswith("PartitionName=")]


def parse_partition(line: str) -> Partition:
    """Parse one line of ``scontrol show partition --oneliner``."""
    fields = _fields(line)

    def names(key: str) -> tuple[str, ...]:
        value = fields.get(key, "ALL")
        return () if value in ("ALL", "(null)", "N/A", "") else tuple(value.split(","))

    def number(key: str) -> int | None:
        value = fields.get(key, "")
        return int(value) if value.isdigit() else None

    return Partition(
        fields["PartitionName"],
        fields.get("Default") == "YES",
        fields.get("State", "UP"),
        minutes(fields.get("MaxTime", "")),
        number("MaxNodes"),
        number("MinNodes") or 0,
        names("AllowAccounts"),
        names("DenyAccounts"),
        names("AllowQos"),
        names("DenyQos"),
    )


def minutes(limit: str) -> int | None:
    """Convert a time limit of SLURM, ``[D-]HH:MM:SS``, to minutes; None: UNLIMITED."""
    total = durations.seconds(limit)
    return None if total is None else total // 60


def default_partition(found: Sequence[Partition]) -> str | None:
    """The name of the default partition; None if there is none."""
    return next((partition.name for partition in found if partition.default), None)


# ---- what a job waits for, and the accounting -------------------------------------------------------------------


def waits_for(job_id: str) -> str:
    """Return why SLURM does not start a queued job, and what ends that for a held one; empty if it does not say."""
    try:
        reason = ask("squeue", "--noheader", f"--jobs={job_id}", "--format=%r").strip()
    except BadRequest:
        return ""
    if reason in ("", "None"):
        return ""
    if "held" not in reason.replace("_", " ").casefold():
        return reason
    failed = "a node failed to start it (such as by its prolog); " if "launch" in reason else ""
    who = "an administrator has to release it" if "Admin" in reason else f"`scontrol release {job_id}` lets it start"
    return f"{reason}: SLURM holds the job; {failed}{who}"


ENDS = {
    "OUT_OF_MEMORY": ": the job used more memory than it asked for (`memory_gb` of the nodes in the profile, or fewer ranks a node)",
    "NODE_FAIL": ": a node of it was lost",
    "TIMEOUT": ": its time limit was reached",
    "DEADLINE": ": its time limit was reached",
    "BOOT_FAIL": ": a node did not start",
    "CANCELLED": ": somebody cancelled it",
    "PREEMPTED": ": another job took its nodes",
}
"""What states of jobs that have ended mean. Source: "JOB STATE CODES" of squeue(1)."""


def ended_as(job_id: str) -> str:
    """Return SLURM's state of a job that has ended and what it means, as a sentence after a space; empty if it is not known."""
    questions = (
        ("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"),
        ("sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job_id}", "--format=State"),
    )
    for question in questions:
        with suppress(BadRequest):
            if words := ask(*question).split():  # "CANCELLED by 1000" is one state
                state = words[0].rstrip("+")
                return f" SLURM ended it as {state}{ENDS.get(state, '')}."
    return ""


def keeps_accounts() -> bool:
    """Return whether SLURM keeps a record of jobs that have ended.

    Raises:
        BadRequest: SLURM cannot be reached, or hides its settings.
    """
    found = re.search(r"^AccountingStorageType\s*=\s*(\S+)", ask("scontrol", "show", "config"), re.MULTILINE)
    return found is not None and found[1] not in ("accounting_storage/none", "(null)")


# ---- test of a job ----------------------------------------------------------------------------------------------


def verdict(script: str) -> str:
    """Test the job with ``sbatch --test-only``; returns the estimated start, empty if unknown.

    Raises:
        BadRequest: SLURM would refuse the job, or cannot start it on its present nodes.
    """
    try:
        answer = ask("sbatch", "--test-only", stdin=script, stderr=True)
    except Unreachable:
        raise
    except BadRequest as error:
        text = refusal_text(str(error).removeprefix("sbatch: "))
        raise BadRequest(f"sbatch refused the job: {text}") from None
    found = re.search(r"to start at (\S+)T(\S+).* on nodes? (\S+)", answer)
    return f"{found[1]} {found[2]} on {found[3]}, if submitted now" if found else ""


def refusal_text(text: str) -> str:
    """The error output of sbatch as sentences."""
    lines = [
        re.sub(r"^(\w+: )?(error|fatal|allocation failure): |^(sbatch|scontrol): ", "", line)
        for line in text.splitlines()
    ]
    return " ".join(line.rstrip(".") + "." for line in dict.fromkeys(lines) if line)
