"""The devices of a run, from numbers of devices or of ranks, in all or on each node."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from launcher.config.cluster import Cluster
from launcher.errors import BadRequest
from launcher.request.placement.devices import Devices, Placement, many
from launcher.request.spec import RunSpec


def devices_of(spec: RunSpec, site: Cluster) -> Devices:
    """The devices that were asked for, by their number or by that of the ranks; else one, or all of the nodes asked for.

    Raises:
        BadRequest: the numbers contradict each other, or follow from something that is not known.
    """
    asked = spec.devices()
    each = _ranks_of_node(spec, site)
    if asked is None:
        if site.node.gpus == 0 and spec.accelerator is not None:
            raise BadRequest(
                f"--accelerator {spec.accelerator}: cluster {site.name!r} has no GPUs. Leave it out, or add --tpus or --cpus."
            )
        kind, number = _default_kind(spec, site)
        count = spec.ranks or (each or (number or 1 if spec.nodes else 1)) * (spec.nodes or 1)
        asked = Devices(kind, count, spec.nodes, spec.accelerator, spec.topology)
    if spec.ranks is not None and spec.ranks != asked.count:
        raise BadRequest(
            f"--ranks {spec.ranks} --{asked.kind}s {asked.count}: each device has one rank. Give one of the two."
        )
    if each is None:
        return asked
    nodes = asked.nodes or asked.count // each
    if nodes * each != asked.count:
        raise BadRequest(
            f"--ranks-per-node {spec.ranks_per_node}: {each} ranks on each of {many(max(nodes, 1), 'node')} are"
            f" {each * max(nodes, 1)}, and {asked.count} were asked for. Leave one of the numbers out."
        )
    return replace(asked, nodes=nodes)


def _ranks_of_node(spec: RunSpec, site: Cluster) -> int | None:
    """The number that ``--ranks-per-node`` stands for; None without it."""
    text = spec.ranks_per_node
    if text is None or text.isdigit():
        return None if text is None else int(text)
    kind = _default_kind(spec, site)[0] if text == "auto" else text
    number = site.node.gpus if kind == "gpu" else site.node.cpus
    if not number:
        what = "GPUs" if kind == "gpu" else "CPU cores"
        known = (
            f"cluster {site.name!r} has no {what}"
            if number == 0 and kind == "gpu"
            else f"it is not known how many {what} a node has"
        )
        raise BadRequest(f"--ranks-per-node {text}: {known}. Write a number.")
    return number


def _default_kind(spec: RunSpec, site: Cluster) -> tuple[Literal["gpu", "cpu"], int | None]:
    """The kind of device of ranks that are only counted, and how many a node has."""
    if spec.ranks_per_node in ("gpu", "cpu"):
        return ("gpu", site.node.gpus) if spec.ranks_per_node == "gpu" else ("cpu", site.node.cpus)
    return ("gpu", site.node.gpus) if site.node.gpus else ("cpu", site.node.cpus)


def with_cores(placement: Placement, cores: int, site: Cluster) -> Placement:
    """Return `placement` with so many cores for each rank.

    Raises:
        BadRequest: no node has as many.
    """
    needed = cores * placement.ranks_per_node
    most = max((kind.cpus for kind in site.node_kinds()), default=0)
    if most and (cores > most or (needed > most and not site.oversubscribe)):
        raise BadRequest(
            f"--cpus-per-rank {cores}: the ranks of a node would take {needed} cores, and it has {most}. At most"
            f" {max(most // placement.ranks_per_node, 1)} is possible."
        )
    why = f"{placement.why}, {many(cores, 'core')} for each rank"
    return replace(placement, cpus_per_rank=cores, threads=cores, why=why)
