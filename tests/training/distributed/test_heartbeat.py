from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import pytest

from training.context import Context
from training.distributed.heartbeat import IDLE, SLOT, STARTING, TRAINING, Heartbeat, Reading
from training.distributed.world import World


def shared(slots: int) -> int:
    """The file descriptor of shared memory for `slots` heartbeats."""
    descriptor = os.memfd_create("pulses")
    os.ftruncate(descriptor, slots * SLOT)
    return descriptor


def test_another_process_reads_what_a_rank_says() -> None:
    descriptor = shared(2)
    watched = [Heartbeat(mmap.mmap(descriptor, 0), slot) for slot in range(2)]
    assert watched[0].read() == Reading(step=-1, phase=STARTING, age=0.0)
    child = os.fork()
    if not child:
        Heartbeat.of(descriptor, 1).beat(7)
        os._exit(0)
    os.waitpid(child, 0)
    said = watched[1].read()
    assert (said.step, said.phase) == (7, TRAINING)
    assert 0 <= said.age < 60
    assert watched[0].read().step == -1, "each rank has a slot of its own"
    watched[1].clear()
    assert watched[1].read() == Reading()
    os.close(descriptor)


def test_a_phase_is_over_when_its_block_is() -> None:
    heartbeat = Heartbeat()
    heartbeat.beat(3)
    with heartbeat.phase("evaluating"):
        assert heartbeat.read().phase == "evaluating"
        with heartbeat.phase("a name that is longer than sixteen letters"):
            assert heartbeat.read().phase == "a name that is l"
    assert (heartbeat.read().step, heartbeat.read().phase) == (3, TRAINING)


def test_after_the_loop_a_rank_is_idle_until_its_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat()
    heartbeat.beat(3)
    heartbeat.idle()
    assert (heartbeat.read().step, heartbeat.read().phase) == (3, IDLE)
    heartbeat.beat()
    assert heartbeat.read().phase == IDLE
    heartbeat.beat(4)
    assert (heartbeat.read().step, heartbeat.read().phase) == (4, TRAINING)
    monkeypatch.setattr(Heartbeat, "of_process", heartbeat)
    with Context(tmp_path, World()) as ctx:
        assert ctx.heartbeat is heartbeat, "that of the launcher"


def test_the_age_grows_until_the_rank_moves() -> None:
    heartbeat = Heartbeat()
    heartbeat.beat(1)
    time.sleep(0.02)
    before = heartbeat.read().age
    assert before >= 0.02
    heartbeat.beat()
    assert heartbeat.read().age < before
    assert heartbeat.read().step == 1, "a move that names no step leaves the step as it was"


def test_who_only_logs_its_steps_is_known_by_them_and_not_watched(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    with Context(tmp_path, World(), heartbeat=heartbeat) as ctx:
        ctx.log(8, loss=1.0)
        assert (heartbeat.read().step, heartbeat.read().phase) == (8, STARTING)


def test_a_log_says_nothing_of_the_step_of_a_rank_that_does_so_itself(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    with Context(tmp_path, World(), heartbeat=heartbeat) as ctx:
        ctx.should_stop(5)
        ctx.log(6, loss=1.0)  # otherwise rank 0 would be ahead
        assert heartbeat.read().step == 5


def test_every_call_of_should_stop_is_a_beat(tmp_path: Path) -> None:
    heartbeat = Heartbeat()
    with Context(tmp_path, World(), heartbeat=heartbeat) as ctx:
        assert (heartbeat.read().step, heartbeat.read().phase) == (0, STARTING)
        ctx.should_stop(5)
        assert heartbeat.read().step == 5
        with ctx.phase("saving"):
            assert heartbeat.read().phase == "saving"
