"""TPU slices, and the variables of their processes compared with those of torch_tpu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.config.cluster import Cluster, NodeKind
from launcher.errors import BadRequest
from launcher.request.placement.devices import Devices, Placement
from launcher.request.placement.place import place
from launcher.request.placement.tpu import (
    CHIPS_PER_HOST,
    Topology,
    environment_of,
    hosts_of,
    slice_of,
    slices,
    tpu_environment,
)

PEER = Path(__file__).parents[2] / "peers" / "torch_tpu_env.py"
SOURCE = Path(sys.prefix) / "peers"  # `make setup` writes the Python files of torch_tpu there


@pytest.mark.parametrize(
    ("generation", "chips", "shape", "hosts"),
    [
        ("v5e", 1, "1x1", 1),
        ("v5e", 4, "2x2", 1),
        ("v5e", 8, "2x4", 1),
        ("v5e", 16, "4x4", 4),
        ("v6e", 256, "16x16", 64),
        ("v4", 4, "2x2x1", 1),
        ("v4", 8, "2x2x2", 2),
        ("v4", 64, "4x4x4", 16),
        ("v5p", 128, "4x4x8", 32),
        ("v5p", 512, "8x8x8", 128),
        ("v5e", 12, None, 0),
        ("v5e", 512, None, 0),
        ("v4", 12, None, 0),
        ("v4", 1, None, 0),
    ],
)
def test_the_slice_of_so_many_chips(generation: str, chips: int, shape: str | None, hosts: int) -> None:
    found = slice_of(generation, chips)
    assert (str(found) if found else None) == shape
    if found:
        assert found.exists(generation)
        assert hosts_of(generation, chips, chips) == hosts
        assert hosts_of(generation, chips, 3 * chips) == 3 * hosts, "three slices"


@pytest.mark.parametrize("generation", CHIPS_PER_HOST)
def test_slices_are_listed_by_size(generation: str) -> None:
    found = list(slices(generation))
    assert [s.chips for s in found] == sorted(s.chips for s in found)
    assert all(s.exists(generation) for s in found)


@pytest.mark.parametrize(
    ("generation", "text", "there"),
    [
        ("v5e", "4x4x1", True),
        ("v5e", "4x4x4", False),
        ("v5e", "4x2", False),
        ("v5e", "3x3", False),
        ("v4", "2x2", False),
        ("v4", "4x4x12", True),
        ("v4", "4x4x6", False),
        ("v4", "8x4x4", False),
        ("v4", "2x4x4", True),
    ],
)
def test_which_shapes_exist(generation: str, text: str, there: bool) -> None:
    assert Topology.parse(text).exists(generation) is there


def addresses(*hosts: str, chips: int = 4) -> str:
    return ",".join(f"{host}:{8070 + n}" for host in hosts for n in range(chips))


FOUR = ("t0", "t1", "t2", "t3")
# hosts, chips per host, topology, node; result of torch_tpu 0.2.0
ROWS = [
    (
        ("localhost:7001",),
        1,
        "1x1",
        0,
        {"TORCH_TPU_SLICEBUILDER_ADDRESSES": "localhost:7001", "TORCH_TPU_TOPOLOGY": "1,1,1"},
    ),
    (
        tuple(f"localhost:{7001 + n}" for n in range(4)),
        4,
        "2x2",
        0,
        {
            "TORCH_TPU_SLICEBUILDER_ADDRESSES": "localhost:7001,localhost:7002,localhost:7003,localhost:7004",
            "TORCH_TPU_TOPOLOGY": "2,2,1",
        },
    ),
    (
        tuple(f"localhost:{7001 + n}" for n in range(8)),
        8,
        "2x4",
        0,
        {
            "TORCH_TPU_SLICEBUILDER_ADDRESSES": ",".join(f"localhost:{7001 + n}" for n in range(8)),
            "TORCH_TPU_TOPOLOGY": "2,4,1",
        },
    ),
    (FOUR, 4, "4x4", 0, {"TORCH_TPU_SLICEBUILDER_ADDRESSES": addresses(*FOUR), "NNODES": "4", "NODE_RANK": "0"}),
    (FOUR, 4, "4x4", 3, {"TORCH_TPU_SLICEBUILDER_ADDRESSES": addresses(*FOUR), "NNODES": "4", "NODE_RANK": "3"}),
    (
        ("10.0.0.1", "10.0.0.2"),
        4,
        "2x2x2",
        1,
        {"TORCH_TPU_SLICEBUILDER_ADDRESSES": addresses("10.0.0.1", "10.0.0.2"), "NNODES": "2", "NODE_RANK": "1"},
    ),
]


@pytest.mark.parametrize(("hosts", "chips", "topology", "node", "expected"), ROWS)
def test_what_processes_start_with(
    hosts: tuple[str, ...], chips: int, topology: str, node: int, expected: Mapping[str, str]
) -> None:
    found = tpu_environment(hosts, chips, topology, node, "session")
    assert found.pop("TORCH_TPU_XPROF_SESSION_ID") == "session"
    if "NNODES" in expected:  # torch_tpu uses the topology of several hosts unchanged
        axes = [*topology.split("x"), "1"][:3]
        assert found.pop("TORCH_TPU_TOPOLOGY") == ",".join(axes)
    assert found == expected


@pytest.mark.skipif(not (SOURCE / "torch_tpu").is_dir(), reason=f"the Python files of torch_tpu are not in {SOURCE}")
@pytest.mark.parametrize(("hosts", "chips", "topology", "node", "expected"), ROWS)
def test_torch_tpu_itself_would_set_the_same(
    hosts: tuple[str, ...], chips: int, topology: str, node: int, expected: Mapping[str, str]
) -> None:
    variables, arguments = dict(os.environ), {"nproc_per_node": chips}
    found = tpu_environment(hosts, chips, topology, node, "session")
    if "NNODES" in expected:
        variables |= {"TPU_WORKER_HOSTNAMES": ",".join(hosts), "JOB_COMPLETION_INDEX": str(node)}
        variables["TORCH_TPU_TOPOLOGY"] = found.pop("TORCH_TPU_TOPOLOGY")
        arguments["nnodes"] = len(hosts)
    command = [sys.executable, str(PEER), str(SOURCE), str(chips), json.dumps(arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout)
    # The rendezvous address is the launcher's: the agent holds a port for it.
    assert {k: v for k, v in theirs.items() if not k.startswith("MASTER_")} == expected
    found.pop("TORCH_TPU_XPROF_SESSION_ID")
    assert found == expected


def test_the_hosts_of_several_slices_follow_each_other() -> None:
    placement = Placement(4, 4, "tpu", topology="2x2x2")
    hosts = ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")
    found = environment_of(placement, hosts, node=3, chip=2, session="s")
    slice_of_it = tpu_environment(hosts[2:], 4, "2x2x2", 1, "s")
    assert found == slice_of_it | {
        "TPU_WORKER_HOSTNAMES": "10.0.0.3,10.0.0.4",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:8081",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_PORT": "8083",
    }


def test_a_single_chip_is_a_slice() -> None:
    found = environment_of(Placement(1, 1, "xla"), ("127.0.0.1",), 0, 0, "s")
    assert found["TORCH_TPU_TOPOLOGY"] == "1,1,1"
    assert found["TORCH_TPU_SLICEBUILDER_ADDRESSES"] == "127.0.0.1:8070"


def test_hosts_that_are_all_down_hold_no_slice() -> None:
    kinds = (NodeKind(0, None, 4, accelerator="v5e", down=1),) * 2
    with pytest.raises(BadRequest, match=r"that is 1 host; cluster 'site' has 0 \(2 more down or drained\)\.$"):
        place(Devices("tpu", 1, None, "v5e", None), Cluster("site", "slurm", kinds=kinds))
