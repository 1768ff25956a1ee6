"""The stacks of processes: read from a real one, and of texts of other versions and programs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launcher.agent.inside.stacks import (
    Frame,
    NoStacksError,
    RankStacks,
    Thread,
    dump,
    folded,
    parse,
    parse_py_spy,
    where,
)
from launcher.agent.processes import process_state
from launcher.client.inside.stacks import merged, ranges, summary
from tests.launcher.engines import until

WAITS = """
import threading, time
from launcher.rank.output import write_stacks_on_signal
write_stacks_on_signal()
def helper(): time.sleep(600)
def program(): print(flush=True); time.sleep(600)
for _ in range(20): threading.Thread(target=helper, daemon=True).start()
"""


@contextmanager
def process(source: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child
        finally:
            child.kill()


def test_a_process_shows_all_of_its_threads_again_and_again() -> None:
    with process(f"{WAITS}\nprogram()") as child:
        for _ in range(3):
            main, *others = parse(asyncio.run(dump(child.pid)))
            assert [frame.function for frame in main.frames] == ["program", "<module>"]
            assert [each.frames[0].function for each in others] == ["helper"] * 20
        assert child.poll() is None


OWN_FILE = """
import os, signal
[own] = [int(n) for n in os.listdir("/proc/self/fd") if "launch-stacks" in os.path.realpath(f"/proc/self/fd/{n}")]
"""


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import time\nprint(flush=True)\ntime.sleep(600)", "no Python stacks to show"),
        (f"{WAITS}{OWN_FILE}os.close(own)\nprogram()", "no Python stacks to show"),
        (f"{WAITS}{OWN_FILE}os.dup2(1, own)\nprogram()", "no Python stacks to show"),
        (f"{WAITS}{OWN_FILE}os.dup2(own, own + 1)\nos.close(own)\nprogram()", "no Python stacks to show"),
        (f"{WAITS}{OWN_FILE}signal.signal(signal.SIGRTMAX - 5, signal.SIG_IGN)\nprogram()", "replaced the handler"),
        (f"{WAITS}{OWN_FILE}signal.signal(signal.SIGRTMAX - 5, signal.SIG_DFL)\nprogram()", "replaced the handler"),
    ],
    ids=["not registered", "closed", "another file", "moved", "ignored", "default"],
)
def test_a_process_that_would_not_survive_the_signal_does_not_get_it(source: str, why: str) -> None:
    with process(source) as child:
        with pytest.raises(NoStacksError, match=why):
            asyncio.run(dump(child.pid))
        until(lambda: process_state(child.pid) == "S", "it sleeps on")


def test_a_stopped_process_is_named_and_gets_nothing() -> None:
    with process(f"{WAITS}\nprogram()") as child:
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: process_state(child.pid) == "T", "the process is stopped")
        with pytest.raises(NoStacksError, match=r"is state T \(stopped, until SIGCONT\)"):
            asyncio.run(dump(child.pid))
        os.kill(child.pid, signal.SIGCONT)


def test_a_process_that_blocks_the_signal_is_said_not_to_answer() -> None:
    source = f"{WAITS}\nimport signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\n"
    source = source.replace("for _ in range(20)", "for _ in range(0)")
    with process(f"{source}\nprogram()") as child, pytest.raises(NoStacksError, match="does not answer: state S"):
        asyncio.run(dump(child.pid))


def test_the_dumps_of_newer_versions_are_read() -> None:
    text = """Thread 0x00007f0000000001 [loader] (most recent call first):
  File "/usr/lib/python3.14/threading.py", line 373 in wait

Current thread 0x00007f0000000002 [python] (most recent call first):
  File "/home/me/train.py", line 88 in step
  File "/home/me/train.py", line 99 in <module>
"""
    assert parse(text) == [
        Thread("MainThread", [Frame("/home/me/train.py", 88, "step"), Frame("/home/me/train.py", 99, "<module>")]),
        Thread("loader", [Frame("/usr/lib/python3.14/threading.py", 373, "wait")]),
    ]
    assert parse("") == []


def test_py_spy_is_read() -> None:
    frames = [{"name": "poll", "filename": "libc.so", "line": 0}, {"name": "step", "filename": "train.py", "line": 8}]
    threads = [
        {"thread_name": None, "thread_id": 7, "frames": []},
        {"thread_name": "MainThread", "thread_id": 1, "frames": frames},
    ]
    main, other = parse_py_spy(json.dumps(threads).encode())
    assert (main.frames[1], other.name, where([main])) == (Frame("train.py", 8, "step"), "7", "poll train.py:8")
    for damaged in (b"", b"[1]", b'[{"frames": 1}]', b'[{"thread_name": "x", "frames": [{"name": "f"}]}]'):
        with pytest.raises(NoStacksError, match="cannot be read"):
            parse_py_spy(damaged)


LIBRARY = f"{os.path.dirname(json.__file__)}/decoder.py"


def test_ranks_at_the_same_calls_are_folded_on_a_node_and_over_nodes() -> None:
    waiting = [Thread("MainThread", [Frame(LIBRARY, 5, "all_reduce"), Frame("/me/train.py", 88, "step")])]
    loading = [Thread("MainThread", [Frame("/me/data.py", 41, "load"), Frame("/me/train.py", 80, "step")])]
    assert (where(waiting), where(loading), where([])) == ("all_reduce train.py:88", "load data.py:41", "")
    one = folded([RankStacks(0, waiting), RankStacks(1, waiting), RankStacks(2, [], "does not run")])
    other = folded([RankStacks(3, waiting), RankStacks(4, loading)])
    found = merged([*one, *other])
    assert [each["ranks"] for each in found] == [[0, 1, 3], [2], [4]]
    assert summary(found) == "3 ranks in all_reduce train.py:88; rank 2 does not run; rank 4 in load data.py:41"


def test_numbers_are_shown_as_ranges() -> None:
    assert [ranges([]), ranges([5]), ranges([3, 0, 1, 2, 7])] == ["", "5", "0-3, 7"]
