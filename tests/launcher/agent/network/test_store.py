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
from launcher.config.cluster import Cluster
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, Target
from tests.launcher.engines import until

pytestmark = pytest.mark.slow


def plan_of(folder: Path, ranks: int = 2) -> Plan:
    run = RunDir(folder / "n")
    if not run.path.exists():
        run.create()
        run.logs.mkdir()
    return Plan(
        *("n", run.path, RunSpec("x.py"), "local", Cluster("local", "local"), Placement(1, ranks, "cpu")),
        *(Target("script", "x.py"), folder, 60),
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    plan = plan_of(tmp_path)
    store = Store(RunDir(plan.run_dir), plan, 0)
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
    plan = plan_of(tmp_path, ranks=1)
    store = Store(RunDir(plan.run_dir), plan, 0)
    store.prepare()
    assert store.open() > 0
    assert store._process is None
    store.close()


AGENT = """
import sys, time
from pathlib import Path
from launcher.agent.network.store import Store
from launcher.lifecycle.run_dir import RunDir
from tests.launcher.agent.network.test_store import plan_of, process_of
plan = plan_of(Path(sys.argv[1]))
store = Store(RunDir(plan.run_dir), plan, 0)
store.open()
print(process_of(store), flush=True)
time.sleep(600)
"""


def test_it_ends_with_an_agent_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", AGENT, tmp_path], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        process = int(agent.stdout.readline())
        agent.kill()
    until(lambda: not Path(f"/proc/{process}").exists(), "the end of the store")
