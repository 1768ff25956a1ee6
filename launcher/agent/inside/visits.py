"""Visits at the agent and at the supervisor of a run: find requests, and start a session for each on its nodes.

::

    client ── visits/ID.json ── supervisor ── Visit(ID) ── agent ── session ── connects to the client

The supervisor, which is the coordinator or the Ray driver, looks for new requests and sends their ids to the agents. The session
(`launcher.agent.inside.session`) is a child of the agent: in the job's allocation, control group and container.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from launcher.agent.inside.start import SessionStart, VisitedRank
from launcher.agent.processes import start_time
from launcher.agent.protocol import AgentInfo, Visit
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle import history
from launcher.lifecycle.records import visits
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.messages import encode
from launcher.request import own_packages
from launcher.request.spec import Plan
from training.distributed.world import World


class VisitRequests:
    """The requests of clients, as the supervisor of a run finds them."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self._seen: set[str] = set()

    def prepare(self) -> None:
        """Make the folder of requests."""
        with suppress(OSError):
            visits.prepare(self.run_dir.visits)

    def new(self) -> list[Visit]:
        """Return what the agents are to be sent about requests that have appeared after the last call."""
        try:
            found = visits.waiting(self.run_dir.visits)
        except OSError:
            return []
        new, self._seen = found - self._seen, found
        return [visit for each in sorted(new) if (visit := self._visit(each))]

    async def pass_on(self, send: Callable[[Visit], None]) -> None:
        """Look for requests until cancelled, and `send` each to the agents."""
        while True:
            for visit in await asyncio.to_thread(self.new):
                send(visit)
            await asyncio.sleep(TIMEOUTS.visit_look)

    def _visit(self, visit: str) -> Visit | None:
        try:
            request = visits.read(self.run_dir.visits, visit)
        except (OSError, ValueError) as error:
            _log(f"a request to look inside was ignored: {error}")
            return None
        history.record_visited(self.run_dir, request.kind, request.ranks, request.nodes)
        return Visit(visit, self.run_dir.last_attempt(), request.ranks, request.nodes)


class Sessions:
    """The sessions of one node.

    Attributes:
        environments: of the ranks of the newest attempt here.
        node: the number of this node in the placement.
        attempt: the newest one that had ranks on this node; 0: none.
    """

    def __init__(self, run_dir: RunDir, plan: Plan, agent_info: AgentInfo) -> None:
        self.run_dir, self.plan, self.agent_info = run_dir, plan, agent_info
        self.environments: dict[int, dict[str, str]] = {}
        self.environment: dict[str, str] = {}
        self.node = self.attempt = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, worlds: Sequence[World], environment: dict[str, str]) -> None:
        """Note that an attempt with these ranks begins on the node; `environment` is that of its processes that are no ranks."""
        self.environments, self.environment = {}, environment
        for world in worlds:
            self.node, self.attempt = world.node_rank, world.attempt

    def visit(self, visit: Visit, pids: Mapping[int, int]) -> None:
        """Start a session if the visit is about this node; `pids` are the processes of the ranks that run."""
        ranks = [rank for rank in self.environments if not visit.ranks or rank in visit.ranks]
        if visit.attempt != self.attempt or not ranks or (visit.nodes and self.node not in visit.nodes):
            return
        found = [VisitedRank(rank, *_process(pids.get(rank)), self.environments[rank]) for rank in sorted(ranks)]
        task = asyncio.create_task(self._run(visit.id, found))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, visit: str, ranks: list[VisitedRank]) -> None:
        try:
            request = await asyncio.to_thread(visits.read, self.run_dir.visits, visit)
            target = self.plan.target
            start = SessionStart(
                id=visit,
                run_dir=str(self.run_dir.path),
                node=self.node,
                host=self.agent_info.host,
                attempt=self.attempt,
                request=request,
                ranks=ranks,
                environment=self.environment,
                cwd=str(self.plan.cwd),
                path=list(target.path),
                moved=dict(target.moved),
                command=target.name if target.kind == "command" else "",
            )
            with self.run_dir.open_agent_log(self.agent_info.node) as log:
                process = await asyncio.create_subprocess_exec(
                    *own_packages.command("launcher.agent.inside.session"),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            _log(f"node {self.agent_info.node}: a session was not started: {error}")
            return
        assert process.stdin is not None
        process.stdin.write(encode(start))  # and the pipe stays open: its end is that of this agent
        try:
            await process.wait()
        except asyncio.CancelledError:
            process.stdin.close()
            try:
                async with asyncio.timeout(TIMEOUTS.session_end):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    async def close(self) -> None:
        """End the sessions and wait for their ends."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _process(pid: int | None) -> tuple[int, str]:
    """The pid and the start time of a process; (0, "") if there is none."""
    started = start_time(pid) if pid is not None else ""
    return (pid or 0, started) if started else (0, "")


def _log(text: str) -> None:
    print(f"launch: {ascii(text)[1:-1]}", file=sys.stderr, flush=True)
