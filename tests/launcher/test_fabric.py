"""Who is measured with whom, and when; the measuring itself is tested on a cluster (`test_doctor_nodes`) and over gloo."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from launcher import fabric
from launcher.fabric import MOST_ROUNDS, spread, tournament
from training.context import Context
from training.world import World


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
        assert (fabric.speed(ctx), fabric.pairs(ctx)) == ({}, {})
