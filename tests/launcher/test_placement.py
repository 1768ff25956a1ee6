"""place(): devices asked for + nodes that exist -> nodes x ranks, or a sentence whose suggestions work."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.cluster import Cluster, Node
from launcher.errors import BadRequest
from launcher.placement import CHIPS_PER_HOST, Devices, Topology, place


def site(gpus: int | None = 8, cpus: int = 96, nodes: int = 4, accelerator: str | None = None) -> Cluster:
    return Cluster("site", "slurm", nodes=nodes, node=Node(gpus, cpus, accelerator=accelerator))


LAPTOP = site(gpus=0, cpus=2, nodes=1)
EIGHT = site()
UNKNOWN = site(gpus=None, cpus=0, nodes=0)
ENDLESS = site(nodes=0)
TPUS = site(gpus=None, cpus=112, nodes=4, accelerator="v5e")


def gpus(count: int, nodes: int | None = None, **more: Any) -> Devices:
    return Devices("gpu", count, nodes, **more)


def cpus(count: int, nodes: int | None = None, **more: Any) -> Devices:
    return Devices("cpu", count, nodes, **more)


def tpus(count: int, nodes: int | None = None, **more: Any) -> Devices:
    return Devices("tpu", count, nodes, **{"accelerator": "v5e", **more})


@pytest.mark.parametrize(
    ("devices", "cluster", "nodes", "ranks", "cpus_per_rank", "why"),
    [
        (gpus(1), EIGHT, 1, 1, 12, "1 GPU = 1 node x 1 rank (1 of 8 GPUs a node)"),
        (gpus(3), EIGHT, 1, 3, 12, "3 of 8 GPUs a node"),
        (gpus(8), EIGHT, 1, 8, 12, "8 GPUs = 1 node x 8 ranks (whole nodes)"),
        (gpus(16), EIGHT, 2, 8, 12, "16 GPUs = 2 nodes x 8 ranks (whole nodes)"),
        (gpus(32), EIGHT, 4, 8, 12, "whole nodes"),
        (gpus(2, 2), EIGHT, 2, 1, 12, "1 of 8 GPUs a node"),
        (gpus(4, 2), EIGHT, 2, 2, 12, "4 GPUs = 2 nodes x 2 ranks"),
        (gpus(12, 2), EIGHT, 2, 6, 12, "6 of 8 GPUs a node"),
        (gpus(12, 3), EIGHT, 3, 4, 12, "4 of 8 GPUs a node"),
        (gpus(13, 13), ENDLESS, 13, 1, 12, "13 nodes x 1 rank"),
        (gpus(800), ENDLESS, 100, 8, 12, "100 nodes"),
        (gpus(5), UNKNOWN, 1, 5, 0, "the engine chooses the nodes"),
        (gpus(6, 3), UNKNOWN, 3, 2, 0, "the engine chooses the nodes"),
        (gpus(2), site(gpus=8, cpus=0), 1, 2, 0, "2 of 8 GPUs a node"),
        (gpus(3), site(gpus=3, cpus=32), 1, 3, 10, "whole nodes"),
        (gpus(1), site(gpus=1, cpus=1), 1, 1, 1, "whole nodes"),
        (cpus(1), LAPTOP, 1, 1, 1, "1 CPU rank of one core on 1 node"),
        (cpus(2), LAPTOP, 1, 2, 1, "2 CPU ranks of one core each on 1 node"),
        (cpus(4, 2), EIGHT, 2, 2, 1, "4 CPU ranks of one core each on 2 nodes"),
        (cpus(192), EIGHT, 2, 96, 1, "on 2 nodes"),
        (cpus(7), UNKNOWN, 1, 7, 1, "7 CPU ranks"),
        (cpus(6, 3), UNKNOWN, 3, 2, 1, "on 3 nodes"),
        (cpus(4, accelerator="h100"), EIGHT, 1, 4, 1, "4 CPU ranks"),
        (tpus(1), TPUS, 1, 1, 112, "1 v5e chip = 1 host x 1 rank"),
        (tpus(4), TPUS, 1, 4, 28, "4 v5e chips = 1 host x 4 ranks"),
        (tpus(8), TPUS, 1, 8, 14, "8 v5e chips = 1 host x 8 ranks"),
        (tpus(12), TPUS, 3, 4, 28, "3 hosts x 4 ranks"),
        (tpus(16), TPUS, 4, 4, 28, "16 v5e chips = 4 hosts x 4 ranks"),
        (tpus(16, 4), TPUS, 4, 4, 28, "4 hosts"),
        (tpus(16, topology="4x4"), TPUS, 4, 4, 28, "16 v5e chips = 4 hosts x 4 ranks"),
        (tpus(8, topology="2x4"), TPUS, 1, 8, 14, "1 host"),
        (tpus(8, topology="2x2"), TPUS, 2, 4, 28, "8 v5e chips = 2 hosts x 4 ranks"),
        (tpus(16, topology="2x2x1"), TPUS, 4, 4, 28, "4 hosts"),
        (tpus(16, accelerator=None), TPUS, 4, 4, 28, "16 v5e chips"),
        (tpus(8, accelerator="v4"), UNKNOWN, 2, 4, 0, "8 v4 chips = 2 hosts x 4 ranks"),
        (tpus(8, accelerator="v5p"), UNKNOWN, 2, 4, 0, "8 v5p chips = 2 hosts x 4 ranks"),
        (tpus(8, accelerator="v6e"), UNKNOWN, 1, 8, 0, "8 v6e chips = 1 host x 8 ranks"),
    ],
)
def test_what_is_placed(
    devices: Devices, cluster: Cluster, nodes: int, ranks: int, cpus_per_rank: int, why: str
) -> None:
    placement = place(devices, cluster)
    assert (placement.nodes, placement.ranks_per_node, placement.cpus_per_rank) == (nodes, ranks, cpus_per_rank)
    assert placement.world_size == devices.count
    assert placement.device == {"gpu": "cuda"}.get(devices.kind, devices.kind)
    assert why in placement.why


@pytest.mark.parametrize(
    ("devices", "cluster", "words"),
    [
        (gpus(12), EIGHT, "12 is not a whole number of nodes. Try --gpus 8 or --gpus 16 or --gpus 12 --nodes 2 (6 on"),
        (gpus(13), EIGHT, "13 is not a whole number of nodes. Try --gpus 8 or --gpus 16."),
        (gpus(13), ENDLESS, "Try --gpus 8 or --gpus 16 or --gpus 13 --nodes 13 (1 on each)."),
        (gpus(12), site(nodes=1), "Try --gpus 8."),
        (gpus(100), EIGHT, "the nodes of cluster 'site' have 8 GPUs each, and 100 is not"),
        (gpus(100), EIGHT, "Try --gpus 32."),
        (gpus(64), EIGHT, "64 GPUs on 8 nodes: cluster 'site' has 4 nodes and 32 GPUs. Try --gpus 32."),
        (gpus(40, 5), EIGHT, "40 GPUs on 5 nodes: cluster 'site' has 4 nodes and 32 GPUs. Try --gpus 32 --nodes 4"),
        (gpus(2, 5), EIGHT, "2 GPUs on 5 nodes: cluster 'site' has 4 nodes and 32 GPUs. Try --gpus 2 --nodes 2 (1 on"),
        (gpus(8), site(gpus=1, nodes=1), "8 GPUs on 8 nodes: cluster 'site' has 1 node and 1 GPU. Try --gpus 1."),
        (gpus(9, 5), site(gpus=None, nodes=4), "9 GPUs on 5 nodes: cluster 'site' has 4 nodes. Try --gpus 8 --nodes 4"),
        (gpus(10, 3), EIGHT, "10 does not divide by 3. Try --gpus 9 --nodes 3 (3 on each) or --gpus 12 --nodes 3"),
        (gpus(2, 3), EIGHT, "--gpus 2 --nodes 3: ranks are spread evenly and 2 does not divide by 3. Try --gpus 3 --"),
        (gpus(7, 2), UNKNOWN, "7 does not divide by 2. Try --gpus 6 --nodes 2 (3 on each) or --gpus 8 --nodes 2"),
        (gpus(31, 4), EIGHT, "Try --gpus 28 --nodes 4 (7 on each) or --gpus 32 --nodes 4 (8 on each)."),
        (gpus(16, 1), EIGHT, "16 GPUs a node: the nodes of cluster 'site' have 8. Try --gpus 16 --nodes 2 (8 on each)"),
        (gpus(17, 2), EIGHT, "9 GPUs a node: the nodes of cluster 'site' have 8. Try --gpus 24 --nodes 3"),
        (gpus(40, 1), EIGHT, "Try --gpus 8 --nodes 1 (8 on each)."),
        (gpus(1), LAPTOP, "the nodes of cluster 'site' have no GPUs (node.gpus in its profile says otherwise"),
        (gpus(8), LAPTOP, "`launch clusters` lists others. Try --cpus 2."),
        (gpus(8, 4), site(gpus=0, cpus=1), "Try --cpus 4 --nodes 4 (1 on each)."),
        (gpus(8), site(gpus=0, cpus=0), "Try --cpus 8."),
        (
            gpus(8, accelerator="h100"),
            site(accelerator="a100"),
            "--accelerator h100: the nodes of cluster 'site' have a100",
        ),
        (gpus(8, topology="2x4"), EIGHT, "--topology is the shape of a TPU slice; it goes with --tpus."),
        (cpus(8, topology="2x4"), EIGHT, "--topology is the shape of a TPU slice"),
        (cpus(4), LAPTOP, "4 CPUs on 2 nodes: cluster 'site' has 1 node and 2 CPUs. Try --cpus 2."),
        (cpus(3), LAPTOP, "--cpus 3: the nodes of cluster 'site' have 2 CPUs each"),
        (cpus(2, 2), LAPTOP, "2 CPUs on 2 nodes: cluster 'site' has 1 node and 2 CPUs. Try --cpus 2 --nodes 1 (2 on"),
        (cpus(1000), EIGHT, "have 96 CPUs each, and 1000 is not a whole number of nodes. Try --cpus 384."),
        (cpus(100, 1), EIGHT, "100 CPUs a node: the nodes of cluster 'site' have 96. Try --cpus 192 --nodes 2"),
        (cpus(3, 2), EIGHT, "3 does not divide by 2. Try --cpus 2 --nodes 2 (1 on each) or --cpus 4 --nodes 2"),
        (
            tpus(8, accelerator=None),
            UNKNOWN,
            "--tpus needs --accelerator with the generation: one of v4, v5p, v5e, v6e",
        ),
        (tpus(8, accelerator="h100"), UNKNOWN, "one of v4, v5p, v5e, v6e (got 'h100')."),
        (
            tpus(2),
            TPUS,
            "--tpus 2: 2 chips, but v5e comes as 1, 4, 8 chips on one host or in multiples of 4. Try --tpus 4",
        ),
        (tpus(1, accelerator="v4"), UNKNOWN, "--tpus 1: 1 chip, but v4 comes as 4 chips on one host"),
        (tpus(30), TPUS, "Try --tpus 16."),
        (tpus(64), TPUS, "--tpus 64: that is 16 hosts; cluster 'site' has 4. Try --tpus 16."),
        (tpus(64, topology="4x4"), TPUS, "that is 16 hosts; cluster 'site' has 4. Try --tpus 16."),
        (tpus(8, 3), TPUS, "--tpus 8 --nodes 3: 8 v5e chips are 1 host. Try --tpus 8 --nodes 1 (8 on each)."),
        (
            tpus(12, topology="2x4"),
            TPUS,
            "that slice has 8 chips and 12 is not a whole number of slices. Try --tpus 16.",
        ),
        (tpus(1, topology="4x4"), TPUS, "Try --tpus 16."),
        (tpus(9, topology="3x3"), TPUS, "--topology 3x3: 9 chips, but v5e comes as 1, 4, 8 chips on one host"),
        (tpus(8, topology="8"), TPUS, "--topology '8': write chips along each axis, such as 4x4 or 2x2x2."),
    ],
)
def test_what_is_refused(devices: Devices, cluster: Cluster, words: str) -> None:
    with pytest.raises(BadRequest) as refused:
        place(devices, cluster)
    assert words in str(refused.value)


@pytest.mark.parametrize("text", ["", "4", "x", "4x", "0x4", "4x4x4x4", "4X4", "-4x4", "4x4\n", "4 x 4", "٤x4"])
def test_a_topology_is_two_or_three_numbers(text: str) -> None:
    with pytest.raises(BadRequest, match="write chips along each axis"):
        Topology.parse(text)


def test_a_topology_prints_as_it_is_written() -> None:
    assert (str(Topology.parse("2x4x16")), Topology.parse("2x4x16").chips) == ("2x4x16", 128)


def test_an_absurd_request_is_answered_at_once() -> None:
    with pytest.raises(BadRequest, match="not a whole number of nodes"):
        place(gpus(1_000_000_007), ENDLESS)


small = st.integers(1, 40)
requests = st.builds(
    Devices,
    st.sampled_from(["cpu", "gpu", "tpu"]),
    st.one_of(small, st.integers(1, 10_000)),
    st.none() | small,
    st.sampled_from([None, *CHIPS_PER_HOST]),
    st.sampled_from([None, None, "1x1", "2x2", "3x3", "2x4", "4x4", "2x2x2"]),
)
clusters = st.builds(
    lambda gpus, cpus, nodes: site(gpus, cpus, nodes),
    st.none() | st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
)


@settings(deadline=None, derandomize=True, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(requests, clusters)
def test_every_suggestion_works_when_it_is_typed(devices: Devices, cluster: Cluster) -> None:
    """A suggestion replaces the options it names; the rest of the command line stays."""
    try:
        placement = place(devices, cluster)
    except BadRequest as refused:
        _, _, tail = str(refused).partition(" Try ")
        suggestions = re.findall(r"--(cpu|gpu|tpu)s (\d+)(?: --nodes (\d+))?", tail)
        assert bool(tail) == bool(suggestions)
        for kind, count, nodes in suggestions:
            typed = replace(devices, kind=kind, count=int(count), nodes=int(nodes) if nodes else devices.nodes)
            assert place(typed, cluster).world_size == int(count)
    else:
        assert placement.world_size == devices.count
        assert placement.nodes == (devices.nodes or placement.nodes)
        assert not cluster.nodes or placement.nodes <= cluster.nodes
