"""The store of the process groups: of one attempt, of the next, and of an agent that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.agent.network.store import UNMOVED, Store
from launcher.request import own_packages
from tests.launcher.engines import until
from tests.launcher.plans import planned_run
from tests.testbed.keeper import processes_with

pytestmark = pytest.mark.slow


def store_of(folder: Path, ranks: int = 2) -> Store:
    run = planned_run(folder / "n", "local", ranks)
    run.logs.mkdir()
    return Store(run, run.plan(), 0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = store_of(tmp_path)
    yield store
    store.close()


def process_of(store: Store) -> int:
    assert store._process is not None
    return store._process.pid


def connected(port: int) -> object:
    from torch._C._distributed_c10d import TCPStore

    return TCPStore("127.0.0.1", port, is_master=False)


def test_each_attempt_has_an_empty_store(store: Store) -> None:
    first = connected(store.open())  # before the process has imported torch
    first.set("a", "1")  # type: ignore[attr-defined]
    process = process_of(store)
    second = connected(store.open())
    assert not second.check(["a"])  # type: ignore[attr-defined]
    assert process_of(store) == process


WITHOUT_CORE = """
import os, signal
from launcher.agent.network import store
def core_of_torch():
    {}
store.core_of_torch = core_of_torch
store.main()
"""


@pytest.mark.parametrize("end", ["raise ImportError", "os.kill(os.getpid(), signal.SIGSEGV)"])
def test_another_torch_whose_core_cannot_be_imported_alone(
    store: Store, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", WITHOUT_CORE.format(end)]
    monkeypatch.setattr(own_packages, "command", lambda *_: command)
    assert connected(store.open()).num_keys() >= 0  # type: ignore[attr-defined]


def test_signals_to_all_processes_of_a_job_do_not_end_it(store: Store) -> None:
    store.prepare()
    for number in UNMOVED:  # at once, and so while it starts
        os.kill(process_of(store), number)
    assert connected(store.open()).num_keys() >= 0  # type: ignore[attr-defined]
    for number in UNMOVED:
        os.kill(process_of(store), number)
    assert connected(store.open()).num_keys() >= 0  # type: ignore[attr-defined]


def test_a_process_that_died_is_replaced(store: Store) -> None:
    store.open()
    dead = process_of(store)
    os.kill(dead, signal.SIGKILL)
    os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
    assert connected(store.open()).num_keys() >= 0  # type: ignore[attr-defined]
    assert process_of(store) != dead


def test_a_single_rank_has_a_port_and_no_process(tmp_path: Path) -> None:
    store = store_of(tmp_path, ranks=1)
    store.prepare()
    assert store.open() > 0
    assert store._process is None
    store.close()


AGENT = """
import sys, time
from pathlib import Path
from tests.launcher.agent.network.test_store import store_of
store = store_of(Path(sys.argv[1]))
store.open()
print("open", flush=True)
time.sleep(600)
"""


def test_it_ends_with_an_agent_that_is_killed(tmp_path: Path) -> None:
    mark = f"STORE_OF={tmp_path}"
    command = [sys.executable, "-c", AGENT, str(tmp_path)]
    environment = {**os.environ, "STORE_OF": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        agent.stdout.readline()
        agent.kill()
    until(lambda: not processes_with(f"{mark}\0"), "the end of the store")
