"""Assign devices and CPU cores to the ranks of a node."""

from __future__ import annotations

import os
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
        gpus: uuid -> NUMA node, in the order of PCI addresses; -1: unknown. Only GPUs that this process may open.
        cores: NUMA node -> its physical cores, each a tuple of logical CPUs.
        numbered: CUDA numbers the GPUs in the order of `gpus`.
    """

    gpus: Mapping[str, int]
    cores: Mapping[int, Sequence[tuple[int, ...]]]
    numbered: bool = True


def cores_near(
    machine: Machine, visible: str | None, local_rank: int, local_world_size: int, allowed: set[int]
) -> set[int]:
    """A rank's share of the physical cores of its GPU's NUMA node, as logical CPUs out of `allowed`.

    Empty (do not bind) if the machine has one NUMA node, if the NUMA node of a GPU is unknown, or if the share is less than
    half of what the rank would have if all ranks divided the allowed cores equally.
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
    usable = {node: _within(allowed, cores) for node, cores in machine.cores.items()}
    cores = usable[near]
    mates = [rank for rank, node in enumerate(nodes) if node == near]
    if len(cores) < len(mates):
        return set()
    place = mates.index(local_rank)
    share = cores[place * len(cores) // len(mates) : (place + 1) * len(cores) // len(mates)]
    if 2 * len(share) * local_world_size < sum(map(len, usable.values())):
        return set()
    return set().union(*share)


def _within(allowed: set[int], cores: Sequence[tuple[int, ...]]) -> list[set[int]]:
    return [usable for core in cores if (usable := set(core) & allowed)]


def _numa_of(name: str, machine: Machine, order: Sequence[str]) -> int:
    """The NUMA node of an entry of CUDA_VISIBLE_DEVICES; CUDA allows a prefix of a uuid. -1: unknown."""
    if name.isdigit():
        if not machine.numbered:
            return -1
        return machine.gpus[order[int(name)]] if int(name) < len(order) else -1
    found = [node for uuid, node in machine.gpus.items() if name.startswith("GPU-") and uuid.startswith(name)]
    return found[0] if len(found) == 1 else -1  # the GPU of a MIG instance is unknown


def this_machine(root: Path = Path("/"), order: str | None = None) -> Machine:
    """Read the `Machine` from /proc and /sys; without NVIDIA's driver it has no GPUs.

    The kernel lists the GPUs of the whole node. A job whose devices are constrained can open its own alone, and CUDA
    numbers these only.

    Args:
        order: ``CUDA_DEVICE_ORDER``. By default CUDA puts the fastest first, which is the order of PCI addresses if all
            GPUs are of one model.
    """
    gpus, models = {}, set()
    for folder in sorted((root / "proc/driver/nvidia/gpus").glob("*")):
        facts = _facts(_read(folder / "information"))
        if "Device Minor" in facts and not _can_open(root / f"dev/nvidia{facts['Device Minor']}"):
            continue
        numa = _read(root / "sys/bus/pci/devices" / folder.name / "numa_node").strip()
        gpus[facts.get("GPU UUID", folder.name)] = int(numa or -1)
        models.add(facts.get("Model"))
    cores: dict[int, list[tuple[int, ...]]] = {}
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        seen: dict[tuple[int, ...], None] = {}
        for cpu in cpus_in(_read(folder / "cpulist")):
            siblings = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
            seen.setdefault(tuple(cpus_in(siblings)) or (cpu,))
        if seen:
            cores[int(folder.name.removeprefix("node"))] = list(seen)
    return Machine(gpus, cores, order == "PCI_BUS_ID" or len(models) <= 1)


def _facts(text: str) -> dict[str, str]:
    """The ``name: value`` lines of a text."""
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def _can_open(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


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
    machine = this_machine(order=os.environ.get("CUDA_DEVICE_ORDER"))
    near = cores_near(machine, visible, local_rank, local_world_size, os.sched_getaffinity(0))
    if near:
        os.sched_setaffinity(0, near)
    own = own_devices(visible, local_rank, local_world_size)
    if own is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = own
