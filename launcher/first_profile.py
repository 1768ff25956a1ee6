"""``launch clusters new``: look at the SLURM or the Ray at hand, and write a first profile with comments."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import profiles
from launcher.backends import slurm_site
from launcher.backends.ray import address as ray_address
from launcher.backends.slurm_site import Partition
from launcher.cluster import BACKENDS, Cluster, NodeKind
from launcher.errors import BadRequest
from launcher.spec import check_name


def create(name: str, backend: str | None, cwd: Path) -> Path:
    """Write ``./cluster_configs/NAME.toml`` for the engine at hand and return its path.

    Raises:
        BadRequest: there is no engine at hand, it cannot be reached, or a profile of that name is there.
    """
    check_name(name)
    path = cwd / "cluster_configs" / f"{name}.toml"
    if path.exists():
        raise BadRequest(f"{path} exists already. Another name writes another profile: launch clusters new NAME.")
    text = _look(backend or _at_hand())
    profiles.parse(profiles.read_text(text, path), path, cwd)  # what is written can be read
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def _at_hand() -> str:
    if shutil.which("sinfo"):
        return "slurm"
    if os.environ.get("RAY_ADDRESS"):
        return "ray"
    raise BadRequest(
        "there is no SLURM (the command sinfo) and no Ray (RAY_ADDRESS) at hand. Log in to a submission host, set"
        " RAY_ADDRESS, or say which with --backend."
    )


def _look(backend: str) -> str:
    if backend == "slurm":
        found = slurm_site.partitions()
        return slurm_text(found, slurm_site.kinds(Cluster("new", "slurm")))
    if backend == "ray":
        where = ray_address(Cluster("new", "ray")) or "auto"
        return ray_text(where, _ray_nodes(where))
    raise BadRequest(
        f"--backend {backend}: a profile is written for {' or '.join(b for b in BACKENDS if b != 'local')}."
    )


def slurm_text(found: Sequence[Partition], kinds: Sequence[NodeKind]) -> str:
    """A profile of a SLURM with these partitions and, in the default one, these kinds of nodes."""
    default = slurm_site.default_partition(found)
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
            "# Written by `launch clusters new`. What is left out is asked of SLURM each time; docs/profiles.md lists all keys.",
            'description = "the SLURM cluster at hand"',
            'backend = "slurm"',
            "",
            "# Time limit when --time is not given, and the seconds before its end at which a run saves and is queued again.",
            f'time = "{_default_time(found, default)}"',
            "grace = 90",
            "",
            "# Run directories. All nodes have to see them under the same path; with `shared`, others are refused.",
            '# runs = "/scratch/$USER/runs"',
            '# shared = ["/scratch", "/home"]',
            '# hub_cache = "/scratch/$USER/huggingface"',
            "# offline = true                      # the nodes have no internet",
            '# proxy = "http://proxy:3128"         # or they have, through this',
            "",
            "# Its nodes, when this was written:",
            *nodes,
            "",
            "[slurm]",
            "# Its partitions, when this was written:",
            *rows,
            f"{'' if default else '# '}partition = {named[0]}",
            '# account = "my-project"',
            '# qos = "normal"',
            '# modules = ["cuda/12.8"]',
            '# node_setup = ["ulimit -l unlimited"]   # on every node, before its ranks',
            "# scratch = \"/local/$SLURM_JOB_ID\"       # the ranks' TMPDIR, on each node's own disk",
            "",
            "# [environment]",
            '# NCCL_SOCKET_IFNAME = "ib0"            # see the profiles examples/network-*',
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


def _ray_nodes(where: str) -> list[Mapping[str, Any]]:
    import ray

    host, _, port = where.rpartition(":")
    try:
        if where != "auto" and "://" not in where:
            socket.create_connection((host, int(port)), timeout=5).close()  # ray.init would try for five minutes
        ray.init(where, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRequest(f"Ray at {where} cannot be reached: {error}") from None
    try:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def ray_text(where: str, nodes: Sequence[Mapping[str, float]]) -> str:
    """A profile of a Ray at the address `where` whose nodes have these resources."""
    with_gpus = [node for node in nodes if node.get("GPU")]
    of = with_gpus or list(nodes)
    gpus = int(min((node.get("GPU", 0) for node in of), default=0))
    cpus = int(min((node.get("CPU", 0) for node in of), default=0))
    types = sorted({key.partition(":")[2] for node in of for key in node if key.startswith("accelerator_type:")})
    alike = len({(node.get("GPU", 0), node.get("CPU", 0)) for node in of}) < 2
    return "\n".join(
        [
            "# Written by `launch clusters new`; docs/profiles.md lists all keys.",
            'description = "the Ray cluster at hand"',
            'backend = "ray"',
            "",
            "# Run directories. All nodes have to see them under the same path; with `shared`, others are refused.",
            '# runs = "/mnt/shared/runs"',
            '# shared = ["/mnt/shared"]',
            "",
            f"# {len(nodes)} nodes are up, {len(with_gpus)} of them with GPUs"
            + ("." if alike else "; they differ, and these are the numbers of the smallest."),
            f"nodes = {len(of)}",
            "[node]",
            f"gpus = {gpus}",
            f"cpus = {cpus}",
            *([f"accelerator = {_quoted(types[0])}"] if len(types) == 1 else []),
            "",
            "[ray]",
            f"address = {_quoted(where)}",
            "# autoscales = true                  # the cluster grows on demand: do not refuse what is larger than it is now",
            "",
        ]
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
