from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.watch import Beat, Place, Watch, accuse, place_of
from training.pulse import STARTING

WAITS, ELSEWHERE = Place("train.py:9 in step", True), Place("train.py:5 in load", False)


def trained(hang_after: float = 10.0, gap: float = 1.0, steps: int = 3) -> tuple[Watch, float]:
    """A watch that has seen `steps` steps of `gap` seconds, and the time after them."""
    watch, now = Watch(hang_after), 0.0
    for step in range(steps):
        now = step * gap
        assert not watch.see({0: Beat(step, "training", 0.0), 1: Beat(step, "training", 0.0)}, now)
    return watch, now


def test_silence_for_longer_than_the_limit_is_a_hang() -> None:
    watch, now = trained()
    assert not watch.see({0: Beat(2, "training", 9.9), 1: Beat(2, "training", 1.0)}, now + 9.9)
    assert watch.see({0: Beat(2, "training", 10.1), 1: Beat(2, "training", 10.1)}, now + 10.1)


def test_slow_steps_are_learned() -> None:
    watch, now = trained(gap=20.0)
    assert not watch.see({0: Beat(2, "training", 59.0), 1: Beat(2, "training", 59.0)}, now + 59)
    assert watch.see({0: Beat(2, "training", 61.0), 1: Beat(2, "training", 61.0)}, now + 61)


@pytest.mark.parametrize("phase", ["evaluating", "saving", "compiling"])
def test_there_is_ten_times_the_patience_outside_of_steps(phase: str) -> None:
    watch, now = trained()
    assert not watch.see({0: Beat(2, phase, 99.0), 1: Beat(2, "training", 99.0)}, now + 99)
    assert watch.see({0: Beat(2, phase, 101.0), 1: Beat(2, "training", 101.0)}, now + 101)


def test_a_start_is_never_too_slow() -> None:
    watch = Watch(10.0)
    for now in (0.0, 1e3, 1e6):
        assert not watch.see({0: Beat(-1, STARTING, now), 1: Beat(-1, STARTING, now)}, now)
    assert not watch.see({0: Beat(1, "training", 9.0), 1: Beat(-1, STARTING, 1e6)}, 2e6), "the others wait for it"


def test_a_stopped_process_has_no_excuse() -> None:
    watch, now = trained()
    beats = {0: Beat(2, "evaluating", 11.0, "T"), 1: Beat(2, "training", 11.0)}
    assert watch.see(beats, now + 11)


def test_zero_never_looks_and_nobody_is_nobody() -> None:
    watch, now = trained(hang_after=0.0)
    assert not watch.see({0: Beat(2, "training", 1e6)}, now + 1e6)
    assert not Watch(1.0).see({}, 0.0)


@pytest.mark.parametrize(
    ("beats", "places", "rank", "text"),
    [
        (
            {0: Beat(7), 1: Beat(7, state="T")},
            {0: WAITS},
            1,
            "rank 1 is stopped (SIGSTOP or a terminal) at step 7",
        ),
        (
            {0: Beat(7), 1: Beat(7)},
            {0: WAITS, 1: ELSEWHERE},
            1,
            "rank 1 makes no progress after step 7 at train.py:5 in load; the others wait for it",
        ),
        (
            {0: Beat(8), 1: Beat(7), 2: Beat(8)},
            {0: WAITS, 1: ELSEWHERE, 2: WAITS},
            1,
            "rank 1 makes no progress after step 7 at train.py:5 in load; the others wait for it",
        ),
        (
            {0: Beat(7), 1: Beat(8)},
            {0: WAITS, 1: WAITS},
            1,
            "rank 1 went on to step 8 without the collective in which rank 0 waits at train.py:9 in step",
        ),
        (
            {0: Beat(7), 1: Beat(7)},
            {0: WAITS, 1: WAITS},
            None,
            "all ranks stand still after step 7: rank 0 at train.py:9 in step, rank 1 at train.py:9 in step",
        ),
        ({0: Beat(7)}, {0: ELSEWHERE}, 0, "rank 0 makes no progress after step 7 at train.py:5 in load"),
        ({0: Beat(7), 1: Beat(7)}, {}, None, "all ranks stand still after step 7: rank 0, rank 1"),
    ],
)
def test_the_rank_that_holds_the_others_up_is_named(
    beats: dict[int, Beat], places: dict[int, Place], rank: int | None, text: str
) -> None:
    assert accuse(beats, places) == (rank, text)


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
    assert place_of(done.stderr) == Place(f"{script}:5 in load", False)


def test_a_frame_of_a_collective_above_it_means_that_the_rank_waits() -> None:
    dump = (
        "Current thread 0x1 (most recent call first):\n"
        '  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3 in all_reduce\n'
        '  File "/home/me/train.py", line 9 in step\n'
        '  File "/home/me/train.py", line 20 in main\n'
    )
    import launcher.watch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher.watch, "_LIBRARIES", ("/v/site-packages",))
        assert place_of(dump) == Place("/home/me/train.py:9 in step", True)
    assert place_of("nothing of the kind") == Place()
