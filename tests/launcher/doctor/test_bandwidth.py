"""The schedule of bandwidth measurements; `test_on_nodes` measures on a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from launcher.doctor import bandwidth, on_nodes
from launcher.doctor.bandwidth import MOST_ROUNDS, spread, tournament
from training.context import Context
from training.distributed.world import World


@pytest.mark.parametrize("nodes", range(2, 18))
def test_each_two_nodes_meet_once_and_nobody_is_in_two_places(nodes: int) -> None:
    rounds = tournament(nodes)
    assert len(rounds) == nodes - 1 + nodes % 2
    assert sorted(pair for meetings in rounds for pair in meetings) == list(combinations(range(nodes), 2))
    for meetings in rounds:
        busy = [node for pair in meetings for node in pair]
        assert len(busy) == len(set(busy)) == nodes - nodes % 2


@pytest.mark.parametrize("nodes", [1, 2, 3, 16, 17, 64, 1000])
def test_a_large_allocation_is_measured_in_a_part_of_the_rounds(nodes: int) -> None:
    rounds = tournament(nodes)
    chosen = spread(rounds, MOST_ROUNDS)
    assert len(chosen) == min(len(rounds), MOST_ROUNDS)
    if nodes <= MOST_ROUNDS + 1:
        assert chosen == rounds
    pairs = [pair for meetings in chosen for pair in meetings]
    assert len(set(pairs)) == len(pairs)


def test_one_node_has_nobody_to_talk_to(tmp_path: Path) -> None:
    with Context(tmp_path, World()) as ctx:
        assert (bandwidth.speed(ctx), bandwidth.pairs(ctx)) == ({}, {})


# Traffic of a machine to its own addresses passes the loopback device.
NETWORK = """
set -e
ip link set lo up
ip link add far type veth peer name nowhere
ip addr add 10.9.0.4/32 dev far
ip link set far up
tc qdisc add dev lo root handle 1: htb r2q 1000
tc class add dev lo parent 1: classid 1:4 htb rate 80mbit
tc filter add dev lo parent 1: protocol ip u32 match ip dst 10.9.0.4/32 flowid 1:4
tc filter add dev lo parent 1: protocol ip u32 match ip src 10.9.0.4/32 flowid 1:4
exec "$@"
"""

RANKS = """
import json, os, sys
import torch.distributed
from launcher.doctor import bandwidth
from training.context import Context
from training.distributed.world import World

pids = []
for rank in range(4):
    if pid := os.fork():
        pids.append(pid)
        continue
    os.environ["GLOO_SOCKET_IFNAME"] = "far" if rank == 3 else "lo"
    world = World(rank=rank, node_rank=rank, world_size=4, num_nodes=4, master_addr="127.0.0.1", master_port=29400, threads=1)
    with Context(sys.argv[1], world) as ctx:
        found = bandwidth.pairs(ctx)
    if rank == 0:
        print(json.dumps(found), flush=True)
    os._exit(0)
sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))
"""


@pytest.mark.slow
def test_a_node_behind_a_slow_link_is_slow_with_every_other(tmp_path: Path) -> None:
    """Four ranks in a network namespace; the kernel limits the last one to 10 MB/s in both directions."""
    ranks = [sys.executable, "-P", "-c", RANKS, str(tmp_path)]
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", NETWORK, "sh", *ranks],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rates: dict[tuple[int, ...], float] = {tuple(p["nodes"]): p["bytes_per_second"] for p in found["pairs"]}
    assert sorted(rates) == list(combinations(range(4), 2))
    assert all(rate < 12e6 for pair, rate in rates.items() if 3 in pair), rates
    nodes: list[dict[str, Any]] = [{"node": n, "host": f"n{n}"} for n in range(4)]
    verdict = on_nodes.of_pairs(found | {"nodes": nodes})
    assert not verdict.ok, rates
    assert "the links of n3, which they have in common" in verdict.remedy
