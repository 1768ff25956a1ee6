"""A few kill schedules; all of them are ``python -m tests.chaos --kills function`` (or trainer)."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos import kills
from tests.chaos.kills import SIZES, Harness, Tally
from tests.chaos.moments import Killer, Moment
from tests.training.ranks import serving, spawn
from training.distributed.world import World
from training.files import append_line


@pytest.fixture(scope="module", autouse=True)
def _rank_server() -> Iterator[None]:
    with serving(kills.PRELOAD):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(("target", "number", "changing"), [("function", 2, True), ("trainer", 1, False)])
def test_killed_ends_as_if_never_killed(tmp_path: Path, target: str, number: int, changing: bool) -> None:
    tally = Harness(tmp_path, target, 1).play(number, changing=changing)
    assert tally.mismatches == []
    assert tally.kills.total() > 0


def test_the_seed_decides_and_every_kind_occurs() -> None:
    drawn = [Moment.draw(random.Random(seed), 4, 21) for seed in range(100)]
    assert drawn == [Moment.draw(random.Random(seed), 4, 21) for seed in range(100)]
    assert {moment.kind for moment in drawn} == {"step", "save", "epoch"}
    assert {moment.victims for moment in drawn} >= {(0,), (3,), (0, 1, 2, 3)}
    assert {moment.alone for moment in drawn} == {True, False}


def writer(world: World, run_dir: Path, until_killed: bool) -> str:
    """Logs steps, the last one at an epoch's end, and makes a checkpoint in three changes."""
    if world.rank == 0:
        for step in range(1, 5):
            append_line(run_dir / "metrics.jsonl", {"step": step, "loss": 1.0, "epoch": step / 4})
        (run_dir / "checkpoints" / ".step-1.staging").mkdir()
        (run_dir / "checkpoints" / ".step-1.staging").rename(run_dir / "checkpoints" / "step-1")
    while until_killed:
        time.sleep(0.05)
    return "ended"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count", "reached"),
    [("step", 4, True), ("step", 5, False), ("save", 2, True), ("epoch", 1, True), ("epoch", 2, False)],
)
def test_ranks_are_killed_at_the_moment(tmp_path: Path, kind: str, count: int, reached: bool) -> None:
    killer = Killer(tmp_path, tmp_path / "checkpoints", Moment(kind, count, (1,), False))
    results = spawn(writer, 2, tmp_path, reached, watch=killer)
    assert killer.struck == reached
    assert results == ([None, None] if reached else ["ended", "ended"])


def test_samples_that_count_twice_and_steps_that_are_missing_are_found(tmp_path: Path) -> None:
    harness = Harness(tmp_path, "function", 1)
    harness.target = replace(kills.TARGETS["function"], steps=2, samples=4, epochs=1)

    def record(step: int, ids: list[int], life: float) -> None:
        append_line(tmp_path / "metrics.jsonl", {"step": step, "loss": 1.0})
        append_line(
            tmp_path / "events.jsonl", {"event": "ids", "rank": 0, "step": step, "epoch": 0, "ids": ids, "life": life}
        )

    record(1, [0, 1], 1.0)
    with pytest.raises(AssertionError, match="not all steps were done"):
        harness._check(tmp_path, None)
    record(2, [1, 3], 1.0)
    with pytest.raises(AssertionError, match=r"epoch 0: \[0, 1, 1, 3\]"):
        harness._check(tmp_path, None)
    record(2, [2, 3], 2.0)  # the step was done again after a kill
    harness._check(tmp_path, None)


def test_the_table() -> None:
    tally = Tally(3, mismatches=["schedule 2: x"], seconds=12.3)
    tally.kills.update(["save", "save", "epoch"])
    assert tally.line("function", "1, 2, 4").split() == ["function", "1,", "2,", "4", "3", "0", "2", "1", "1", "12"]
    assert SIZES == (1, 2, 4)
