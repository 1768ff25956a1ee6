"""The node agent: one on every node. Node 0's also coordinates (`launcher.agent.coordinator`).

Node 0 listens and writes its address to ``rendezvous.json``; the other agents connect to it and act on its messages. An agent
that loses its connection connects again. If it cannot, its node is lost: the coordinator decides what happens to the run, and
an agent that lost its coordinator kills its ranks and exits.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from launcher.agent.coordinator import Coordinator
from launcher.agent.network.addresses import raise_file_limit
from launcher.agent.network.link import CoordinatorGone, Link, Rendezvous, seconds_between_reports
from launcher.agent.node_ranks import NodeRanks, on_signals
from launcher.agent.protocol import AgentInfo, End, Hello, StopRequest
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.output import drop_output_on_full_disk
from launcher.rank.terminal.relay import Streams
from launcher.request.spec import Plan, State
from training.files import read_json

MANY_RANKS = 128
"""A run of so many ranks raises the limit of open files; a smaller one leaves its programs what they would have."""


async def run_agent(run_dir: RunDir, agent_info: AgentInfo, streams: Streams | None = None) -> int:
    """Be the agent of one node until the run ends; return the run's exit status.

    `streams` are the standard streams of a single local rank, if a foreground command has passed them on.
    """
    plan = run_dir.plan()
    if max(plan.placement.world_size, agent_info.nodes) >= MANY_RANKS:
        raise_file_limit()
    run_dir.logs.mkdir(exist_ok=True)
    if agent_info.node:
        return await follow(run_dir, plan, agent_info)
    if (result := run_dir.result()) is not None:  # a scheduler started a job again that had come to an end
        if result["state"] == State.SUCCEEDED:
            return 0
        run_dir.result_file.unlink()
    return await Coordinator(run_dir, plan, agent_info, streams).run()


async def follow(run_dir: RunDir, plan: Plan, agent_info: AgentInfo) -> int:
    """Be the agent of a node other than node 0: act on the coordinator's messages until it sends `End` or is gone."""
    link = Link(Hello(agent_info.node, "", agent_info.host, agent_info.switches))
    ranks = NodeRanks(run_dir, plan, agent_info, link.send)
    on_signals(lambda number: link.send(StopRequest(number)))
    await ranks.open()
    reporting: asyncio.Task[None] | None = None
    try:
        if not await connect(run_dir, agent_info, link):
            return 0
        reporting = asyncio.create_task(_report(link, ranks, seconds_between_reports(agent_info.nodes)))
        while not isinstance(message := await link.receive(), End):
            ranks.handle(message)
        return message.exit_status
    except CoordinatorGone as error:
        print(f"node {agent_info.node}: {error}", file=sys.stderr)
        return 1
    finally:
        if reporting is not None:
            reporting.cancel()
        link.report()  # the coordinator waits for this, and then for the end of the connection
        await ranks.close()
        link.close()


async def _report(link: Link, ranks: NodeRanks, seconds: float) -> None:
    """Report every `seconds` that this node is alive, and the status of its ranks."""
    while True:
        link.send(ranks.report())
        link.report()
        await asyncio.sleep(seconds)


async def connect(run_dir: RunDir, agent_info: AgentInfo, link: Link) -> bool:
    """Connect to the coordinator; False if the run has succeeded before, and there is none.

    Raises:
        TimeoutError: it left no rendezvous, or did not answer, within `Timeouts.connect`.
        CoordinatorGone: it refuses this agent.
    """
    deadline, pause = time.monotonic() + TIMEOUTS.connect, TIMEOUTS.heartbeat / 10
    while time.monotonic() < deadline:
        # Listing the folder makes an NFS client look again; a file that was absent once stays absent in its cache.
        os.listdir(run_dir.path)
        found = read_json(run_dir.rendezvous_file)
        if found and found["session"] == agent_info.session:
            with suppress(OSError, ValueError):
                await link.open(Rendezvous(found["address"], found["port"], found["token"]))
                return True
        if (run_dir.result() or {}).get("state") == State.SUCCEEDED:
            return False
        await asyncio.sleep(pause)
        pause = min(1.1 * pause, TIMEOUTS.heartbeat)  # a thousand agents look at a shared disk
    raise TimeoutError(
        f"node {agent_info.node}: no coordinator after {TIMEOUTS.connect:.0f} s. Node 0 did not start, or its address"
        f" {agent_info.address} cannot be reached from here, or {run_dir.path} is not the same folder on both nodes."
    )


def main() -> None:
    """``python -m launcher.agent.main RUN_DIR [stdin|terminal]``: the agent of a run on this machine alone.

    The last word names the descriptors that it was started with; see `Streams.inherited`.
    """
    drop_output_on_full_disk()
    streams = Streams.inherited(sys.argv[2]) if len(sys.argv) > 2 else None
    sys.exit(asyncio.run(run_agent(RunDir(Path(sys.argv[1])), AgentInfo(), streams)))


if __name__ == "__main__":
    main()
