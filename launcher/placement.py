"""Devices asked for + nodes that exist -> nodes x ranks. Pure arithmetic: no clock, no environment, no I/O.

A placement is uniform (every node gets as many ranks as every other), because collectives run at the pace of the
slowest node and because schedulers allocate uniform shapes soonest. Whole nodes are preferred.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from launcher.cluster import Cluster
from launcher.errors import BadRequest

Kind = Literal["cpu", "gpu", "tpu"]

# Chips on one host, by generation, for slices of several hosts.
# Source: the "VM types" and "configurations" tables of the Cloud TPU documentation.
CHIPS_PER_HOST = {"v4": 4, "v5p": 4, "v5e": 4, "v6e": 4}
# Single-host shapes of the generations that offer more than one size.
SINGLE_HOST_CHIPS = {"v4": (4,), "v5p": (4,), "v5e": (1, 4, 8), "v6e": (1, 4, 8)}

MANY_NODES = 1024
"""How many nodes are thought of at most where a cluster does not say how many it has."""


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


class _Refused(Exception):
    """Why a request cannot be placed, requests nearby that may work, and others for when none of those does."""

    def __init__(self, text: str, *nearby: Devices, others: Sequence[Devices] = ()) -> None:
        super().__init__(text)
        self.nearby, self.others = nearby, others


def place(devices: Devices, cluster: Cluster) -> Placement:
    """Choose nodes and ranks for `devices` on `cluster`.

    Raises:
        BadRequest: no uniform placement exists; the text names the nearest requests that work.
    """
    try:
        return _place(devices, cluster)
    except _Refused as refusal:
        # Only what works when it is typed: a suggestion that is refused in turn sends its reader round in circles.
        works = [d for d in refusal.nearby if _fits(d, cluster)] or [d for d in refusal.others if _fits(d, cluster)]
        options = " or ".join(map(_options, dict.fromkeys(works)))
        raise BadRequest(f"{refusal} Try {options}." if options else str(refusal)) from None


def _fits(devices: Devices, cluster: Cluster) -> bool:
    try:
        _place(devices, cluster)
    except _Refused:
        return False
    return True


def _options(devices: Devices) -> str:
    """Write `devices` as on the command line."""
    text = f"--{devices.kind}s {devices.count}"
    if devices.nodes is None:
        return text
    return f"{text} --nodes {devices.nodes} ({devices.count // devices.nodes} on each)"


def _place(devices: Devices, cluster: Cluster) -> Placement:
    if devices.topology is not None and devices.kind != "tpu":
        raise _Refused("--topology is the shape of a TPU slice; it goes with --tpus.")
    if devices.kind == "tpu":
        return _place_tpus(devices, cluster)
    node, count, kind = cluster.node, devices.count, devices.kind
    if kind == "gpu" and devices.accelerator and node.accelerator and devices.accelerator != node.accelerator:
        raise _Refused(
            f"--accelerator {devices.accelerator}: the nodes of cluster {cluster.name!r} have {node.accelerator}."
        )
    per_node = node.gpus if kind == "gpu" else (node.cpus if not cluster.oversubscribe else 0) or None
    if kind == "gpu" and per_node == 0:
        each = -(-count // (devices.nodes or 1))
        raise _Refused(
            f"--gpus {count}: the nodes of cluster {cluster.name!r} have no GPUs (node.gpus in its profile says"
            " otherwise, if that is wrong). `launch clusters` lists others.",
            replace(devices, kind="cpu", count=min(each, node.cpus or each) * (devices.nodes or 1)),
        )
    nodes = devices.nodes or _nodes_for(devices, per_node, cluster)
    if cluster.nodes and nodes > cluster.nodes:
        limit = f" and {_many(cluster.nodes * per_node, kind.upper())}" if per_node else ""
        raise _Refused(
            f"{_many(count, kind.upper())} on {_many(nodes, 'node')}: cluster {cluster.name!r} has"
            f" {_many(cluster.nodes, 'node')}{limit}.",
            *_largest(devices, per_node, cluster),
        )
    ranks = -(-count // nodes)
    if per_node and ranks > per_node:
        enough = -(-count // per_node)
        raise _Refused(
            f"{_many(ranks, kind.upper())} a node: the nodes of cluster {cluster.name!r} have {per_node}.",
            replace(devices, count=enough * per_node, nodes=enough),
            replace(devices, count=nodes * per_node),
        )
    if ranks * nodes != count:
        raise _Refused(
            f"--{kind}s {count} --nodes {nodes}: ranks are spread evenly and {count} does not divide by {nodes}.",
            *(replace(devices, count=n * nodes) for n in (ranks - 1, ranks) if n),
        )
    if kind == "cpu":
        why = f"{_many(count, 'CPU rank')} of one core{' each' * (count > 1)} on {_many(nodes, 'node')}"
        return Placement(nodes, ranks, "cpu", cpus_per_rank=1, threads=1, why=why)
    cores = node.cpus // node.gpus if node.gpus else 0
    whole = {None: "the engine chooses the nodes", ranks: "whole nodes"}.get(
        per_node, f"{ranks} of {per_node} GPUs a node"
    )
    why = f"{_many(count, 'GPU')} = {_many(nodes, 'node')} x {_many(ranks, 'rank')} ({whole})"
    return Placement(nodes, ranks, "cuda", cores, cores, devices.accelerator or node.accelerator, why=why)


def _nodes_for(devices: Devices, per_node: int | None, cluster: Cluster) -> int:
    """The fewest whole nodes for `devices`."""
    kind, count = devices.kind, devices.count
    if not per_node or count <= per_node:
        return 1
    if count % per_node == 0:
        return count // per_node
    lower = count // per_node * per_node
    most = min(count, cluster.nodes or MANY_NODES)
    even = next((n for n in range(count // per_node + 1, most + 1) if count % n == 0), None)
    raise _Refused(
        f"--{kind}s {count}: the nodes of cluster {cluster.name!r} have {_many(per_node, kind.upper())} each, and"
        f" {count} is not a whole number of nodes.",
        *(replace(devices, count=n) for n in (lower, lower + per_node)),
        *([replace(devices, nodes=even)] if even else []),
        others=_largest(devices, per_node, cluster),
    )


def _largest(devices: Devices, per_node: int | None, cluster: Cluster) -> list[Devices]:
    """The nearest to `devices` that uses all nodes there are; nothing where it is not known how many."""
    if not cluster.nodes:
        return []
    if devices.nodes is None:
        # Whatever was asked for was more than all of it, or lies between two sizes that work.
        return [replace(devices, count=cluster.nodes * per_node)] if per_node and devices.count > per_node else []
    nodes = min(devices.nodes, cluster.nodes, devices.count)
    ranks = devices.count // nodes
    return [replace(devices, count=nodes * min(ranks, per_node or ranks), nodes=nodes)]


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _place_tpus(devices: Devices, cluster: Cluster) -> Placement:
    generation = devices.accelerator or cluster.node.accelerator
    if generation not in CHIPS_PER_HOST:
        known = ", ".join(CHIPS_PER_HOST)
        raise _Refused(f"--tpus needs --accelerator with the generation: one of {known} (got {generation!r}).")
    count, per_host = devices.count, CHIPS_PER_HOST[generation]
    topology = None if devices.topology is None else Topology.parse(devices.topology)
    chips = topology.chips if topology else count  # of one slice

    def near(*counts: int) -> list[Devices]:
        return [
            replace(devices, count=n, nodes=devices.nodes and _hosts(generation, chips, n, topology)) for n in counts
        ]

    if count % chips:
        raise _Refused(
            f"--tpus {count} --topology {topology}: that slice has {chips} chips and {count} is not a whole number of"
            " slices.",
            *near(max(1, round(count / chips)) * chips),
        )
    hosts = _hosts(generation, chips, count, topology)
    if not hosts:
        single = ", ".join(map(str, SINGLE_HOST_CHIPS[generation]))
        what = f"--topology {topology}" if topology else f"--tpus {count}"
        raise _Refused(
            f"{what}: {_many(chips, 'chip')}, but {generation} comes as {single} chips on one host or in multiples of"
            f" {per_host}.",
            *near(max(1, round(count / per_host)) * per_host),
            others=near((cluster.nodes or 1) * per_host),
        )
    if devices.nodes is not None and devices.nodes != hosts:
        raise _Refused(
            f"--tpus {count} --nodes {devices.nodes}: {_many(count, f'{generation} chip')} are {_many(hosts, 'host')}.",
            *near(count),
        )
    if cluster.nodes and hosts > cluster.nodes:
        fewer = count * cluster.nodes // hosts
        raise _Refused(
            f"--tpus {count}: that is {_many(hosts, 'host')}; cluster {cluster.name!r} has {cluster.nodes}.",
            *near(*([fewer // chips * chips] if topology else [fewer // per_host * per_host])),
        )
    ranks = count // hosts
    cores = cluster.node.cpus // ranks if cluster.node.cpus else 0
    why = f"{_many(count, f'{generation} chip')} = {_many(hosts, 'host')} x {_many(ranks, 'rank')}"
    return Placement(hosts, ranks, "tpu", cores, cores, generation, devices.topology, why)


def _hosts(generation: str, chips: int, count: int, topology: Topology | None) -> int:
    """The hosts of `count` chips in slices of `chips` each (one slice where no topology is pinned); 0 for none."""
    if topology is None:
        chips = count
    if chips in SINGLE_HOST_CHIPS[generation]:
        return count // chips
    hosts, rest = divmod(chips, CHIPS_PER_HOST[generation])
    return 0 if rest else hosts * (count // chips)
