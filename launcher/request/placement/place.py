"""Devices asked for + nodes that exist -> nodes x ranks. Pure arithmetic: no clock, no environment, no I/O.

A placement is uniform (every node gets as many ranks as every other), because collectives run at the pace of the
slowest node and because schedulers allocate uniform shapes soonest. Of the shapes that a request allows, the fewest nodes
are chosen, then whole ones, then the smallest. Kinds of GPU are mixed only where the request leaves nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from launcher.config.cluster import Cluster
from launcher.errors import BadRequest
from launcher.request.placement.devices import Devices, Placement, Refused, many
from launcher.request.placement.pools import Pool, Shape, pools_of, refusal, shapes_of
from launcher.request.placement.tpu import place_tpus

__all__ = ["Devices", "Placement", "place"]


def place(devices: Devices, cluster: Cluster) -> Placement:
    """Choose nodes and ranks for `devices` on `cluster`.

    Raises:
        BadRequest: no uniform placement exists; the text names the nearest requests that work.
    """
    try:
        return _place(devices, cluster)
    except Refused as refusal:
        # Only what works when it is typed: a suggestion that is refused in turn sends its reader round in circles.
        works = [d for d in refusal.nearby if _fits(d, cluster)] or [d for d in refusal.others if _fits(d, cluster)]
        options = " or ".join(map(_options, dict.fromkeys(works)))
        raise BadRequest(f"{refusal} Try {options}." if options else str(refusal)) from None


def _fits(devices: Devices, cluster: Cluster) -> bool:
    try:
        _place(devices, cluster)
    except Refused:
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
        raise Refused("--topology is the shape of a TPU slice; it goes with --tpus.")
    if devices.kind == "tpu":
        return place_tpus(devices, cluster)
    pools = pools_of(devices, cluster)
    found = min(shapes_of(devices, pools), key=lambda shape: shape.rank, default=None)
    if found is None:
        raise refusal(devices, pools, cluster)
    if devices.kind == "cpu":
        each = " each" * (devices.count > 1)
        why = f"{many(devices.count, 'CPU rank')} of one core{each} on {many(found.nodes, 'node')}"
        memory = _least(p.kind.memory_gb / p.kind.cpus if p.kind.cpus else 0.0 for p in found.pools) * found.ranks
        return Placement(found.nodes, found.ranks, "cpu", 1, 1, why=why, memory_gb=memory)
    return _gpu_placement(devices, found, pools, cluster)


def _gpu_placement(devices: Devices, shape: Shape, pools: Sequence[Pool], cluster: Cluster) -> Placement:
    kinds = [pool.kind for pool in shape.pools]
    cores = int(_least(kind.cpus // kind.gpus if kind.gpus else 0 for kind in kinds))
    memory = _least(kind.memory_gb / kind.gpus if kind.gpus else 0.0 for kind in kinds) * shape.ranks
    types = list(dict.fromkeys(kind.accelerator for kind in kinds if kind.accelerator))
    several = len({kind.accelerator for kind in cluster.node_kinds() if kind.gpus}) > 1
    # The type is named only where it decides something: many sites define none in their gres.conf.
    name = types[0] if len(types) == 1 and (devices.accelerator or several) else None
    feature = shape.pools[0].feature
    each = {pool.each for pool in shape.pools}
    if each == {None}:
        parts = ["the engine chooses the nodes"]
    elif shape.whole:
        parts = ["whole nodes"]
    else:
        parts = [f"{shape.ranks} of {'/'.join(str(e) for e in sorted(filter(None, each)))} GPUs a node"]
    if len(cluster.node_kinds()) > 1:
        parts.append(_reason(devices, shape, pools, types))
    why = f"{many(devices.count, 'GPU')} = {many(shape.nodes, 'node')} x {many(shape.ranks, 'rank')}"
    accelerator = (types[0] if types and len(types) == 1 else None) or devices.accelerator
    return Placement(
        shape.nodes,
        shape.ranks,
        "cuda",
        cores,
        cores,
        accelerator,
        why=f"{why} ({'; '.join(filter(None, parts))})",
        memory_gb=memory,
        gpu_type=name or (devices.accelerator if devices.accelerator and not feature and not types else None),
        feature=feature,
    )


def _reason(devices: Devices, shape: Shape, pools: Sequence[Pool], types: Sequence[str]) -> str:
    """Why these nodes of a cluster of mixed ones."""
    if shape.mixed:
        return f"{' and '.join(types)} mixed: no kind alone has {devices.nodes} such nodes"
    kind = types[0] if types else shape.pools[0].feature or "one kind of node"
    others = [s for s in shapes_of(devices, pools) if not s.mixed and not set(s.pools) & set(shape.pools)]
    if not others:
        return f"on {kind}" if devices.accelerator else f"on {kind}, the only nodes that hold them"
    best = min(others, key=lambda other: other.rank)
    if best.nodes > shape.nodes:
        reason = "the fewest nodes"
    elif shape.whole and not best.whole:
        reason = "whole nodes before parts of larger ones"
    else:
        reason = "the smaller nodes that hold them"
    other = best.pools[0].kind.accelerator
    return f"on {kind}: {reason}" + (f"; --accelerator {other} chooses the others" if other else "")


def _least(values: Iterable[float]) -> float:
    """The smallest of `values`, 0 (unknown) where one is unknown."""
    return min(values, default=0)
