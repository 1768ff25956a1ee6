"""Assign devices and CPU cores to the ranks of a node."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.distributed.visible import visible_devices
from training.errors import DeviceError


def own_devices(visible: str | None, local_rank: int, local_world_size: int) -> str | None:
    """The value of a rank's ``CUDA_VISIBLE_DEVICES``; None: keep the node's value.

    A kept value is indexed by the local rank.

    CUDA shows a process one MIG instance at most, so with MIG the list is reduced to the rank's own instance.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES`` of the node: numbers, ``GPU-<uuid>`` or ``MIG-<uuid>``; None: not set, so all
            devices are visible.

    Raises:
        DeviceError: there are fewer devices than ranks.
    """
    devices = visible_devices(visible)
    if devices is None:
        return None
    if len(devices) < local_world_size:
        raise DeviceError(
            f"this node has {local_world_size} ranks, but CUDA_VISIBLE_DEVICES={visible!r} shows {len(devices)} of its"
            " GPUs. Check gpu-bind, gpus-per-task and CUDA_VISIBLE_DEVICES in the cluster's profile and in its prolog."
        )
    return devices[local_rank] if devices[local_rank].startswith("MIG-") else None


# ---- cores near the device --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """GPUs and cores of a node, as the kernel describes them.

    Attributes:
        gpus: uuid -> NUMA node, in the order of PCI addresses; -1: unknown.
        cores: NUMA node -> its physical cores, each a tuple of logical CPUs.
    """

    gpus: Mapping[str, int]
    cores: Mapping[int, Sequence[tuple[int, ...]]]


def cores_near(
    machine: Machine, visible: str | None, local_rank: int, local_world_size: int, allowed: set[int]
) -> set[int]:
    """A rank's share of the physical cores of its GPU's NUMA node, as logical CPUs out of `allowed`.

    Empty (do not bind) if the machine has one NUMA node, if the NUMA node of a GPU is unknown, or if there are fewer
    allowed cores than ranks.
    """
    order = list(machine.gpus)
    names = visible_devices(visible)
    if names is None:
        names = [str(n) for n in range(len(order))]
    if len(machine.cores) < 2 or len(names) < local_world_size:
        return set()
    nodes = [_numa_of(name, machine, order) for name in names[:local_world_size]]
    near = nodes[local_rank]
    if any(node not in machine.cores for node in nodes):
        return set()
    cores = [set(core) & allowed for core in machine.cores[near]]
    cores = [core for core in cores if core]
    mates = [rank for rank, node in enumerate(nodes) if node == near]
    if len(cores) < len(mates):
        return set()
    place = mates.index(local_rank)
    share = cores[place * len(cores) // len(mates) : (place + 1) * len(cores) // len(mates)]
    return set().union(*share)


def _numa_of(name: str, machine: Machine, order: Sequence[str]) -> int:
    """The NUMA node of an entry of CUDA_VISIBLE_DEVICES; CUDA allows a prefix of a uuid. -1: unknown."""
    if name.isdigit():
        return machine.gpus[order[int(name)]] if int(name) < len(order) else -1
    found = [node for uuid, node in machine.gpus.items() if name.startswith("GPU-") and uuid.startswith(name)]
    return found[0] if len(found) == 1 else -1  # the GPU of a MIG instance is unknown


def this_machine(root: Path = Path("/")) -> Machine:
    """Read the `Machine` from /proc and /sys; without NVIDIA's driver it has no GPUs."""
    gpus = {}
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        text = _read(folder / "information")
        uuid = re.search(r"GPU UUID:\s*(\S+)", text)
        numa = _read(root / "sys/bus/pci/devices" / folder.name / "numa_node").strip()
        gpus[uuid[1] if uuid else folder.name] = int(numa or -1)
    cores: dict[int, list[tuple[int, ...]]] = {}
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        seen: dict[tuple[int, ...], None] = {}
        for cpu in cpus_in(_read(folder / "cpulist")):
            siblings = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            seen.setdefault(tuple(cpus_in(siblings)) or (cpu,))
        if seen:
            cores[int(folder.name.removeprefix("node"))] = list(seen)
    return Machine(gpus, cores)


def cpus_in(text: str) -> list[int]:
    """Parse a CPU list of the kernel, such as ``0-3,8``."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def settle(local_rank: int, local_world_size: int) -> None:
    """Bind this rank to its device and the cores near it. Call before CUDA is initialised.

    Raises:
        DeviceError: there are fewer devices than ranks.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    near = cores_near(this_machine(), visible, local_rank, local_world_size, os.sched_getaffinity(0))
    if near:
        os.sched_setaffinity(0, near)
    own = own_devices(visible, local_rank, local_world_size)
    if own is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = own
