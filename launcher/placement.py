"""Devices asked for + nodes that exist -> nodes x ranks. Pure arithmetic: no clock, no environment, no I/O.

A placement is uniform (every node gets as many ranks as every other), because collectives run at the pace of the
slowest node and because schedulers allocate uniform shapes soonest. Whole nodes are preferred.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from launcher.cluster import Cluster
from launcher.errors import BadRequest

Kind = Literal["cpu", "gpu", "tpu"]

# Chips on one host, by generation, for slices of several hosts.
# Source: the "VM types" and "configurations" tables of the Cloud TPU documentation.
CHIPS_PER_HOST = {"v4": 4, "v5p": 4, "v5e": 4, "v6e": 4}
# Single-host shapes of the generations that offer more than one size.
SINGLE_HOST_CHIPS = {"v4": (4,), "v5p": (4,), "v5e": (1, 4, 8), "v6e": (1, 4, 8)}


@dataclass(frozen=True)
class Devices:
    """Devices asked for: a total, and whatever the user pinned of its shape."""

    kind: Kind
    count: int
    nodes: int | None = None
    accelerator: str | None = None
    topology: str | None = None


@dataclass(frozen=True)
class Topology:
    """The shape of a TPU slice, in chips along each axis."""

    axes: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Read ``4x4`` or ``2x2x2``.

        Raises:
            BadRequest: the text is not two or three whole numbers joined by ``x``.
        """
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", text):
            raise BadRequest(f"--topology {text!r}: write chips along each axis, such as 4x4 or 2x2x2.")
        return cls(tuple(int(n) for n in text.split("x")))

    @property
    def chips(self) -> int:
        return math.prod(self.axes)

    def __str__(self) -> str:
        return "x".join(map(str, self.axes))


@dataclass(frozen=True)
class Placement:
    """Where ranks run.

    Attributes:
        nodes: number of nodes (hosts).
        ranks_per_node: ranks on each node; one device each.
        device: the ranks' device type: ``cpu``, ``cuda`` or ``tpu``.
        cpus_per_rank: CPU cores reserved for a rank; 0 where the cluster does not say.
        threads: intra-op CPU threads of a rank; 0 leaves the library's default.
        accelerator, topology: as asked, or what the cluster has.
        why: one sentence for the reader of the plan.
    """

    nodes: int
    ranks_per_node: int
    device: Literal["cpu", "cuda", "tpu"]
    cpus_per_rank: int = 0
    threads: int = 0
    accelerator: str | None = None
    topology: str | None = None
    why: str = ""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def place(devices: Devices, cluster: Cluster) -> Placement:
    """Choose nodes and ranks for `devices` on `cluster`.

    Raises:
        BadRequest: no uniform placement exists; the text names the nearest requests that work.
    """
    if devices.topology is not None and devices.kind != "tpu":
        raise BadRequest("--topology is the shape of a TPU slice; it goes with --tpus.")
    if devices.kind == "tpu":
        return _place_tpus(devices, cluster)
    node, count, kind = cluster.node, devices.count, devices.kind
    if kind == "gpu" and devices.accelerator and node.accelerator and devices.accelerator != node.accelerator:
        raise BadRequest(
            f"--accelerator {devices.accelerator}: the nodes of cluster {cluster.name!r} have {node.accelerator}."
        )
    per_node = node.gpus if kind == "gpu" else node.cpus or None
    if kind == "gpu" and per_node == 0:
        raise BadRequest(
            f"--gpus {count}: the nodes of cluster {cluster.name!r} have no GPUs (node.gpus in its profile says"
            f" otherwise, if that is wrong). Try --cpus {min(count, node.cpus or count)}, or another --cluster"
            " (`launch clusters` lists them)."
        )
    nodes = devices.nodes or _nodes_for(kind, count, per_node, cluster)
    if cluster.nodes and nodes > cluster.nodes:
        most = cluster.nodes * (per_node or 0)
        limit = f" and {most} {kind.upper()}s" if per_node else ""
        raise BadRequest(
            f"{count} {kind.upper()}s on {nodes} nodes: cluster {cluster.name!r} has {cluster.nodes} nodes{limit}."
            + (f" Try --{kind}s {most}." if 0 < most < count else "")
        )
    if count % nodes:
        lower = count // nodes * nodes
        options = [f"--{kind}s {n}" for n in (lower, lower + nodes) if n]
        raise BadRequest(
            f"--{kind}s {count} --nodes {nodes}: ranks are spread evenly and {count} does not divide by {nodes}."
            f" Try {' or '.join(options)}."
        )
    ranks = count // nodes
    if per_node and ranks > per_node:
        fit = -(-count // per_node)
        raise BadRequest(
            f"{ranks} {kind.upper()}s a node: the nodes of cluster {cluster.name!r} have {per_node}."
            f" Try --nodes {fit} --{kind}s {fit * per_node}."
        )
    if kind == "cpu":
        why = f"{count} CPU ranks of one core each on {nodes} node{'s' * (nodes > 1)}"
        return Placement(nodes, ranks, "cpu", cpus_per_rank=1, threads=1, why=why)
    cores = node.cpus // node.gpus if node.gpus else 0
    whole = {None: "the engine chooses the nodes", ranks: "whole nodes"}.get(
        per_node, f"{ranks} of {per_node} GPUs a node"
    )
    why = f"{count} GPUs = {nodes} node{'s' * (nodes > 1)} x {ranks} ranks ({whole})"
    return Placement(nodes, ranks, "cuda", cores, cores, devices.accelerator or node.accelerator, why=why)


def _nodes_for(kind: Kind, count: int, per_node: int | None, cluster: Cluster) -> int:
    """The fewest whole nodes for `count` devices."""
    if not per_node or count <= per_node:
        return 1
    if count % per_node == 0:
        return count // per_node
    lower, upper = count // per_node * per_node, -(-count // per_node) * per_node
    even = next((n for n in range(count // per_node + 1, count) if count % n == 0), count)
    raise BadRequest(
        f"--{kind}s {count}: the nodes of cluster {cluster.name!r} have {per_node} {kind.upper()}s each, and {count} is"
        f" not a whole number of nodes. Try --{kind}s {lower}, --{kind}s {upper},"
        f" or --{kind}s {count} --nodes {even} ({count // even} on each)."
    )


def _place_tpus(devices: Devices, cluster: Cluster) -> Placement:
    generation = devices.accelerator or cluster.node.accelerator
    if generation not in CHIPS_PER_HOST:
        known = ", ".join(CHIPS_PER_HOST)
        raise BadRequest(f"--tpus needs --accelerator with the generation: one of {known} (got {generation!r}).")
    count = devices.count
    if devices.topology is not None:
        topology = Topology.parse(devices.topology)
        if count % topology.chips:
            raise BadRequest(
                f"--tpus {count} --topology {topology}: that slice has {topology.chips} chips and {count} is not a whole"
                f" number of slices. Try --tpus {max(1, round(count / topology.chips)) * topology.chips}."
            )
    if count in SINGLE_HOST_CHIPS[generation]:
        hosts = 1
    else:
        per_host = CHIPS_PER_HOST[generation]
        hosts, rest = divmod(count, per_host)
        if rest or not hosts:
            single = ", ".join(map(str, SINGLE_HOST_CHIPS[generation]))
            raise BadRequest(
                f"--tpus {count}: {generation} comes as {single} chips on one host or in multiples of {per_host}."
                f" Try --tpus {max(1, round(count / per_host)) * per_host}."
            )
    if devices.nodes is not None and devices.nodes != hosts:
        raise BadRequest(f"--tpus {count} --nodes {devices.nodes}: {count} {generation} chips are {hosts} hosts.")
    if cluster.nodes and hosts > cluster.nodes:
        raise BadRequest(f"--tpus {count}: that is {hosts} hosts; cluster {cluster.name!r} has {cluster.nodes}.")
    ranks = count // hosts
    cores = cluster.node.cpus // ranks if cluster.node.cpus else 0
    why = f"{count} {generation} chips = {hosts} host{'s' * (hosts > 1)} x {ranks} ranks"
    return Placement(hosts, ranks, "tpu", cores, cores, generation, devices.topology, why)
