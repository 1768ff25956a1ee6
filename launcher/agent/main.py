"""The node agent: one on every node. Node 0's also coordinates (`launcher.agent.coordinator`).

Node 0 listens and writes its address to ``rendezvous.json``; the other agents connect to it and act on its messages. When
a connection ends, the node behind it is lost: the coordinator decides what happens to the run, and an agent that lost its
coordinator kills its ranks and exits.
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
from launcher.agent.node_ranks import NodeRanks, on_signals
from launcher.agent.protocol import AgentInfo, End, FromAgent, Hello, StopRequest, ToAgent
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.messages import decode, encode
from launcher.rank.output import drop_output_on_full_disk
from launcher.rank.terminal.relay import Streams
from launcher.request.spec import Plan, State
from training.files import read_json

SLICES = 4
MANY_RANKS = 128
"""A run of so many ranks raises the limit of open files; a smaller one leaves its programs what they would have."""


async def run_agent(run_dir: RunDir, agent_info: AgentInfo, streams: Streams | None = None) -> int:
    """Be the agent of one node until the run ends; return the run's exit status.

    `streams` are the standard streams of a single local rank, if a foreground command has passed them on.
    """
    plan = run_dir.plan()
    if plan.placement.world_size >= MANY_RANKS:
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
    outgoing: asyncio.Queue[FromAgent] = asyncio.Queue()
    ranks = NodeRanks(run_dir, plan, agent_info, outgoing.put_nowait)
    on_signals(lambda number: outgoing.put_nowait(StopRequest(number)))
    await ranks.open()
    tasks: list[asyncio.Task[None]] = []
    try:
        line = await connect(run_dir, agent_info)
        if line is None:
            return 0
        reader, writer = line
        tasks += [asyncio.create_task(_send_all(outgoing, writer)), asyncio.create_task(_report(outgoing, ranks))]
        with suppress(TimeoutError, ConnectionError):
            while words := await _read_line(reader):
                message: ToAgent = decode(ToAgent, words)
                if isinstance(message, End):
                    return message.exit_status
                ranks.handle(message)
        print(f"node {agent_info.node}: the coordinator on node 0 is gone", file=sys.stderr)
        return 1
    finally:
        for task in tasks:
            task.cancel()
        await ranks.close()


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    """The next line. Raises TimeoutError after `Timeouts.silence`, of which a time when this process slept is but a part."""
    for _ in range(SLICES):
        with suppress(TimeoutError):
            return await asyncio.wait_for(reader.readline(), TIMEOUTS.silence / SLICES)
    raise TimeoutError


async def _send_all(outgoing: asyncio.Queue[FromAgent], writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(encode(await outgoing.get()))
        await writer.drain()


async def _report(outgoing: asyncio.Queue[FromAgent], ranks: NodeRanks) -> None:
    """Report once a second that this node is alive, and the status of its ranks."""
    while True:
        outgoing.put_nowait(ranks.report())
        await asyncio.sleep(TIMEOUTS.heartbeat)


async def connect(run_dir: RunDir, agent_info: AgentInfo) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    """Connect to the coordinator; None where the run has succeeded before, and there is none.

    Raises:
        TimeoutError: it left no rendezvous, or did not answer, within `Timeouts.connect`.
    """
    deadline = time.monotonic() + TIMEOUTS.connect
    while time.monotonic() < deadline:
        # Listing the folder makes an NFS client look again; a file that was absent once stays absent in its cache.
        os.listdir(run_dir.path)
        found = read_json(run_dir.rendezvous_file)
        if found and found["session"] == agent_info.session:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(found["address"], found["port"])
                hello = Hello(agent_info.node, found["token"], agent_info.host, agent_info.switches)
                writer.write(encode(hello))
                return reader, writer
        if (run_dir.result() or {}).get("state") == State.SUCCEEDED:
            return None
        await asyncio.sleep(0.1)
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
