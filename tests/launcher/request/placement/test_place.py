"""place(): requested devices and existing nodes -> nodes x ranks, or an error with valid suggestions."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config.cluster import Cluster, Node, NodeKind
from launcher.errors import BadRequest
from launcher.request.placement.place import Devices, place
from launcher.request.placement.tpu import CHIPS_PER_HOST, Topology


def site(gpus: int | None = 8, cpus: int = 96, nodes: int = 4, accelerator: str | None = None) -> Cluster:
    return Cluster("site", "slurm", nodes=nodes, node=Node(gpus, cpus, accelerator=accelerator))


LAPTOP = site(gpus=0, cpus=2, nodes=1)
EIGHT = site()
UNKNOWN = site(gpus=None, cpus=0, nodes=0)
ENDLESS = site(nodes=0)
TPUS = site(gpus=None, cpus=112, nodes=4, accelerator="v5e")

BIG = NodeKind(2, 8, 32, 64.0, "h100", names="big1,big2")
SMALL = NodeKind(2, 4, 16, 32.0, "a100", names="small1,small2")
PLAIN = NodeKind(3, 0, 16, 20.0)


def mixed(*kinds: NodeKind) -> Cluster:
    return Cluster("site", "slurm", kinds=kinds)


MIXED = mixed(BIG, SMALL, PLAIN)
SPELT = mixed(replace(BIG, accelerator="nvidia_h100_80gb_hbm3"), replace(SMALL, accelerator="NVIDIA-A100-SXM4-40GB"))
FEATURED = mixed(
    replace(BIG, accelerator=None, features=("ib", "h100")), replace(SMALL, accelerator=None, features=("a100",))
)
SIZES = mixed(replace(BIG, accelerator="a100"), SMALL)  # one type, two sizes of nodes
HALF_DOWN = mixed(replace(BIG, count=1, down=1), SMALL)
ALL_DOWN = mixed(replace(BIG, count=0, down=2), replace(SMALL, count=0, down=2))
SLICED = mixed(replace(BIG, accelerator="1g.10gb", gpus=7))


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
    ("devices", "cluster", "shape", "gpu_type", "why"),
    [
        (
            gpus(4),
            MIXED,
            (1, 4, 4, 32),
            "a100",
            "(whole nodes; on a100: whole nodes before parts of larger ones; --accel",
        ),
        (
            gpus(8),
            MIXED,
            (1, 8, 4, 64),
            "h100",
            "(whole nodes; on h100: the fewest nodes; --accelerator a100 chooses the",
        ),
        (
            gpus(2),
            MIXED,
            (1, 2, 4, 16),
            "a100",
            "(2 of 4 GPUs a node; on a100: the smaller nodes that hold them; --acc",
        ),
        (gpus(1), MIXED, (1, 1, 4, 8), "a100", "(1 of 4 GPUs a node; on a100: the smaller nodes"),
        (gpus(6), MIXED, (1, 6, 4, 48), "h100", "(6 of 8 GPUs a node; on h100, the only nodes that hold them)"),
        (gpus(16), MIXED, (2, 8, 4, 64), "h100", "16 GPUs = 2 nodes x 8 ranks (whole nodes; on h100, the only nodes"),
        (gpus(4, accelerator="h100"), MIXED, (1, 4, 4, 32), "h100", "(4 of 8 GPUs a node; on h100)"),
        (
            gpus(8, accelerator="a100"),
            MIXED,
            (2, 4, 4, 32),
            "a100",
            "8 GPUs = 2 nodes x 4 ranks (whole nodes; on a100)",
        ),
        (gpus(8, 2), MIXED, (2, 4, 4, 32), "a100", "(whole nodes; on a100: whole nodes before parts of larger ones"),
        (gpus(12, 2), MIXED, (2, 6, 4, 48), "h100", "(6 of 8 GPUs a node; on h100, the only nodes"),
        (gpus(4, 2, accelerator="h100"), MIXED, (2, 2, 4, 16), "h100", "(2 of 8 GPUs a node; on h100)"),
        (
            gpus(16, 4),
            MIXED,
            (4, 4, 4, 32),
            None,
            "(4 of 4/8 GPUs a node; h100 and a100 mixed: no kind alone has 4 such",
        ),
        (gpus(3, 3), MIXED, (3, 1, 4, 8), None, "h100 and a100 mixed: no kind alone has 3 such nodes"),
        (gpus(16, 4), SIZES, (4, 4, 4, 32), None, "16 GPUs = 4 nodes x 4 ranks (4 of 4/8 GPUs a node; on a100"),
        (gpus(8), SIZES, (1, 8, 4, 64), None, "(whole nodes; on a100: the fewest nodes"),
        (gpus(8, accelerator="h100"), SPELT, (1, 8, 4, 64), "nvidia_h100_80gb_hbm3", "on nvidia_h100_80gb_hbm3"),
        (gpus(4, accelerator="a100"), SPELT, (1, 4, 4, 32), "NVIDIA-A100-SXM4-40GB", "whole nodes"),
        (gpus(8, accelerator="H100"), MIXED, (1, 8, 4, 64), "h100", "whole nodes"),
        (gpus(8, accelerator="h100"), FEATURED, (1, 8, 4, 64), None, "on h100"),
        (gpus(8), HALF_DOWN, (1, 8, 4, 64), "h100", "on h100: the fewest nodes"),
        (gpus(3, accelerator="1g.10gb"), SLICED, (1, 3, 4, 27), "1g.10gb", "3 of 7 GPUs a node"),
        (cpus(4), MIXED, (1, 4, 1, 5), None, "4 CPU ranks of one core each on 1 node"),
        (cpus(48), MIXED, (3, 16, 1, 20), None, "48 CPU ranks of one core each on 3 nodes"),
        (cpus(7, 7), MIXED, (7, 1, 1, 1), None, "7 CPU ranks of one core each on 7 nodes"),
        (cpus(20, 1), MIXED, (1, 20, 1, 40), None, "20 CPU ranks of one core each on 1 node"),
    ],
)
def test_what_is_placed_on_mixed_nodes(
    devices: Devices, cluster: Cluster, shape: tuple[int, int, int, int], gpu_type: str | None, why: str
) -> None:
    """`shape`: nodes, ranks per node, cores per rank, memory per node."""
    placement = place(devices, cluster)
    found = (placement.nodes, placement.ranks_per_node, placement.cpus_per_rank, int(placement.memory_gb))
    assert (found, placement.gpu_type) == (shape, gpu_type)
    assert why in placement.why
    assert placement.feature == (devices.accelerator if cluster is FEATURED else None)


@pytest.mark.parametrize(
    ("devices", "cluster", "words"),
    [
        (
            gpus(12),
            MIXED,
            "--gpus 12: cluster 'site' has 2 nodes with 8 h100 GPUs, 2 nodes with 4 a100 GPUs, and 12 is no whole number",
        ),
        (
            gpus(12),
            MIXED,
            "is no whole number of nodes of one kind. Try --gpus 8 or --gpus 16 or --gpus 12 --nodes 2 (6 on each).",
        ),
        (gpus(24), MIXED, "and 24 is no whole number of nodes of one kind. Try --gpus 16."),
        (gpus(32), MIXED, "32 is no whole number of nodes of one kind. Try --gpus 16."),
        (
            gpus(12, accelerator="a100"),
            MIXED,
            "12 GPUs on 3 nodes: cluster 'site' has 2 nodes and 8 GPUs. Try --gpus 8.",
        ),
        (gpus(6, accelerator="a100"), MIXED, "Try --gpus 4 or --gpus 8 or --gpus 6 --nodes 2 (3 on each)."),
        (
            gpus(8, accelerator="v100"),
            MIXED,
            "--accelerator v100: the nodes of cluster 'site' have a100 and h100.",
        ),
        (gpus(8, accelerator="mi300"), MIXED, "--accelerator mi300: the nodes of cluster 'site' have a100 and h100."),
        (
            gpus(40, 5),
            MIXED,
            "40 GPUs on 5 nodes: cluster 'site' has 4 nodes and 24 GPUs. Try --gpus 16 --nodes 4 (4 on",
        ),
        (
            gpus(15, 3),
            MIXED,
            "that is 5 a node, and too few nodes of cluster 'site' have as many: it has 2 nodes with 8",
        ),
        (gpus(15, 3), MIXED, "Try --gpus 12 --nodes 3 (4 on each)."),
        (
            gpus(18, 2),
            MIXED,
            "9 GPUs a node: the nodes of cluster 'site' have at most 8. Try --gpus 16 --nodes 2 (8 on",
        ),
        (
            gpus(7, 2),
            MIXED,
            "7 does not divide by 2. Try --gpus 6 --nodes 2 (3 on each) or --gpus 8 --nodes 2 (4 on each).",
        ),
        (
            gpus(16),
            HALF_DOWN,
            "2 nodes with 4 a100 GPUs, and 16 is no whole number of nodes of one kind. Try --gpus 8.",
        ),
        (gpus(16), HALF_DOWN, "1 node with 8 h100 GPUs (1 more is down or drained), 2 nodes with 4"),
        (gpus(16, accelerator="h100"), HALF_DOWN, "has 1 node and 8 GPUs (1 more is down or drained). Try --gpus 8."),
        (gpus(8), ALL_DOWN, "has 0 nodes with 8 h100 GPUs (2 more are down or drained), 0 nodes with 4 a100"),
        (gpus(8, 1), ALL_DOWN, "8 GPUs on 1 node: cluster 'site' has 0 nodes and 0 GPUs (4 more are down or drained)."),
        (gpus(1), mixed(PLAIN), "--gpus 1: the nodes of cluster 'site' have no GPUs"),
        (cpus(200), MIXED, "and 200 is no whole number of nodes of one kind. Try --cpus 64"),
        (
            cpus(8, 8),
            MIXED,
            "8 CPUs on 8 nodes: cluster 'site' has 7 nodes and 144 CPUs. Try --cpus 7 --nodes 7 (1 on each).",
        ),
        (cpus(66, 2), MIXED, "33 CPUs a node: the nodes of cluster 'site' have at most 32. Try --cpus 64 --nodes 2"),
        (
            tpus(12),
            TPUS,
            "--tpus 12: v5e has no slice of 12 chips; it comes as 1, 4, 8, 16, 32, 64, 128, 256. Try --tpus 8",
        ),
        (
            tpus(12, accelerator="v4"),
            UNKNOWN,
            "it comes as 4, 8, 16, 32, 64, 128, 192, 256 and more. Try --tpus 8 or --",
        ),
        (
            tpus(24, accelerator="v5p", topology="2x3x4"),
            UNKNOWN,
            "--topology 2x3x4: v5p has no slices of that shape; it",
        ),
        (
            tpus(16, accelerator="v4", topology="4x4"),
            UNKNOWN,
            "--topology 4x4: v4 has no slices of that shape; it has 2x2x1",
        ),
        (tpus(3, 1), TPUS, "Try --tpus 1 --nodes 1 (1 on each) or --tpus 4 --nodes 1 (4 on each)."),
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
            "--tpus 2: v5e has no slice of 2 chips; it comes as 1, 4, 8, 16, 32, 64, 128, 256. Try --tpus 1 or --tpus 4.",
        ),
        (
            tpus(1, accelerator="v4"),
            UNKNOWN,
            "--tpus 1: v4 has no slice of 1 chip; it comes as 4, 8, 16, 32, 64, 128, 192, 256 and more. Try --tpus 4.",
        ),
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
        (tpus(9, topology="3x3"), TPUS, "--topology 3x3: v5e has no slices of that shape; it has 1x1, 2x2, 2x4, 4x4"),
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
node_kinds = st.builds(
    NodeKind,
    st.integers(0, 5),
    st.none() | st.integers(0, 9),
    st.integers(0, 9),
    accelerator=st.sampled_from([None, "h100", "a100"]),
    down=st.integers(0, 2),
)
clusters = st.builds(
    lambda gpus, cpus, nodes: site(gpus, cpus, nodes),
    st.none() | st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 9),
) | st.builds(mixed, node_kinds, node_kinds, node_kinds)


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
        known = all(kind.count or kind.down for kind in cluster.kinds)
        assert not cluster.kinds or not known or placement.nodes <= sum(kind.count for kind in cluster.kinds)
