"""What this SLURM has and says: kinds of nodes, partitions, and its verdict on a job before it is sent."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from launcher.config import durations
from launcher.config.cluster import Cluster, NodeKind
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest

GONE = ("DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "FUTURE", "INVAL", "INVALID_REG", "ERROR", "UNKNOWN")
"""Parts of a node's state with which it takes no job. Source: "NODE STATE CODES" of sinfo(1)."""


FOR_COMMANDS = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
"""Variables that tell SLURM's commands where and how to look, rather than a job step what it has."""


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Hide the variables of the job that this process runs in, such as an interactive one.

    sbatch hands them on, and they contradict what srun is told inside the new job: "SLURM_MEM_PER_CPU,
    SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE are mutually exclusive".
    """
    own = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name not in FOR_COMMANDS
    }
    try:
        yield
    finally:
        os.environ.update(own)


class Unreachable(BadRequest):
    """SLURM cannot be asked from here, now."""


def ask(*command: str, stdin: str | None = None, stderr: bool = False) -> str:
    """Run a command of SLURM and return what it printed to stdout, or to `stderr`.

    Raises:
        Unreachable: it is missing, or nobody answers.
        BadRequest: it fails.
    """
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=TIMEOUTS.slurm_command, check=False
        )
    except FileNotFoundError:
        raise Unreachable(UNREACHABLE.format(f"the command {command[0]} is missing.")) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(UNREACHABLE.format(f"{command[0]} took more than {TIMEOUTS.slurm_command:.0f} s.")) from None
    if done.returncode:
        said = done.stderr.strip()
        if re.search("Unable to contact|Unable to process conf|Could not establish a configuration", said):
            raise Unreachable(UNREACHABLE.format(refusal_text(said)))
        raise BadRequest(f"{command[0]}: {said}")
    return done.stderr if stderr else done.stdout


UNREACHABLE = "SLURM cannot be reached from here: {} Log in to a submission host of the cluster."


# ---- nodes ------------------------------------------------------------------------------------------------------


def kinds(cluster: Cluster) -> tuple[NodeKind, ...]:
    """The kinds of nodes that jobs of the profile `cluster` can land on, the largest first.

    Raises:
        BadRequest: SLURM cannot be reached.
    """
    listed = ask("scontrol", "show", "node", "--oneliner")
    name = cluster.slurm.partition or default_partition(partitions())
    return node_kinds(listed, name, cluster.slurm.constraint)


def node_kinds(listed: str, partition: str | None, constraint: str | None = None) -> tuple[NodeKind, ...]:
    """The kinds of nodes in what ``scontrol show node --oneliner`` printed, those of one partition only.

    Nodes with as many GPUs of the same type are of one kind, and so are nodes without any that have as many cores. Where
    they differ in the rest (some cores, some memory, a feature that names their rack) the least of them counts.
    A plain `constraint` (one feature) narrows them too; SLURM's own language for more is left to SLURM.
    """
    found: dict[tuple[object, ...], list[NodeKind]] = {}
    for line in listed.splitlines():
        node = _fields(line)
        if "NodeName" not in node or (partition and partition not in node.get("Partitions", "").split(",")):
            continue
        features = tuple(f for f in node.get("ActiveFeatures", "").split(",") if f and f != "(null)")
        if constraint and re.fullmatch(r"[\w.-]+", constraint) and constraint not in features:
            continue
        for kind in _kinds_of_node(node, features):
            # Where the GPUs have no type, a feature may stand for it.
            types = () if kind.accelerator else tuple(f for f in features if GPU_NAME.search(f))
            key = (kind.gpus, kind.accelerator, types) if kind.gpus else (0, kind.cpus)
            found.setdefault(key, []).append(kind)
    merged = (_merged(alike) for alike in found.values())
    return tuple(sorted(merged, key=lambda k: (-(k.gpus or 0), -k.cpus, k.accelerator or "")))


GPU_NAME = re.compile(r"(?i)(?:^|[_-])(?:[abhklptv]|g[bh]|rtx|gtx|mi)-?\d{1,4}")
"""What types of GPU are called: a100, H100, l40s, rtx6000, mi250, tesla_v100."""


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
    """One kind; or one for each type of GPU in the node, with that type's share of its cores and memory."""
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
    """Type -> number of GPUs in generic resources such as ``gpu:a100:8(S:0-1),gpu:1g.5gb:7,shard:8`` or ``(null)``."""
    found: dict[str | None, int] = {}
    for accelerator, count in re.findall(r"(?:^|,)gpu(?::([^:,()]+))?(?::[a-z_]+)?:(\d+)", gres):
        found[accelerator or None] = found.get(accelerator or None, 0) + int(count)
    return found


def _fields(line: str) -> dict[str, str]:
    """The ``Key=value`` pairs of a line; the first of a name counts, since a free text (a reason) comes last."""
    return dict(reversed(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S*)", line)))


# ---- partitions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Partition:
    """What a partition allows a job; None or empty where it sets no limit."""

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
    """All partitions, as ``scontrol`` describes them.

    Raises:
        BadRequest: SLURM cannot be reached.
    """
    return [parse_partition(line) for line in ask("scontrol", "show", "partition", "--oneliner").splitlines() if line]


def parse_partition(line: str) -> Partition:
    """Read one line of ``scontrol show partition --oneliner``."""
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
    """Minutes of a limit as SLURM prints it, ``[D-]HH:MM:SS``; None for UNLIMITED."""
    total = durations.seconds(limit)
    return None if total is None else total // 60


def default_partition(found: Sequence[Partition]) -> str | None:
    """The name of the partition of jobs that name none."""
    return next((partition.name for partition in found if partition.default), None)


# ---- the verdict ------------------------------------------------------------------------------------------------


def verdict(script: str) -> str:
    """Ask ``sbatch --test-only`` whether the job would run, and say when; empty where it does not say.

    Raises:
        BadRequest: SLURM would refuse the job, or never start it on the nodes it has now.
    """
    try:
        with outside_of_a_job():
            answer = ask("sbatch", "--test-only", stdin=script, stderr=True)
    except Unreachable:
        raise
    except BadRequest as error:
        text = refusal_text(str(error).removeprefix("sbatch: "))
        raise BadRequest(f"sbatch refused the job: {text}") from None
    found = re.search(r"to start at (\S+)T(\S+).* on nodes? (\S+)", answer)
    return f"{found[1]} {found[2]} on {found[3]}, if it were sent now" if found else ""


def refusal_text(text: str) -> str:
    """What sbatch wrote to stderr, as sentences."""
    lines = [
        re.sub(r"^(\w+: )?(error|fatal|allocation failure): |^(sbatch|scontrol): ", "", line)
        for line in text.splitlines()
    ]
    return " ".join(line.rstrip(".") + "." for line in dict.fromkeys(lines) if line)
