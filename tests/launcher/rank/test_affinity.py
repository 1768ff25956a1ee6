"""The device of a rank for all forms of CUDA_VISIBLE_DEVICES, and the cores near it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.rank.affinity import Machine, cores_near, cpus_in, own_devices, this_machine
from training.errors import DeviceError

UUIDS = "GPU-11111111-aaaa,GPU-22222222-bbbb"
MIGS = "MIG-0c757cd7-1, MIG-5af9a1ee-2,MIG-77b04b2c-3"


@pytest.mark.parametrize(
    ("visible", "local_rank", "ranks", "own"),
    [
        (None, 3, 8, None),
        ("0,1,2,3", 3, 4, None),
        ("4,5,6,7", 0, 4, None),
        ("7", 0, 1, None),
        (UUIDS, 1, 2, None),
        (MIGS, 0, 3, "MIG-0c757cd7-1"),
        (MIGS, 1, 3, "MIG-5af9a1ee-2"),
        (MIGS, 1, 2, "MIG-5af9a1ee-2"),
        ("MIG-GPU-8a/1/0,MIG-GPU-8a/2/0", 1, 2, "MIG-GPU-8a/2/0"),
    ],
)
def test_the_device_of_a_rank(visible: str | None, local_rank: int, ranks: int, own: str | None) -> None:
    assert own_devices(visible, local_rank, ranks) == own


@pytest.mark.parametrize(("visible", "shown"), [("3", 1), ("", 0), ("0,-1,2,3", 1), ("0,0,0,0", 0), (UUIDS, 2)])
def test_ranks_do_not_share_a_device(visible: str, shown: int) -> None:
    with pytest.raises(DeviceError, match=f"4 ranks, but CUDA_VISIBLE_DEVICES='{visible}' shows {shown} of its GPUs"):
        own_devices(visible, 0, 4)


# Two sockets with two GPUs each and two hyperthreads per core; and the same with four cores on one socket.
TWO = {0: [(0, 8), (1, 9), (2, 10), (3, 11)], 1: [(4, 12), (5, 13), (6, 14), (7, 15)]}
BOX = Machine({"GPU-a1": 0, "GPU-a2": 0, "GPU-b1": 1, "GPU-b2": 1}, TWO)
ALL = set(range(16))
# One socket as four NUMA nodes (NPS4) of two cores.
FOUR = Machine(
    {"GPU-a": 0, "GPU-b": 1}, {node: [(2 * node, 2 * node + 8), (2 * node + 1, 2 * node + 9)] for node in range(4)}
)


@pytest.mark.parametrize(
    ("machine", "visible", "local_rank", "ranks", "allowed", "expected"),
    [
        (BOX, None, 0, 4, ALL, {0, 1, 8, 9}),
        (BOX, "0,1,2,3", 1, 4, ALL, {2, 3, 10, 11}),
        (BOX, "0,1,2,3", 2, 4, ALL, {4, 5, 12, 13}),
        (BOX, "3,0", 0, 2, ALL, {4, 5, 6, 7, 12, 13, 14, 15}),
        (BOX, "GPU-b2,GPU-a1", 1, 2, ALL, {0, 1, 2, 3, 8, 9, 10, 11}),
        (BOX, "2", 0, 1, {4, 12, 5, 0}, {4, 5, 12}),
        (BOX, "0,1,2,3", 0, 4, {0, 1, 2, 3, 4, 5, 6, 7}, {0, 1}),
        (BOX, "0,1,2,3", 0, 4, {0, 4, 5}, set()),  # two ranks and one core near them
        (BOX, "GPU-c,GPU-a1", 0, 2, ALL, set()),
        (BOX, "GPU-a,GPU-b1", 0, 2, ALL, set()),  # which of the two?
        (BOX, "MIG-1,MIG-2", 0, 2, ALL, set()),
        (BOX, "9", 0, 1, ALL, set()),
        (BOX, "0", 0, 2, ALL, set()),
        (Machine({"GPU-a": -1}, TWO), None, 0, 1, ALL, set()),
        (Machine({"GPU-a": 0}, {0: TWO[0]}), None, 0, 1, ALL, set()),
        (Machine({}, TWO), None, 0, 2, ALL, set()),
        (Machine(BOX.gpus, TWO, numbered=False), "0,1,2,3", 0, 4, ALL, set()),  # CUDA's order is another
        (Machine(BOX.gpus, TWO, numbered=False), "GPU-b2", 0, 1, ALL, {4, 5, 6, 7, 12, 13, 14, 15}),
        (BOX, "0,1", 0, 2, ALL, {0, 1, 8, 9}),  # half of a fair share
        (FOUR, "0,1", 0, 2, ALL, {0, 8, 1, 9}),
        (FOUR, "0,1", 0, 2, {*range(2, 8), 0}, set()),  # a core of its own near it, and six elsewhere
        (Machine({"GPU-a": 0}, FOUR.cores), None, 0, 1, ALL, set()),  # a quarter of the cores, where all were its own
    ],
)
def test_the_cores_near_a_device(
    machine: Machine, visible: str | None, local_rank: int, ranks: int, allowed: set[int], expected: set[int]
) -> None:
    assert cores_near(machine, visible, local_rank, ranks, allowed) == expected


def test_ranks_of_a_node_get_cores_of_their_own() -> None:
    sets = [cores_near(BOX, "3,2,1,0", rank, 4, ALL) for rank in range(4)]
    assert set().union(*sets) == ALL
    assert sum(map(len, sets)) == len(ALL)


def test_a_machine_is_read_from_proc_and_sys(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    for address, uuid, numa in (("0000:81:00.0", "GPU-b1", 1), ("0000:01:00.0", "GPU-a1", 0)):
        (tmp_path / f"dev/nvidia{numa}").touch()
        (tmp_path / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
        text = f"Model: \t\t NVIDIA H100\nIRQ:   \t\t 48\nGPU UUID: \t {uuid}\nDevice Minor: \t {numa}\n"
        (tmp_path / "proc/driver/nvidia/gpus" / address / "information").write_text(text)
        (tmp_path / "sys/bus/pci/devices" / address).mkdir(parents=True)
        (tmp_path / "sys/bus/pci/devices" / address / "numa_node").write_text(f"{numa}\n")
    for node, cpus in ((0, (0, 1)), (1, (2, 3))):
        (tmp_path / f"sys/devices/system/node/node{node}").mkdir(parents=True)
        (tmp_path / f"sys/devices/system/node/node{node}/cpulist").write_text(f"{cpus[0]}-{cpus[1]},{cpus[0] + 4}\n")
        for cpu in (*cpus, cpus[0] + 4):
            folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
            folder.mkdir(parents=True)
            siblings = f"{cpus[0]},{cpus[0] + 4}" if cpu != cpus[1] else str(cpu)
            (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert this_machine(tmp_path) == Machine({"GPU-a1": 0, "GPU-b1": 1}, {0: [(0, 4), (1,)], 1: [(2, 6), (3,)]})
    assert this_machine(tmp_path / "nothing") == Machine({}, {})
    (tmp_path / "dev/nvidia0").unlink()  # as for a job that has the other GPU alone, which CUDA then calls 0
    machine = this_machine(tmp_path)
    assert machine.gpus == {"GPU-b1": 1}
    assert cores_near(machine, "0", 0, 1, {0, 1, 2, 3}) == {2, 3}


def test_the_numbers_of_unequal_gpus_are_known_only_in_the_order_of_pci_addresses(tmp_path: Path) -> None:
    for address, model in (("0000:01:00.0", "NVIDIA A10"), ("0000:81:00.0", "NVIDIA H100")):
        (tmp_path / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
        (tmp_path / "proc/driver/nvidia/gpus" / address / "information").write_text(f"Model: \t {model}\n")
    assert not this_machine(tmp_path).numbered
    assert not this_machine(tmp_path, "FASTEST_FIRST").numbered
    assert this_machine(tmp_path, "PCI_BUS_ID").numbered


def test_this_very_machine_can_be_read() -> None:
    cores = this_machine().cores
    cpus = [cpu for cores_of_node in cores.values() for core in cores_of_node for cpu in core]
    assert len(cpus) == len(set(cpus))
    assert cpus_in("0-2,7,9-9") == [0, 1, 2, 7, 9]


def test_a_rank_settles() -> None:
    code = (
        "import os; from launcher.rank.affinity import settle; settle(1, 2); print(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    for visible, own in ((UUIDS, UUIDS), (MIGS, "MIG-5af9a1ee-2")):
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == own
