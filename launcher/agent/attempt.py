"""One attempt: all ranks from their start to the end of the last of them, whatever that end is."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Any, assert_never

from launcher.agent.hangs.detection import HangDetector, RankStatus, StackLocation, find_culprit
from launcher.agent.hangs.records import GroupRecord
from launcher.agent.protocol import (
    AgentMessage,
    Collectives,
    DumpStacks,
    Heartbeats,
    Joined,
    Lost,
    NodeChecked,
    RankExit,
    Signal,
    Stacks,
    StopRequest,
    ToAgent,
)
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.exit_status import BAD_REQUEST, DISK_FULL, ERROR_NOT_WRITTEN, RAISED


def ranks_in(message: AgentMessage) -> Iterable[int]:
    """Return the ranks that a message of an agent is about."""
    match message:
        case Heartbeats(ranks) | Stacks(ranks):
            return ranks
        case RankExit(rank) | Collectives(rank):
            return (rank,)
        case StopRequest() | NodeChecked() | Joined() | Lost():
            return ()
        case _:
            assert_never(message)


class Attempt:
    """The state of the ranks of one attempt: what their agents report goes in, what to send to the agents comes out.

    Attributes:
        nodes: which agent is which node of the placement.
        exits: exit code by rank, in the order in which they were seen; ranks that we killed are left out.
        lost: agents that are gone.
        step: the newest step that a rank had done; -1 before the first.
        hung: the rank at fault and the sentence about it, once the attempt hung.
        ended_before_stop: ranks that had ended when the others were asked to stop.
        joined: False once a rank without a Context has ended.
    """

    def __init__(
        self,
        attempt: int,
        nodes: Mapping[int, int],
        ranks_per_node: int,
        hang_after: float,
        send: Callable[[ToAgent], None],
    ) -> None:
        self.attempt, self.nodes, self.ranks_per_node = attempt, nodes, ranks_per_node
        self.send = send
        self.alive = {rank for node in nodes.values() for rank in self._ranks_of(node)}
        self.exits: dict[int, int] = {}
        self.lost: list[int] = []
        self.step = -1
        self.hung: tuple[int | None, str] | None = None
        self.joined = True
        self.ended_before_stop: frozenset[int] = frozenset()
        self._ended_at: dict[int, float] = {}
        self.kill_at: float | None = None  # seconds of the event loop's clock
        self._killed = self._stopping = False
        self._beats: dict[int, RankStatus] = {}
        self._unseen = 0  # reports of ranks since all were looked at
        self._watch = HangDetector(hang_after)
        self._suspects: dict[int, RankStatus] | None = None  # the status of the ranks when they were found to hang
        self._places: dict[int, StackLocation] = {}
        self._records: dict[int, list[GroupRecord] | None] = {}
        self._unreported: set[int] = set()  # ranks that were found to hang and have not reported where

    def owns(self, agent: int, message: AgentMessage) -> bool:
        """Return whether `message` is about ranks of the node of `agent` only."""
        own = self._ranks_of(self.nodes[agent]) if agent in self.nodes else range(0)
        return all(map(own.__contains__, ranks_in(message)))

    def _ranks_of(self, node: int) -> range:
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)

    @property
    def over(self) -> bool:
        return not self.alive

    @property
    def progress(self) -> int | None:
        """The newest step, for people and for the policy; None if no rank has reported one."""
        return self.step if self.step > 0 else None

    @property
    def all_with_context(self) -> bool:
        """Whether every rank has reported a step, so that it has a Context."""
        beats = self._beats.values()
        return self.joined and len(beats) == len(self.alive) and all(beat.step >= 0 for beat in beats)

    def ask_to_stop(self, grace: float, also_sent: bool = False) -> dict[str, Any]:
        """Send SIGTERM to the ranks and kill them after `grace` seconds; returns the fields of the event about it.

        With `also_sent` a scheduler sends SIGTERM to the ranks itself, perhaps later than this message arrives. A program
        without a Context has the whole grace on every rank, whatever has become of the others.
        """
        together = self.all_with_context
        if not together and self._suspects is None and not self._killed:
            self.kill_at = None
        self._stopping = not together
        self.ended_before_stop = frozenset(self.exits)
        if self.over:
            self.stopped_before()
        self.kill_within(grace)
        self.send(Signal(signal.SIGTERM, after=min(TIMEOUTS.same_stop, grace / 2) if also_sent else 0.0))
        return {"ranks": len(self.alive), "context": together, "grace": grace}

    def stopped_before(self) -> None:
        """Take in that the ranks have ended by a stop that this process received only after their end."""
        last = max(self._ended_at.values(), default=0.0)
        early = {rank for rank, at in self._ended_at.items() if at < last - TIMEOUTS.late_signal_scheduler}
        self.ended_before_stop = frozenset(early)

    def kill_within(self, seconds: float) -> None:
        """Kill what still runs `seconds` from now, or sooner where that was settled before."""
        if self._killed:
            return
        wanted = asyncio.get_running_loop().time() + seconds
        self.kill_at = wanted if self.kill_at is None else min(self.kill_at, wanted)

    def on_deadline(self) -> None:
        """Kill the ranks at `kill_at`; if that was done before, give up the nodes on which ranks are left."""
        if self._killed:
            stuck = {agent for agent, node in self.nodes.items() if self.alive & set(self._ranks_of(node))}
            self.lost += sorted(stuck - {*self.lost})
            self.alive.clear()
            return
        if self._suspects is not None and self.hung is None:
            self.hung = find_culprit(self._suspects, self._places, self._records)
        self.send(Signal(signal.SIGKILL))
        self._killed, self.kill_at = True, asyncio.get_running_loop().time() + TIMEOUTS.killed_rank

    def on_message(self, agent: int, message: AgentMessage) -> None:
        """Update the state by a message of an agent."""
        match message:
            case RankExit():
                self._on_exit(message)
            case Lost():
                self._on_lost(agent)
            case Heartbeats(ranks):
                self._on_statuses(ranks)
            case Stacks(ranks):
                self._places |= ranks
                self._unreported -= ranks.keys() & self._records.keys()
            case Collectives(rank, groups):
                self._records[rank] = groups
                self._unreported -= {rank} & self._places.keys()
            case StopRequest() | NodeChecked() | Joined():
                pass
            case _:
                assert_never(message)
        if self._suspects is not None and not self._unreported:
            self.kill_within(0.0)  # nothing more to wait for

    def _on_exit(self, end: RankExit) -> None:
        self.alive.discard(end.rank)
        self._unreported.discard(end.rank)
        self._beats.pop(end.rank, None)
        self.step = max(self.step, end.step)
        self.joined = self.joined and end.step >= 0
        if self._killed:
            return
        self.exits[end.rank] = end.code
        self._ended_at[end.rank] = asyncio.get_running_loop().time()
        if self._stopping and end.step < 0:
            return
        # A scheduler's SIGTERM may reach a rank before it reaches the agent.
        if end.code < 0 and end.code != -signal.SIGTERM:
            self.kill_within(0.0)
        elif end.code < 0 or end.code in (RAISED, BAD_REQUEST, DISK_FULL, ERROR_NOT_WRITTEN):
            self.kill_within(TIMEOUTS.error_grace)

    def _on_lost(self, agent: int) -> None:
        if agent not in self.nodes:  # a spare one, or one that was lost before this attempt
            return
        self.lost.append(agent)
        gone = set(self._ranks_of(self.nodes[agent]))
        self.alive -= gone
        self._unreported -= gone
        for rank in gone:
            self._beats.pop(rank, None)
        self.kill_within(0.0)

    def _on_statuses(self, beats: Mapping[int, RankStatus]) -> None:
        found = {rank: beat for rank, beat in beats.items() if rank in self.alive}
        self._beats |= found
        self.step = max([self.step, *[beat.step for beat in found.values()]])
        self._unseen += len(found)
        ending = self.kill_at is not None or self._killed
        if ending or self._unseen < len(self.alive) or len(self._beats) < len(self.alive):
            return
        self._unseen = 0  # all ranks are looked at once for as many reports, so that a report costs the same in any run
        if self._watch.see(self._beats, asyncio.get_running_loop().time()):
            self._suspects, self._unreported = dict(self._beats), {*self.alive}
            self.send(DumpStacks(self.attempt))
            self.kill_within(TIMEOUTS.stack_dump + TIMEOUTS.collectives + 2.0)  # the messages need a moment, too
