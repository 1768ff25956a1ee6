from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from launcher.agent.hangs.detection import HangDetector, RankStatus, StackLocation, find_culprit, stack_location_of
from launcher.agent.protocol import Heartbeats
from launcher.lifecycle.exit_status import advice
from launcher.rank.messages import decode, encode
from training.distributed.heartbeat import CONNECTING, STARTING

WAITS, ELSEWHERE = StackLocation("train.py:9 in step", True), StackLocation("train.py:5 in load", False)


def trained(hang_after: float = 10.0, gap: float = 1.0, steps: int = 3) -> tuple[HangDetector, float]:
    """A detector after `steps` steps of `gap` seconds, and the time after them."""
    watch, now = HangDetector(hang_after), 0.0
    for step in range(steps):
        now = step * gap
        assert not watch.see({0: RankStatus(step, "training", 0.0), 1: RankStatus(step, "training", 0.0)}, now)
    return watch, now


def hung(watch: HangDetector, now: float, seconds: float, *phases: str, states: str = "SS") -> bool:
    """Whether the run counts as hung after `seconds` without progress, checked about every second."""

    def beats(age: float) -> dict[int, RankStatus]:
        both = zip(phases or ("training", "training"), states, strict=True)
        return {rank: RankStatus(2, phase, age, state) for rank, (phase, state) in enumerate(both)}

    for second in range(1, int(seconds)):
        assert not watch.see(beats(float(second)), now + second)
    return watch.see(beats(seconds), now + seconds)


def test_silence_for_longer_than_the_limit_is_a_hang() -> None:
    assert not hung(*trained(), 9.9)
    assert hung(*trained(), 10.1)


def connecting(age: float, other: str = CONNECTING, other_age: float | None = None) -> dict[int, RankStatus]:
    return {0: RankStatus(0, CONNECTING, age), 1: RankStatus(0, other, age if other_age is None else other_age)}


def test_ranks_that_connect_have_the_time_of_a_step_once_all_of_them_do() -> None:
    watch = HangDetector(10.0)
    assert not watch.see(connecting(9.0), 9.0)
    assert watch.see(connecting(11.0), 11.0)
    watch = HangDetector(10.0)
    for second in range(1, 1000):
        assert not watch.see(connecting(float(second), STARTING, 0.0), float(second)), "the other one may load data"
    assert not watch.see(connecting(1000.0, CONNECTING, 1.0), 1000.0), "the last one has just begun to connect"
    assert watch.see(connecting(1010.0, CONNECTING, 11.0), 1010.0)


def test_no_rank_is_to_blame_where_all_wait_to_connect() -> None:
    places = {0: StackLocation("train.py:7 in main", waiting=True)}
    rank, text = find_culprit(connecting(11.0), places)
    assert (rank, text) == (None, "the 2 ranks did not connect to each other: rank 0 at train.py:7 in main, rank 1")
    assert "GLOO_SOCKET_IFNAME" in advice("hung", text)


def test_slow_steps_are_learned() -> None:
    watch = HangDetector(10.0)
    for now in range(41):
        step = now // 20
        watch.see({0: RankStatus(step, "training", now % 20), 1: RankStatus(step, "training", now % 20)}, float(now))
    assert not hung(watch, 40.0, 59.0)
    assert hung(watch, 40.0 + 59.0, 61.0)


@pytest.mark.parametrize("phase", ["evaluating", "saving", "compiling"])
def test_there_is_ten_times_the_patience_outside_of_steps(phase: str) -> None:
    assert not hung(*trained(), 99.0, phase, "training")
    assert hung(*trained(), 101.0, phase, "training")


def test_who_has_yet_to_finish_a_step_does_not_wait_for_one_that_saves_after_it() -> None:
    ahead, behind = RankStatus(3, "saving"), RankStatus(2, "training")

    def hung(*beats: RankStatus) -> bool:
        watch, now = trained()
        looks = [watch.see({r: replace(b, age=float(n)) for r, b in enumerate(beats)}, now + n) for n in range(12)]
        assert not any(looks[:-1])
        return looks[-1]

    assert hung(ahead, behind)
    assert not hung(ahead, replace(behind, step=3)), "this one may wait for it at its next step"
    assert not hung(replace(ahead, step=2), behind)


def test_a_start_is_never_too_slow() -> None:
    watch = HangDetector(10.0)
    for now in (0.0, 1e3, 1e6):
        assert not watch.see({0: RankStatus(-1, STARTING, now), 1: RankStatus(-1, STARTING, now)}, now)
    assert not watch.see({0: RankStatus(1, "training", 9.0), 1: RankStatus(-1, STARTING, 1e6)}, 2e6), (
        "the others wait for it"
    )


def test_after_the_loop_there_is_no_limit() -> None:
    assert not hung(*trained(), 1000.0, "idle", "idle")
    assert not hung(*trained(), 1000.0, "idle", "starting")


def test_a_stopped_process_has_no_excuse() -> None:
    assert hung(*trained(), 11.0, "evaluating", "training", states="TS")
    assert hung(*trained(), 11.0, "training", "saving", states="TS"), "the other waits for it while it saves"
    assert hung(*trained(), 11.0, "training", STARTING, states="TS")


def test_a_suspended_job_did_not_hang() -> None:
    watch, now = trained()
    assert not watch.see({0: RankStatus(2, "training", 900.0), 1: RankStatus(2, "training", 900.0)}, now + 900)
    assert not watch.see({0: RankStatus(2, "training", 909.0), 1: RankStatus(2, "training", 909.0)}, now + 909)
    assert watch.see({0: RankStatus(2, "training", 911.0), 1: RankStatus(2, "training", 911.0)}, now + 911)


def rank_by_rank(beats: dict[int, RankStatus], patience: float) -> bool:
    """The rule of `HangDetector.see`, rank by rank, after steps that were shorter than a third of `patience`."""
    last = min((beat.age for beat in beats.values() if beat.phase == CONNECTING), default=0.0)
    beats = {rank: replace(beat, age=last) if beat.phase == CONNECTING else beat for rank, beat in beats.items()}
    limits = {rank: HangDetector._limit(beat.phase, patience) for rank, beat in beats.items()}
    late = [beat.step for rank, beat in beats.items() if beat.age > limits[rank]]
    busy = [beat.step for rank, beat in beats.items() if patience < limits[rank] >= beat.age]
    stopped = any(beat.state == "T" and beat.age > patience for beat in beats.values())
    return stopped or any(not any(other <= step for other in busy) for step in late)


def test_ranks_in_groups_are_judged_as_each_by_itself() -> None:
    random, found = Random(0), []
    for _ in range(3000):
        phases = random.sample(["training", "evaluate", CONNECTING, STARTING, "idle", "saving"], 2)
        beats = {
            rank: RankStatus(
                random.choice([-1, 0, 3, 4]),
                random.choice(phases),
                random.choice([0.0, 5.0, 9.0, 11.0, 101.0]),
                random.choice("SSSSRT"),
            )
            for rank in range(random.randint(1, 5))
        }
        found.append(HangDetector(10.0).see(beats, 200.0))
        assert found[-1] == rank_by_rank(beats, 10.0), beats
    assert 500 < sum(found) < 2500


def test_heartbeats_arrive_as_they_were_sent() -> None:
    statuses = {7: RankStatus(3, "training", 0.25, "S"), 8: RankStatus(-5, "\ufffd", 1e9), 9: RankStatus(2**63 - 1)}
    for sent in (statuses, {}):
        assert decode(Heartbeats, encode(Heartbeats(sent))) == Heartbeats(sent)


def test_zero_never_looks_and_nobody_is_nobody() -> None:
    watch, now = trained(hang_after=0.0)
    assert not watch.see({0: RankStatus(2, "training", 1e6)}, now + 1e6)
    assert not HangDetector(1.0).see({}, 0.0)


@pytest.mark.parametrize(
    ("beats", "places", "rank", "text"),
    [
        (
            {0: RankStatus(7), 1: RankStatus(7, state="T")},
            {0: WAITS},
            1,
            "rank 1 is stopped (SIGSTOP or a terminal) at step 7",
        ),
        (
            {0: RankStatus(7), 1: RankStatus(7)},
            {0: WAITS, 1: ELSEWHERE},
            1,
            "rank 1 makes no progress after step 7 at train.py:5 in load; the others wait for it",
        ),
        (
            {0: RankStatus(8), 1: RankStatus(7), 2: RankStatus(8)},
            {0: WAITS, 1: ELSEWHERE, 2: WAITS},
            1,
            "rank 1 makes no progress after step 7 at train.py:5 in load; the others wait for it",
        ),
        (
            {0: RankStatus(7), 1: RankStatus(8)},
            {0: WAITS, 1: WAITS},
            1,
            "rank 1 went on to step 8 without the collective in which rank 0 waits at train.py:9 in step",
        ),
        (
            {0: RankStatus(7), 1: RankStatus(7)},
            {0: WAITS, 1: WAITS},
            None,
            "no rank makes progress after step 7: rank 0 at train.py:9 in step, rank 1 at train.py:9 in step",
        ),
        ({0: RankStatus(7)}, {0: ELSEWHERE}, 0, "rank 0 makes no progress after step 7 at train.py:5 in load"),
        ({0: RankStatus(7), 1: RankStatus(7)}, {}, None, "no rank makes progress after step 7: rank 0, rank 1"),
    ],
)
def test_the_rank_that_holds_the_others_up_is_named(
    beats: dict[int, RankStatus], places: dict[int, StackLocation], rank: int | None, text: str
) -> None:
    assert find_culprit(beats, places) == (rank, text)


PROGRAM = """
import faulthandler, sys, threading, time

def load():
    faulthandler.dump_traceback(all_threads=True)

threading.Thread(target=time.sleep, args=(0.2,)).start()
load()
"""


def test_the_place_is_the_innermost_frame_of_the_users_own_code(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert "Thread" in done.stderr
    assert stack_location_of(done.stderr) == StackLocation(f"{script}:5 in load", False)


def test_a_frame_of_a_collective_above_it_means_that_the_rank_waits() -> None:
    dump = (
        "Current thread 0x1 (most recent call first):\n"
        '  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3 in all_reduce\n'
        '  File "/home/me/train.py", line 9 in step\n'
        '  File "/home/me/train.py", line 20 in main\n'
    )
    import launcher.agent.hangs.detection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher.agent.hangs.detection, "LIBRARIES", ("/v/site-packages",))
        assert stack_location_of(dump) == StackLocation("/home/me/train.py:9 in step", True)
    assert stack_location_of("nothing of the kind") == StackLocation()
