"""The order of nodes by SLURM's topology plug-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.agent.protocol import Hello
from launcher.agent.switches import by_switches, switches_of
from launcher.backends.slurm.job import agent_info
from launcher.client.follow import describe
from launcher.lifecycle.history import record_started
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.messages import decode, encode


def variables(address: str, pattern: str) -> dict[str, str]:
    return {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}


@pytest.mark.parametrize(
    ("address", "pattern", "switches"),
    [
        ("s0.s1.n7", "switch.switch.node", ("s0", "s1")),
        ("s1.n7", "switch.node", ("s1",)),
        ("s0.s[4-5].n7", "switch.switch.node", ("s0", "s[4-5]")),
        ("b1.n7", "block.node", ("b1",)),
        ("s1.n7.site.org", "switch.node", ("s1",)),
        ("n7", "node", ()),
        ("n7.site.org", "node", ()),
        ("n7", "switch.node", ()),
        ("", "", ()),
        ("s0.n7", "", ()),
        ("s0.n7", "switch.host", ()),
    ],
)
def test_the_switches_are_those_of_the_plug_in(address: str, pattern: str, switches: tuple[str, ...]) -> None:
    assert switches_of(variables(address, pattern)) == switches


def test_without_the_plug_in_there_are_none() -> None:
    assert switches_of({}) == ()
    assert switches_of({"SLURM_TOPOLOGY_ADDR": "s0.n1"}) == ()


@pytest.mark.parametrize(
    ("switches", "order"),
    [
        (["a", "b", "a", "b"], [0, 2, 1, 3]),
        (["b", "b", "a", "a"], [0, 1, 2, 3]),
        (["r.a", "q.c", "r.b", "q.d", "r.a", "q.c"], [0, 4, 2, 1, 5, 3]),
        (["r.a", "r", "r.a"], [0, 2, 1]),
        (["a", "", "a"], [0, 1, 2]),
        (["", "", ""], [0, 1, 2]),
        (["a"], [0]),
        ([], []),
    ],
)
def test_nodes_below_a_switch_follow_each_other(switches: list[str], order: list[int]) -> None:
    known = {agent: tuple(name.split(".")) if name else () for agent, name in enumerate(switches)}
    assert by_switches(range(len(switches)), known) == order
    assert by_switches(order, known) == order, "it is an order already"


def test_a_spare_node_joins_those_of_its_switch() -> None:
    known = {0: ("a",), 1: ("b",), 3: ("a",), 5: ("b",)}
    assert by_switches([0, 1, 3, 5], known) == [0, 3, 1, 5]
    assert by_switches([1, 3, 5], known) == [1, 5, 3]
    assert by_switches([1, 3, 4], known) == [1, 3, 4], "not all are known"


def test_the_agent_of_a_task_sends_its_switches(tmp_path: Path) -> None:
    task = {
        "SLURM_JOB_ID": "7",
        "SLURM_NODEID": "1",
        "SLURM_NNODES": "2",
        "SLURMD_NODENAME": "n7",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    }
    info = agent_info(RunDir(tmp_path), task | variables("s0.s1.n7", "switch.switch.node"))
    assert info.switches == ("s0", "s1")
    assert agent_info(RunDir(tmp_path), task).switches == ()
    hello = Hello(1, "token", info.host, info.switches)
    assert decode(Hello, encode(hello)) == hello


def test_the_order_is_shown(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    record_started(run_dir, 1, 4, ["n1", "n3", "n2", "n4"], ["s0.s1", "s0.s1", "s0.s2", "s0.s2"])
    record_started(run_dir, 2, 2, ["n1", "n3"], ["s1", "s1"])
    record_started(run_dir, 3, 2, ["n1", "n3"], ["", ""])
    first, second, third = run_dir.events()
    assert describe(first) == "4 ranks on n1, n3, n2, n4 in the order of their 2 switches"
    assert describe(second) == "attempt 2: 2 ranks on n1, n3"
    assert "switches" not in third
