"""The capacity of a Ray cluster, computed from its nodes."""

from __future__ import annotations

import pytest

from launcher.backends.ray.cluster import RayNode, capacity, fitting, shortage

CPU = {"resources_per_worker": {"CPU": 2}, "placement_strategy": "PACK"}


def nodes(*cpus: float, **more: float) -> list[RayNode]:
    return [RayNode(f"n{i}", resources={"CPU": n} | more) for i, n in enumerate(cpus)]


def tpu(slice_name: str, worker: int, chips: float = 4) -> RayNode:
    labels = {"slice-name": slice_name, "worker-id": str(worker), "topology": "2x2x2"}
    return RayNode(
        f"{slice_name}{worker}",
        resources={"CPU": 8, "TPU": chips},
        labels={f"ray.io/tpu-{k}": v for k, v in labels.items()},
    )


def test_room_is_counted_node_by_node() -> None:
    """Two nodes with three CPUs each do not hold three ranks with two CPUs."""
    assert capacity(nodes(3, 3), CPU) == 2
    assert capacity(nodes(5, 4, 0), CPU) == 4
    assert capacity(nodes(5, 4), CPU | {"placement_strategy": "STRICT_PACK"}) == 2
    assert capacity(nodes(5, 4, 1), CPU | {"placement_strategy": "STRICT_SPREAD"}) == 2
    assert capacity([], CPU | {"placement_strategy": "STRICT_PACK"}) == 0


def test_a_type_of_accelerator_is_a_resource_of_its_node() -> None:
    asked = {"resources_per_worker": {"GPU": 1}, "use_gpu": True, "accelerator_type": "A100"}
    some = [*nodes(8, GPU=4.0), *nodes(8, GPU=4.0, **{"accelerator_type:A100": 1.0})]
    assert capacity(some, asked) == 4


def test_a_slice_counts_whole_or_not_at_all() -> None:
    asked = {"resources_per_worker": {"TPU": 1}, "use_tpu": True, "topology": "2x2x2", "num_workers": 16}
    there = [tpu("a", 0), tpu("a", 1), tpu("b", 0)]
    assert capacity(there, asked) == 8
    assert "need 2 whole TPU slices of 2x2x2, but this Ray cluster has 1" in shortage(there, asked)
    assert shortage([*there, tpu("b", 1)], asked) == ""
    assert capacity([*there, tpu("b", 1)], asked | {"topology": "2x2x4"}) == 0


def test_a_slice_of_one_host_is_a_host_that_says_so() -> None:
    """Two hosts with four chips, or hosts of a larger slice, are not one host with eight chips."""
    share = {"TPU-v5litepod-8-head": 0.125}
    asked = {"resources_per_worker": {"TPU": 1, **share}, "use_tpu": True, "topology": "2x4", "num_workers": 8}
    labels = {"ray.io/tpu-topology": "2x4"}
    halves = [RayNode(f"h{i}", resources={"TPU": 4, "TPU-v5litepod-8-head": 1 - i}, labels=labels) for i in (0, 1)]
    whole = RayNode("w", resources={"TPU": 8, "TPU-v5litepod-8-head": 1}, labels=labels)
    assert capacity([*halves, tpu("a", 0, 8)], asked) == 0
    assert "need 1 whole TPU slice of 2x4 on one host, but this Ray cluster has 0" in shortage(halves, asked)
    assert capacity([*halves, whole], asked) == 8


@pytest.mark.parametrize(
    ("asked", "there", "unit", "found"),
    [(4, 4, 1, 4), (4, 3, 1, 2), (6, 5, 1, 3), (5, 4, 1, 1), (4, 0, 1, 0), (16, 15, 8, 8), (16, 7, 8, 0), (4, 9, 1, 4)],
)
def test_fewer_ranks_divide_what_was_asked(asked: int, there: int, unit: int, found: int) -> None:
    assert fitting(asked, there, unit) == found


def test_what_is_lacking_is_said_with_what_is_there() -> None:
    assert shortage(nodes(4, 4), CPU | {"num_workers": 4}) == ""
    said = shortage(nodes(4, 4), CPU | {"num_workers": 5})
    assert said == "5 ranks need 10 CPU, but this Ray cluster has 8 (in all: 8 CPU on 2 nodes)"
    said = shortage(nodes(3, 3), CPU | {"num_workers": 3})
    assert "3 ranks placed by PACK do not fit" in said
    assert "which hold 2" in said
