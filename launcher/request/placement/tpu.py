"""TPUs: the slices that exist, the hosts they are made of, and the variables their processes are started with."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from launcher.config.cluster import Cluster
from launcher.errors import BadRequest
from launcher.request.placement.devices import Devices, Placement, Refused, many

# Chips on one host, by generation, for slices of several hosts.
# Source: the "VM types" and "configurations" tables of the Cloud TPU documentation.
CHIPS_PER_HOST = {"v4": 4, "v5p": 4, "v5e": 4, "v6e": 4}
# Single-host shapes of the generations that offer more than one size.
SINGLE_HOST_CHIPS = {"v4": (4,), "v5p": (4,), "v5e": (1, 4, 8), "v6e": (1, 4, 8)}
# Cloud TPU names a slice by its cores, as in v4-8 and v5litepod-16.
CORES_PER_CHIP = {"v4": 2, "v5p": 2, "v5e": 1, "v6e": 1}
# Slices of the generations whose chips form a plane. In the others each axis is 1, 2 or a multiple of 4.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
FLAT_GENERATIONS = ("v5e", "v6e")

LONGEST_AXIS = 32
"""Of the slices with three axes that are thought of."""

BASE_PORT = 8070
"""torch_tpu's first port of the slice builder on each host of several. Source: torch_tpu 0.2.0, `set_tpu_launch_env`."""

MEGASCALE_PORT = 8081
"""Where slices meet, and the first of the ports of their processes, one for each of a host. Source: Ray's default."""


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
        if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){1,2}", text, re.ASCII):
            raise BadRequest(f"--topology {text!r}: write chips along each axis, such as 4x4 or 2x2x2.")
        return cls(tuple(int(n) for n in text.split("x")))

    @property
    def chips(self) -> int:
        return math.prod(self.axes)

    def exists(self, generation: str) -> bool:
        """Whether `generation` has slices of this shape; a trailing axis of one chip changes nothing for a flat one."""
        if generation in FLAT_GENERATIONS:
            flat = self.axes[:2] if self.axes[2:] in ((), (1,)) else self.axes
            return flat in FLAT
        return len(self.axes) == 3 and self.axes in _deep()

    def __str__(self) -> str:
        return "x".join(map(str, self.axes))


def _deep() -> set[tuple[int, ...]]:
    """The slices with three axes, of v4 and v5p: from 2x2x1, the chips of one host, to whole pods of 4x4x4 cubes."""
    small = {(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)}
    sides = range(4, LONGEST_AXIS + 1, 4)
    return small | {tuple(axes) for axes in itertools.combinations_with_replacement(sides, 3)}


def slices(generation: str) -> Iterator[Topology]:
    """The slices of `generation`, the smallest first; of equally large ones the most compact first."""
    shapes = FLAT if generation in FLAT_GENERATIONS else _deep()
    yield from (Topology(axes) for axes in sorted(shapes, key=lambda axes: (math.prod(axes), max(axes))))


def slice_of(generation: str, chips: int) -> Topology | None:
    """The most compact slice of `chips` chips; None where there is none."""
    return next((shape for shape in slices(generation) if shape.chips == chips), None)


def hosts_of(generation: str, chips: int, count: int) -> int:
    """The hosts of `count` chips in slices of `chips` each."""
    if chips in SINGLE_HOST_CHIPS[generation]:
        return count // chips
    return chips // CHIPS_PER_HOST[generation] * (count // chips)


def pod_type(generation: str, chips: int) -> str:
    """Cloud TPU's name of a slice of `chips` chips, such as ``v4-8`` or ``v5litepod-16``."""
    return f"{generation.replace('v5e', 'v5litepod')}-{chips * CORES_PER_CHIP[generation]}"


def tpu_environment(
    hosts: Sequence[str], chips_per_host: int, topology: str, node: int, session: str
) -> dict[str, str]:
    """The variables that the processes on host number `node` of a slice are started with, the same for all its ranks.

    What torch_tpu's own ``set_tpu_launch_env`` sets in a parent process, from what is known before anything runs. On one
    host the addresses are of ports that the caller found free: ``hosts`` are then ``host:port`` already, one a chip.

    Args:
        hosts: names or addresses of the slice's hosts, in the order of their ranks (Z-major, X-minor).
        topology: of the slice, as in ``4x4`` or ``2x2x1``.
        session: the same text on all hosts; names the profile of the run.
    """
    axes = [*Topology.parse(topology).axes, 1][:3]
    single = all(":" in host for host in hosts)
    addresses = hosts if single else [f"{h}:{BASE_PORT + i}" for h in hosts for i in range(chips_per_host)]
    variables = {
        "TORCH_TPU_SLICEBUILDER_ADDRESSES": ",".join(addresses),
        "TORCH_TPU_TOPOLOGY": ",".join(map(str, axes)),
        "TORCH_TPU_XPROF_SESSION_ID": session,
    }
    return variables if single else variables | {"NNODES": str(len(hosts)), "NODE_RANK": str(node)}


def rank_environment(
    slices: Sequence[Sequence[str]], number: int, host: int, chip: int, chips_per_host: int, topology: str, session: str
) -> dict[str, str]:
    """The variables of one rank: what every process of its slice has to agree on, and where several slices meet.

    Args:
        slices: the addresses of the hosts of each slice, in the order of their ranks.
        number: of the rank's slice; `host` counts within that, `chip` within the host.
        topology, session: see `tpu_environment`.
    """
    hosts = slices[number]
    addresses = hosts if len(hosts) > 1 else [f"{hosts[0]}:{BASE_PORT + each}" for each in range(chips_per_host)]
    variables = {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "TPU_WORKER_ID": str(host)}
    variables |= tpu_environment(addresses, chips_per_host, topology, host, session)
    if len(slices) > 1:
        variables |= {
            "MEGASCALE_COORDINATOR_ADDRESS": f"{slices[0][0]}:{MEGASCALE_PORT}",
            "MEGASCALE_NUM_SLICES": str(len(slices)),
            "MEGASCALE_SLICE_ID": str(number),
            "MEGASCALE_PORT": str(MEGASCALE_PORT + chip),  # one for each process of a host
        }
    return variables


def environment_of(placement: Placement, hosts: Sequence[str], node: int, chip: int, session: str) -> dict[str, str]:
    """`rank_environment` of a rank of `placement`, whose nodes have the addresses `hosts`; slices follow each other."""
    topology = placement.topology or "1x1"
    each = len(hosts) * Topology.parse(topology).chips // placement.world_size
    slices = [hosts[at : at + each] for at in range(0, len(hosts), each)]
    return rank_environment(slices, node // each, node % each, chip, placement.ranks_per_node, topology, session)


def place_tpus(devices: Devices, cluster: Cluster) -> Placement:
    """Choose the slices for `devices` on `cluster`; without a topology, one slice of the most compact shape.

    Raises:
        Refused: there are no such slices.
    """
    generation, count = devices.accelerator or cluster.node.accelerator, devices.count
    if generation not in CHIPS_PER_HOST:
        known = ", ".join(CHIPS_PER_HOST)
        raise Refused(f"--tpus needs --accelerator with the generation: one of {known} (got {generation!r}).")
    pinned = Topology.parse(devices.topology) if devices.topology else None
    shape = pinned or slice_of(generation, count)
    if shape is None or not shape.exists(generation):
        raise _no_slice(devices, generation, pinned, cluster)
    hosts = hosts_of(generation, shape.chips, count)

    def near(chips: int) -> list[Devices]:
        """`devices` with so many chips, and the hosts that go with them where hosts were pinned."""
        of = pinned or slice_of(generation, chips)
        nodes = hosts_of(generation, of.chips, chips) if devices.nodes and of else None
        return [replace(devices, count=chips, nodes=nodes)] if chips else []

    if count % shape.chips:
        raise Refused(
            f"--tpus {count} --topology {shape}: that slice has {shape.chips} chips and {count} is not a whole number of"
            " slices.",
            *near(max(1, round(count / shape.chips)) * shape.chips),
        )
    if devices.nodes is not None and devices.nodes != hosts:
        raise Refused(
            f"--tpus {count} --nodes {devices.nodes}: {many(count, f'{generation} chip')} are {many(hosts, 'host')}.",
            *near(count),
        )
    down = sum(kind.down for kind in cluster.kinds)
    if (cluster.nodes or down) and hosts > cluster.nodes:
        fewer = count * cluster.nodes // hosts // shape.chips * shape.chips if pinned else 0
        raise Refused(
            f"--tpus {count}: that is {many(hosts, 'host')}; cluster {cluster.name!r} has {cluster.nodes}"
            f"{f' ({down} more down or drained)' if down else ''}.",
            *near(fewer or _largest_on(generation, cluster) * (not pinned) * bool(cluster.nodes)),
        )
    ranks = count // hosts
    cores = cluster.node.cpus // ranks if cluster.node.cpus else 0
    memory = cluster.node.memory_gb
    of = f" ({many(count // shape.chips, 'slice')} of {shape})" if count > 1 else ""
    why = f"{many(count, f'{generation} chip')} = {many(hosts, 'host')} x {many(ranks, 'rank')}{of}"
    topology = devices.topology or (str(shape) if count > 1 else None)
    device: Literal["tpu", "xla"] = "xla" if cluster.tpu_runtime == "torch_xla" else "tpu"
    return Placement(hosts, ranks, device, cores, cores, generation, topology, why, memory)


def _largest_on(generation: str, cluster: Cluster) -> int:
    """The chips of the largest slice that the hosts of `cluster` can be."""
    fit = (s.chips for s in slices(generation) if hosts_of(generation, s.chips, s.chips) <= (cluster.nodes or 1))
    return max(fit, default=0)


def _no_slice(devices: Devices, generation: str, pinned: Topology | None, cluster: Cluster) -> Refused:
    """Why there is no such slice, and the next smaller and larger ones."""
    wanted = pinned.chips if pinned else devices.count
    known = list(slices(generation))
    lower = max((s.chips for s in known if s.chips < wanted), default=0)
    upper = min((s.chips for s in known if s.chips >= wanted + (pinned is None)), default=0)
    largest = _largest_on(generation, cluster)
    near, others = (
        [replace(devices, count=n, nodes=devices.nodes and hosts_of(generation, n, n)) for n in sizes if n]
        for sizes in ((lower, upper), (largest,))
    )
    if pinned is not None:
        text = f"--topology {pinned}: {generation} has no slices of that shape; "
        shapes = ", ".join(map(str, known[:8]))
        return Refused(f"{text}it has {shapes}{', ...' if len(known) > 8 else ''}.")
    sizes = ", ".join(map(str, dict.fromkeys(s.chips for s in known[:8]))) + " and more" * (len(known) > 8)
    return Refused(
        f"--tpus {devices.count}: {generation} has no slice of {many(devices.count, 'chip')}; it comes as {sizes}.",
        *near,
        others=others,
    )
