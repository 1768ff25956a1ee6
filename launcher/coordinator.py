"""The coordinator: node 0's second hat. It opens attempts, decides what follows from their ends, and leaves the result."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from launcher.network import reserve_port
from launcher.policy import Action, Failure, Outcome, decide
from launcher.ranks import CONNECT_SECONDS, Message, NodeRanks, Seat, on_signals
from launcher.rundir import BEAT_SECONDS, RunDir, tail
from launcher.spec import Plan, State
from training.files import read_json, write_atomic

LAST_WORDS_SECONDS = 0.5
"""How long other ranks get, after one raised, to leave their own errors before they are killed."""


FAREWELL_SECONDS = 10.0
"""How long the coordinator waits, after the end, for the other agents to leave."""


class Coordinator:
    """Runs one job: all attempts inside one allocation."""

    def __init__(self, run_dir: RunDir, plan: Plan, seat: Seat) -> None:
        self.run_dir, self.plan, self.seat = run_dir, plan, seat
        self.inbox: asyncio.Queue[tuple[int, Message]] = asyncio.Queue()
        self.own = NodeRanks(run_dir, plan, seat, lambda message: self.inbox.put_nowait((seat.node, message)))
        self.peers: dict[int, asyncio.StreamWriter] = {}
        self.hosts = {seat.node: seat.host}
        self.stop: signal.Signals | None = None  # the first request to stop
        self.preempted = False

    async def run(self) -> int:
        """Bring the run to an end and return its exit status."""
        on_signals(lambda number: self.inbox.put_nowait((self.seat.node, {"signal": number})))
        self.run_dir.beat()
        beating = asyncio.create_task(self._beat())
        await self.own.open()
        server = await self._listen() if self.seat.nodes > 1 else None
        state = State.FAILED
        try:
            lost = await self._wait_for_peers()
            state = await self._attempts(lost)
        finally:
            for node in self.peers:
                self._send(node, {"end": state.exit_status})
            await self.own.close()
            if server is not None:
                server.close()
                await self._farewell()
            beating.cancel()
        return state.exit_status

    # ---- the other agents -----------------------------------------------------------------------------------------

    async def _listen(self) -> asyncio.Server:
        token = secrets.token_hex(16)

        async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hello: Message = {}
            with suppress(ValueError, OSError):  # clusters have port scanners, which say all kinds of things
                hello = json.loads(await reader.readline())
            if not secrets.compare_digest(str(hello.get("token")), token):
                writer.close()
                return
            node = int(hello["hello"])
            self.peers[node] = writer
            self.hosts[node] = hello["host"]
            self.inbox.put_nowait((node, {"joined": node}))
            with suppress(ConnectionError):
                while line := await reader.readline():
                    self.inbox.put_nowait((node, json.loads(line)))
            self.peers.pop(node, None)
            self.inbox.put_nowait((node, {"lost": node}))

        server = await asyncio.start_server(welcome, "", 0, family=socket.AF_INET)
        port = server.sockets[0].getsockname()[1]
        record = {"address": self.seat.address, "port": port, "token": token, "session": self.seat.session}
        # The token keeps other users of the node away; the run directory's own permissions guard the file.
        write_atomic(self.run_dir.rendezvous_file, json.dumps(record))
        return server

    async def _wait_for_peers(self) -> list[int]:
        """Wait until every node has joined; return those that did not, empty when a stop came first."""
        deadline = time.monotonic() + CONNECT_SECONDS
        while len(self.hosts) < self.seat.nodes and not self.stop:
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    _, message = await self.inbox.get()
            except TimeoutError:
                return [n for n in range(self.seat.nodes) if n not in self.hosts]
            self._note_stop(message)
        return []

    async def _farewell(self) -> None:
        """Give the other agents time to hear the end; each closes its connection when its ranks are gone."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                while self.peers:
                    await self.inbox.get()

    def _send(self, node: int, message: Message) -> None:
        writer = self.peers.get(node)
        if writer is not None:
            with suppress(ConnectionError):
                writer.write(json.dumps(message).encode() + b"\n")

    async def _tell_all(self, message: Message) -> None:
        for node in list(self.peers):
            self._send(node, message)
        await self.own.handle(message)

    async def _beat(self) -> None:
        """Touch the heartbeat, and look whether somebody left a request to stop."""
        while True:
            with suppress(OSError):  # a full disk must not end the run; the next beat may go through
                self.run_dir.beat()
            if not self.stop and self.run_dir.stop_file.exists():
                self.inbox.put_nowait((self.seat.node, {"signal": int(signal.SIGTERM)}))
            await asyncio.sleep(BEAT_SECONDS / 4)

    # ---- attempts -------------------------------------------------------------------------------------------------

    async def _attempts(self, lost: list[int]) -> State:
        started = time.time()
        restarts_left = self.plan.spec.max_restarts
        while True:
            attempt = self.run_dir.claim_attempt()
            outcome = Outcome({}, stop=self.reason, lost=lost) if lost or self.stop else await self._attempt(attempt)
            action, failure = decide(outcome, restarts_left if not outcome.lost else 0)
            match action:
                case Action.RESTART:
                    restarts_left -= 1
                    note_failure(self.run_dir, attempt, failure, restarts_left)
                case Action.FINISH:
                    return self._end(State.SUCCEEDED, attempt, started)
                case Action.FAIL:
                    return self._end(State.FAILED, attempt, started, failure)
                case Action.STOP:
                    if self.preempted and self.seat.requeue is not None and self.seat.requeue():
                        self.run_dir.event("requeued", attempt=attempt)
                        return State.STOPPED
                    return self._end(State.STOPPED, attempt, started)

    async def _attempt(self, attempt: int) -> Outcome:
        """Start all ranks and watch them to their end."""
        holder = reserve_port()
        try:
            port = holder.getsockname()[1]
            self.run_dir.event(
                "started",
                attempt=attempt,
                world_size=self.plan.placement.world_size,
                hosts=[self.hosts[n] for n in sorted(self.hosts)],
            )
            await self._tell_all({"start": attempt, "address": self.seat.address, "port": port})
            exits, lost = await self._watch()
            return Outcome(exits, self.run_dir.errors(attempt), self.reason, lost)
        finally:
            holder.close()

    async def _watch(self) -> tuple[Mapping[int, int], list[int]]:
        """Wait for every rank's end. After a bad one the others are killed: their collectives would wait for it."""
        alive = set(range(self.plan.placement.world_size))
        exits: dict[int, int] = {}
        lost: list[int] = []
        kill_at: float | None = None
        killed = False
        while alive:
            try:
                async with asyncio.timeout_at(kill_at):
                    node, message = await self.inbox.get()
            except TimeoutError:
                await self._tell_all({"signal": int(signal.SIGKILL)})
                killed, kill_at = True, None
                continue
            if "exit" in message:
                rank, code = message["exit"], message["code"]
                alive.discard(rank)
                if not killed:
                    exits[rank] = code
                    if code < 0 or code in (1, 2):
                        kill_at = self._soonest(kill_at, 0.0 if code < 0 else LAST_WORDS_SECONDS)
            elif "lost" in message:
                lost.append(node)
                per_node = self.plan.placement.ranks_per_node
                alive -= set(range(node * per_node, (node + 1) * per_node))
                kill_at = self._soonest(kill_at, 0.0)
            elif "signal" in message:
                # The first request is passed on; a second Ctrl-C, or the end of the grace, kills.
                first = not self.stop
                again = self.stop == message["signal"] == signal.SIGINT
                self._note_stop(message)
                if first:
                    self.run_dir.event("stopping", reason=self.reason)
                    kill_at = self._soonest(kill_at, self.plan.cluster.grace)
                    await self._tell_all({"signal": int(signal.SIGTERM)})
                elif again:
                    kill_at = self._soonest(kill_at, 0.0)
        return exits, lost

    @staticmethod
    def _soonest(kill_at: float | None, seconds: float) -> float:
        wanted = asyncio.get_running_loop().time() + seconds
        return wanted if kill_at is None else min(kill_at, wanted)

    def _note_stop(self, message: Message) -> None:
        """Remember a request to stop, if `message` is one."""
        if "signal" not in message:
            return
        self.stop = self.stop or signal.Signals(message["signal"])
        if message["signal"] == signal.SIGUSR2 and not self.preempted:
            self.preempted = True
            self.run_dir.event("preempted", signal="SIGUSR2")

    @property
    def reason(self) -> str:
        return self.stop.name if self.stop else ""

    # ---- the end --------------------------------------------------------------------------------------------------

    def _end(self, state: State, attempt: int, started: float, failure: Failure | None = None) -> State:
        return end_run(self.run_dir, self.plan, state, attempt, started, failure)


def note_failure(run_dir: RunDir, attempt: int, failure: Failure | None, restarts_left: int) -> None:
    """Leave the events of an attempt that failed and is followed by another."""
    assert failure is not None, "only a failure is worth a restart"
    told = {"attempt": attempt, "kind": failure.kind, "message": failure.message, "rank": failure.rank}
    run_dir.event("failed", **told)
    run_dir.event("restarted", **told, restarts_left=restarts_left)


def end_run(
    run_dir: RunDir, plan: Plan, state: State, attempt: int, started: float, failure: Failure | None = None
) -> State:
    """Leave ``result.json`` and the last event; `started` is when this submission began, in seconds since 1970."""
    steps = max((int(m.get("step", 0)) for m in run_dir.metrics()), default=0)
    fields: dict[str, Any] = {
        "metrics": (read_json(run_dir.value_file) or {}) if state is State.SUCCEEDED else {},
        "steps": steps,
        "world_size": plan.placement.world_size,
        "attempts": attempt,
        "seconds": round(time.time() - started, 3),
    }
    if failure is not None:
        run_dir.event("failed", attempt=attempt, kind=failure.kind, message=failure.message, rank=failure.rank)
        rank = failure.rank if failure.rank is not None else 0
        fields["failure"] = asdict(failure) | {"log": tail(run_dir.log(attempt, rank))}
    run_dir.write_result(state, **fields)
    run_dir.event("finished", attempt=attempt, state=state.value)
    return state
