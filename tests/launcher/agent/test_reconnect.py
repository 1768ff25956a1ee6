"""Two real agents, coordinator included, whose connection breaks while their ranks run."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import Target
from tests.launcher.agent.network.proxy import Proxy, until
from tests.launcher.plans import planned_run
from training.files import read_json

pytestmark = pytest.mark.slow

SCRIPT = """
import os, pathlib, time
print("runs", flush=True)
while not pathlib.Path("go").exists():
    time.sleep(0.02)
"""
AGENT = """
import asyncio, sys
from pathlib import Path
from launcher.agent.main import run_agent
from launcher.agent.protocol import AgentInfo
from launcher.lifecycle.run_dir import RunDir
node = int(sys.argv[2])
sys.exit(asyncio.run(run_agent(RunDir(Path(sys.argv[1])), AgentInfo(node, 2, f"node{node}", session="s"))))
"""

Scenario = Callable[[RunDir, Proxy], Awaitable[None]]


def run_two_agents(folder: Path, scenario: Scenario) -> tuple[list[int | None], RunDir, str]:
    """Run two agents with a rank each, and `scenario` once both ranks run; return exit statuses and what was logged."""
    (folder / "x.py").write_text(SCRIPT)
    run = planned_run(folder / "r", "local")
    plan = run.plan()
    target = Target("script", str(folder / "x.py"))
    run.write_plan(replace(plan, placement=replace(plan.placement, nodes=2, ranks_per_node=1), target=target))

    async def start(node: int) -> asyncio.subprocess.Process:
        command = [sys.executable, "-c", AGENT, str(run.path), str(node)]
        return await asyncio.create_subprocess_exec(*command, cwd=folder, stderr=asyncio.subprocess.PIPE)

    async def inside() -> tuple[list[int | None], str]:
        agents = [await start(0)]
        proxy = None
        try:
            async with asyncio.timeout(60):
                await until(run.rendezvous_file.exists)
                found: dict[str, Any] = read_json(run.rendezvous_file) or {}
                proxy = Proxy(found["port"])
                run.rendezvous_file.write_text(json.dumps(found | {"port": await proxy.listen()}))
                agents.append(await start(1))
                logs = [run.log(1, rank) for rank in (0, 1)]
                await until(lambda: all(log.exists() and "runs" in log.read_text() for log in logs))
                await scenario(run, proxy)
                said = [(await agent.communicate())[1].decode() for agent in agents]
        finally:
            if proxy is not None:
                await proxy.close()
            for agent in agents:
                if agent.returncode is None:
                    agent.kill()
                    await agent.communicate()
        return [agent.returncode for agent in agents], "".join(said)

    statuses, said = asyncio.run(inside())
    return statuses, run, said


def test_a_lost_connection_costs_the_run_nothing(tmp_path: Path) -> None:
    async def scenario(run: RunDir, proxy: Proxy) -> None:
        for count in (1, 2):
            proxy.reset()
            await until(lambda count=count: proxy.count > count)  # type: ignore[misc]
            for garbage in (b"", b"[" * 100_000 + b"\n"):
                _, writer = await asyncio.open_connection("127.0.0.1", proxy.to)
                writer.write(garbage)
                writer.close()
        (tmp_path / "go").touch()
        proxy.reset()  # while the ranks end

    statuses, run, said = run_two_agents(tmp_path, scenario)
    assert statuses == [0, 0], said
    assert [event["event"] for event in run.events()] == ["started", "finished"]
    assert "lost connections of agents, which have 3 s to return: " in said


def test_an_agent_that_cannot_return_is_a_lost_node(tmp_path: Path) -> None:
    async def scenario(run: RunDir, proxy: Proxy) -> None:
        proxy.server.close()
        proxy.reset()

    statuses, run, said = run_two_agents(tmp_path, scenario)
    assert statuses == [1, 1], said
    result = run.result()
    assert result is not None
    assert result["failure"]["kind"] == "node lost"
    assert result["failure"]["message"] == "node1 stopped answering"
    assert "node 1: the coordinator on node 0 is gone" in said
