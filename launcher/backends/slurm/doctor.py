"""SLURM checks of ``launch doctor``, and the profile of ``launch clusters new``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress

from launcher.backends.slurm import query, shell
from launcher.backends.slurm.query import Partition
from launcher.config.check import Check
from launcher.config.cluster import Cluster, NodeKind
from launcher.errors import BadRequest


def diagnose(site: Cluster) -> Iterator[Check]:
    """Check that SLURM answers, and what its partitions, nodes and accounting allow."""
    for command in ("sbatch", "srun", "squeue", "scancel", "sinfo"):
        if shutil.which(command) is None:
            yield Check("slurm", False, f"{command} is missing", "log in to a submission host of the cluster")
            return
    try:
        site, lines = shell.from_shell(site)
        found = {p.name: p for p in query.partitions()}
        kinds = query.kinds(site)
    except BadRequest as error:
        yield Check("slurm", False, str(error), "is slurmctld up, and is this host part of the cluster?")
        return
    limits = {name: "no limit" if p.max_minutes is None else f"{p.max_minutes} min" for name, p in found.items()}
    shown = ", ".join(f"partition {name} {p.state} ({limits[name]})" for name, p in found.items())
    yield Check("slurm", True, shown or "answers; its partitions are hidden from you (PrivateData)")
    yield from (Check("shell", True, line) for line in lines)
    for kind in kinds:
        what = f"{kind.count} nodes of {kind.cpus} cores, {kind.gpus or 'no'} {kind.accelerator or ''} GPUs".replace(
            "  ", " "
        )
        remedy = "`sinfo -R` shows the reason; the nodes take no job until an administrator resumes them"
        yield Check("nodes", kind.count > 0, what + (f", {kind.down} down or drained" if kind.down else ""), remedy)
    if not kinds and not (site.kinds or site.node.cpus):
        remedy = (
            "describe them in the profile: nodes = 4, [node] gpus = 8, cpus = 96; else SLURM alone checks a request"
        )
        yield Check("nodes", True, "none that you can see (PrivateData)", remedy, note=True)
    wanted = site.slurm.partition
    if wanted is not None and found:
        yield Check("partition", wanted in found, wanted, f"set slurm.partition to one of {', '.join(found)}")
    yield _accounting()


def _accounting() -> Check:
    """Whether a job that has ended is found; the end of a run is read from its directory in any case."""
    with suppress(BadRequest):
        if not query.keeps_accounts():
            return Check("accounting", True, "accounting is off (AccountingStorageType); it is not required")
    if shutil.which("sacct") is None:
        return Check("accounting", True, "sacct is not installed; it is not required")
    return Check("accounting", True, "sacct is installed")


def profile_text(found: Sequence[Partition], kinds: Sequence[NodeKind]) -> str:
    """A profile of a SLURM with these partitions and, in the default one, these kinds of nodes."""
    default = query.default_partition(found)
    limits = {p.name: "no time limit" if p.max_minutes is None else f"{p.max_minutes} min" for p in found}
    rows = []
    for partition in found:
        more = [limits[partition.name], *(["the default"] if partition.default else [])]
        more += [f"{partition.max_nodes} nodes a job"] if partition.max_nodes else []
        more += [f"accounts {', '.join(partition.accounts)}"] if partition.accounts else []
        more += [partition.state] if partition.state != "UP" else []
        rows.append(f"#   {partition.name}: {', '.join(more)}")
    nodes = [f"#   {_nodes(kind)}" for kind in kinds]
    named = [_quoted(p.name) for p in found if p.name == default] or [_quoted(found[0].name)] if found else ['"gpu"']
    return "\n".join(
        [
            "# Written by `launch clusters new`. Omitted keys are queried from SLURM each time; docs/profiles.md lists all keys.",
            'description = "this SLURM cluster"',
            'backend = "slurm"',
            "",
            "# Default of --time, and the seconds before the time limit at which a run saves and is requeued.",
            f'time = "{_default_time(found, default)}"',
            "grace = 90",
            "",
            "# Run directories, at the same path on all nodes. If `shared` is set, `runs` has to be in one of its folders.",
            '# runs = "/scratch/$USER/runs"',
            '# shared = ["/scratch", "/home"]',
            '# hub_cache = "/scratch/$USER/huggingface"',
            "# offline = true                      # the nodes have no internet",
            '# proxy = "http://proxy:3128"         # internet access through a proxy',
            "",
            "# Nodes at the time of writing:",
            *nodes,
            "",
            "[slurm]",
            "# Partitions at the time of writing:",
            *rows,
            f"{'' if default else '# '}partition = {named[0]}",
            '# account = "my-project"',
            '# qos = "normal"',
            '# modules = ["cuda/12.8"]',
            '# node_setup = ["ulimit -l unlimited"]   # on every node, before its ranks',
            "# scratch = \"/local/$SLURM_JOB_ID\"       # the ranks' TMPDIR, on each node's own disk",
            "",
            "# [environment]",
            '# NCCL_SOCKET_IFNAME = "=ib0"           # see the profiles examples/network-*',
            "",
        ]
    )


def _nodes(kind: NodeKind) -> str:
    gpus = f", {kind.gpus} {kind.accelerator or ''} GPUs".replace("  ", " ") if kind.gpus else ", no GPUs"
    down = f"; {kind.down} more down or drained" if kind.down else ""
    features = f"; features {', '.join(kind.features)}" if kind.features else ""
    return f"{kind.count} x {kind.cpus} cores, {kind.memory_gb:.0f} GB{gpus} ({kind.names}{down}{features})"


def _default_time(found: Sequence[Partition], default: str | None) -> str:
    limit = next((p.max_minutes for p in found if p.name == default), None)
    return "4h" if limit is None or limit >= 240 else f"{limit}m"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
