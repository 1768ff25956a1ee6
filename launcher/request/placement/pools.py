"""The uniform shapes that a request can take on the nodes there are; and where there is none, the nearest that can.

Pure arithmetic. A *pool* is the nodes of one kind as the request sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.config.cluster import Cluster, NodeKind
from launcher.request.placement.devices import Devices, Refused, many

MANY_NODES = 1024
"""How many nodes are thought of at most where a cluster does not say how many it has."""

# ---- what there is ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """The nodes of one kind, as `devices` see them: how many there are (None: unknown), and how many ranks one takes."""

    kind: NodeKind
    nodes: int | None
    each: int | None
    feature: str | None = None  # what asks for it, where its GPUs have no type of their own


def pools_of(devices: Devices, cluster: Cluster) -> list[Pool]:
    """The kinds of nodes that can hold any of `devices`."""
    pools: list[Pool] = []
    for kind in cluster.node_kinds():
        each = kind.gpus if devices.kind == "gpu" else (None if cluster.oversubscribe else kind.cpus or None)
        nodes = kind.count if kind.count or kind.down else None
        if each != 0:
            pools.append(Pool(kind, nodes, each))
    if not pools:
        each = -(-devices.count // (devices.nodes or 1))
        cores = max(kind.cpus for kind in cluster.node_kinds())
        raise Refused(
            f"--gpus {devices.count}: the nodes of cluster {cluster.name!r} have no GPUs (node.gpus in its profile says"
            " otherwise, if that is wrong). `launch clusters` lists others.",
            replace(devices, kind="cpu", count=min(each, cores or each) * (devices.nodes or 1)),
        )
    return _of_type(devices.accelerator, pools, cluster) if devices.kind == "gpu" and devices.accelerator else pools


def _of_type(wanted: str, pools: Sequence[Pool], cluster: Cluster) -> list[Pool]:
    """The pools with GPUs of the type `wanted`: by their own name, by a feature of the node, or by a part of the name.

    Sites spell types as they like: ``h100``, ``H100``, ``nvidia_h100_80gb_hbm3``. Where neither the GPUs nor the nodes
    say anything, the scheduler will.
    """
    word = wanted.casefold()
    named = [p for p in pools if p.kind.accelerator and p.kind.accelerator.casefold() == word]
    featured = [
        replace(p, feature=f) for p in pools for f in p.kind.features if not p.kind.accelerator and f.casefold() == word
    ]
    contained = [p for p in pools if p.kind.accelerator and word in p.kind.accelerator.casefold()]
    silent = [p for p in pools if not p.kind.accelerator]
    found = named or featured or contained or silent
    if not found:
        types = sorted({p.kind.accelerator or "" for p in pools})
        raise Refused(f"--accelerator {wanted}: the nodes of cluster {cluster.name!r} have {' and '.join(types)}.")
    return found


def _inventory(pools: Sequence[Pool], device: str) -> str:
    """The pools for a reader: ``2 nodes with 8 h100 GPUs, 1 node with 4 a100 GPUs (1 more is down)``."""
    shown = []
    for pool in pools:
        what = " ".join(filter(None, (pool.kind.accelerator or pool.feature, device.upper())))
        number = "nodes" if pool.nodes is None else many(pool.nodes, "node")
        shown.append(f"{number} with {many(pool.each or 0, what)}{_down(pool.kind.down)}")
    return ", ".join(shown)


def _down(count: int) -> str:
    return f" ({count} more {'is' if count == 1 else 'are'} down or drained)" if count else ""


# ---- shapes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """`nodes` nodes with `ranks` ranks each, out of `pools`."""

    nodes: int
    ranks: int
    pools: tuple[Pool, ...]
    mixed: bool = False  # GPUs of different types

    @property
    def whole(self) -> bool:
        return all(pool.each == self.ranks for pool in self.pools)

    @property
    def rank(self) -> tuple[int, ...]:
        """The lower the better; CPU ranks leave the nodes with GPUs to those who need them."""
        largest = max(pool.each or 0 for pool in self.pools)
        return (self.mixed, self.nodes, not self.whole, max(pool.kind.gpus or 0 for pool in self.pools), largest)


def shapes_of(devices: Devices, pools: Sequence[Pool]) -> Iterator[Shape]:
    """The uniform shapes of `devices`: of one pool; of several where `--nodes` asks for more than one pool has."""
    count = devices.count
    if devices.nodes is None:
        for pool in pools:
            if pool.each is None or count <= pool.each:
                shape = Shape(1, count, (pool,))
            elif count % pool.each == 0:
                shape = Shape(count // pool.each, pool.each, (pool,))
            else:
                continue
            if pool.nodes is None or shape.nodes <= pool.nodes:
                yield shape
        return
    ranks, rest = divmod(count, devices.nodes)
    if rest or not ranks:
        return
    enough = [pool for pool in pools if pool.each is None or pool.each >= ranks]
    types = dict.fromkeys(pool.kind.accelerator for pool in enough)
    alike = [[p for p in enough if p.kind.accelerator == t] for t in types] if devices.kind == "gpu" else []
    for group in [*([p] for p in enough), *alike, enough]:
        if group and (any(p.nodes is None for p in group) or sum(p.nodes or 0 for p in group) >= devices.nodes):
            several = devices.kind == "gpu" and len({p.kind.accelerator for p in group}) > 1
            yield Shape(devices.nodes, ranks, tuple(group), several)


# ---- refusals ---------------------------------------------------------------------------------------------------


def refusal(devices: Devices, pools: Sequence[Pool], cluster: Cluster) -> Refused:
    """Why no shape of `devices` exists, and the nearest that do."""
    kind, count, name = devices.kind, devices.count, f"cluster {cluster.name!r}"
    most = None if any(p.each is None for p in pools) else max(p.each or 0 for p in pools)
    nodes = None if any(p.nodes is None for p in pools) else sum(p.nodes or 0 for p in pools)
    total = None if nodes is None or most is None else sum((p.nodes or 0) * (p.each or 0) for p in pools)
    down = _down(sum(p.kind.down for p in pools))
    there = _inventory(pools, kind)
    alike = len(pools) == 1
    wanted = devices.nodes or (-(-count // most) if alike and most and count % most == 0 else None)
    if wanted is not None and nodes is not None and wanted > nodes:
        limit = f" and {many(total, kind.upper())}" if total is not None else ""
        return Refused(
            f"{many(count, kind.upper())} on {many(wanted, 'node')}: {name} has {many(nodes, 'node')}{limit}{down}.",
            *_largest(devices, pools),
        )
    if devices.nodes is None:
        each = (
            f"the nodes of {name} have {many(most or 0, kind.upper())} each, and {count} is not a whole number of nodes"
        )
        mixed = f"{name} has {there}, and {count} is no whole number of nodes of one kind"
        return Refused(
            f"--{kind}s {count}: {each if alike else mixed}.", *_around(devices, pools), others=_largest(devices, pools)
        )
    ranks = -(-count // devices.nodes)
    if most is not None and ranks > most:
        enough = -(-count // most)
        return Refused(
            f"{many(ranks, kind.upper())} a node: the nodes of {name} have {'' if alike else 'at most '}{most}.",
            replace(devices, count=enough * most, nodes=enough),
            replace(devices, count=devices.nodes * most),
            others=_largest(devices, pools),
        )
    if ranks * devices.nodes != count:
        return Refused(
            f"--{kind}s {count} --nodes {devices.nodes}: ranks are spread evenly and {count} does not divide by"
            f" {devices.nodes}.",
            *(replace(devices, count=n * devices.nodes) for n in (ranks - 1, ranks) if n),
            others=_largest(devices, pools),
        )
    fewer = sorted(shapes_of(replace(devices, nodes=None), pools), key=lambda shape: shape.rank)[:1]
    return Refused(
        f"--{kind}s {count} --nodes {devices.nodes}: that is {ranks} a node, and too few nodes of {name} have as many: it"
        f" has {there}.",
        *(replace(devices, nodes=free.nodes) for free in fewer),
        *_largest(devices, pools),
    )


def _around(devices: Devices, pools: Sequence[Pool]) -> list[Devices]:
    """The next smaller and the next larger total in whole nodes, and the same total in parts of nodes."""
    count = devices.count
    sizes = {
        size * pool.each
        for pool in pools
        if pool.each
        for size in (min(count // pool.each, pool.nodes or MANY_NODES), -(-count // pool.each))
        if size and size <= (pool.nodes or size)
    }
    lower, upper = (
        max((s for s in sizes if s < count), default=None),
        min((s for s in sizes if s > count), default=None),
    )
    known = [p.nodes for p in pools if p.nodes is not None]
    most = min(count, sum(known) if len(known) == len(pools) else MANY_NODES)
    parts = (replace(devices, nodes=n) for n in range(2, most + 1) if count % n == 0)
    even = next((p for p in parts if any(not s.mixed for s in shapes_of(p, pools))), None)
    totals = [replace(devices, count=s) for s in (lower, upper) if s]
    return [*totals, *([even] if even else [])]


def _largest(devices: Devices, pools: Sequence[Pool]) -> list[Devices]:
    """The nearest to `devices` that uses all nodes there are; nothing where it is not known how many."""
    if any(p.nodes is None for p in pools):
        return []
    if devices.nodes is None:
        # Whatever was asked for was more than all of it, or lies between two sizes that work.
        sizes = [(p.nodes or 0) * p.each for p in pools if p.each]
        return [replace(devices, count=n) for n in sorted(sizes, reverse=True) if 0 < n < devices.count][:1]
    nodes = min(devices.nodes, sum(p.nodes or 0 for p in pools), devices.count)
    if not nodes:
        return []
    most = devices.count // nodes
    ranks = sorted({min(p.each or most, most) for p in pools}, reverse=True)
    options = (replace(devices, count=nodes * r, nodes=nodes) for r in ranks)
    return [next((o for o in options if any(shapes_of(o, pools))), replace(devices, count=nodes, nodes=nodes))]
