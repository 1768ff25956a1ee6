"""A worker group: the workers that one `fit` of Ray Train holds, from its start to its end."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from launcher.agent.protocol import Start
from launcher.agent.worker_messages import RayMessage
from launcher.backends.ray.cluster import SLICE, TOPOLOGY, WORKER, RayNode
from launcher.request.placement.tpu import Topology, rank_environment
from launcher.request.spec import Plan
from training.distributed.visible import visible_devices
from training.distributed.world import World

Inbox = asyncio.Queue[tuple[str, RayMessage]]
"""Messages to the driver, with the id of the node that sent each."""


@dataclass(frozen=True)
class Member:
    """A worker of Ray Train that is ready: its number there, its node, and the environment that Ray gave it."""

    worker: int
    node: RayNode
    environment: dict[str, str] = field(default_factory=dict)


class WorkerGroup:
    """One `fit`, in a thread of its own.

    Attributes:
        members: the workers that are ready; all of them, in the order of their ranks, once the group is `complete`.
        broken: one of its workers is gone, so it cannot carry another attempt.
        error: why it ended, or what `fit` raised.
        lost_before: how many nodes the run had lost when it began.
    """

    def __init__(self, plan: Plan, number: int, ranks: int, lost_before: int = 0) -> None:
        self.plan, self.number, self.ranks, self.lost_before = plan, number, ranks, lost_before
        self.members: list[Member] = []
        self.broken = False
        self.error: BaseException | None = None
        self.done = asyncio.Event()

    def start(self, asked: dict[str, Any]) -> None:
        """Send the request to Ray; `asked` is what `launcher.backends.ray.backend.trainer` returned."""
        loop = asyncio.get_running_loop()

        def run() -> None:
            try:
                self._fit(asked)
            except BaseException as error:
                self.error = self.error or error
            loop.call_soon_threadsafe(self.done.set)

        threading.Thread(target=run, name="fit", daemon=True).start()

    def _fit(self, asked: dict[str, Any]) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from launcher.backends.ray.train_worker import LeanTrainer, RankConfig, hold_rank

        run = asked["run_config"]
        run["failure_config"] = FailureConfig(**run["failure_config"])
        LeanTrainer(
            hold_rank,
            train_loop_config={"run_dir": str(self.plan.run_dir), "group": self.number},
            backend_config=RankConfig(),
            scaling_config=ScalingConfig(**asked["scaling_config"]),
            run_config=RunConfig(**run),
        ).fit()

    def register(self, member: Member) -> None:
        """Add a worker that is ready."""
        self.members.append(member)
        if self.complete:
            self.members.sort(key=_order)

    @property
    def complete(self) -> bool:
        return len(self.members) == self.ranks

    def misplaced(self) -> bool:
        """Whether Ray gave chips of other slices than those that were asked for; `cause` then says so.

        With other jobs beside this one, Ray may also fill up several slices by halves.
        """
        wanted = self.plan.placement.topology
        if wanted is None:
            return False
        # A node that does not say what it is part of cannot be judged.
        given = Counter((_slice(m), m.node.labels[TOPOLOGY]) for m in self.members if TOPOLOGY in m.node.labels)
        for (name, shape), chips in given.items():
            if (shape, chips) != (wanted, Topology.parse(wanted).chips):
                self.error = RuntimeError(f"Ray gave {chips} chips of slice {name}, which is a {shape}, for a {wanted}")
                return True
        return False

    @property
    def cause(self) -> BaseException | None:
        """What `fit` raised, without what Ray wrapped around it."""
        return None if self.error is None else _unwrap(self.error)

    def nodes(self) -> list[RayNode]:
        """The nodes of the members, in the order of their first ranks."""
        return list({member.node.id: member.node for member in self.members}.values())

    def ranks_on(self, node: str) -> list[int]:
        return [rank for rank, member in enumerate(self.members) if member.node.id == node]

    def visible_on(self, node: str) -> str | None:
        """The GPUs that Ray gave the ranks on a node, as CUDA_VISIBLE_DEVICES names them; None where it gave none."""
        given = [m.environment.get("CUDA_VISIBLE_DEVICES") for m in self.members if m.node.id == node]
        # Ray may show each worker those of all: named twice, none of them would count.
        return ",".join(dict.fromkeys(device for text in given for device in visible_devices(text) or ())) or None

    def rank_of(self, worker: int) -> int:
        return next(rank for rank, member in enumerate(self.members) if member.worker == worker)

    def starts(self, attempt: int, port: int) -> dict[str, Start]:
        """Return the message that starts the ranks of each node, by node id."""
        worlds = self.worlds(attempt, port)
        return {
            node: Start(attempt, [worlds[rank] for rank in local], {rank: self.environment(rank) for rank in local})
            for node, local in self._by_node().items()
        }

    def worlds(self, attempt: int, port: int) -> list[World]:
        """The world of each rank, in order."""
        nodes = self._by_node()
        places = {
            rank: (node_rank, local_rank)
            for node_rank, ranks in enumerate(nodes.values())
            for local_rank, rank in enumerate(ranks)
        }
        return [
            World(
                rank=rank,
                local_rank=places[rank][1],
                node_rank=places[rank][0],
                world_size=self.ranks,
                local_world_size=len(nodes[member.node.id]),
                num_nodes=len(nodes),
                master_addr=self.members[0].node.address,
                master_port=port,
                device=self.plan.placement.device,
                threads=self.plan.placement.threads,
                attempt=attempt,
                run_id=self.plan.name,
            )
            for rank, member in enumerate(self.members)
        ]

    def _by_node(self) -> dict[str, list[int]]:
        """The ranks of each node, by node id, in the order of `nodes`."""
        found: dict[str, list[int]] = {}
        for rank, member in enumerate(self.members):
            found.setdefault(member.node.id, []).append(rank)
        return found

    def environment(self, rank: int) -> dict[str, str]:
        """The variables of a rank: those that Ray gave its worker, and on a TPU those of its slice."""
        member = self.members[rank]
        return member.environment | (self._slice_environment(member) if self.plan.placement.on_tpu else {})

    def _slice_environment(self, member: Member) -> dict[str, str]:
        slices = list(dict.fromkeys(_slice(each) for each in self.members))
        hosts = [self._hosts(name) for name in slices]
        number = slices.index(_slice(member))
        local = [each for each in self.members if each.node.id == member.node.id]
        return rank_environment(
            [list(each.values()) for each in hosts],
            number,
            list(hosts[number]).index(member.node.id),
            local.index(member),
            len(local),
            self.plan.placement.topology or "1x1",
            f"{self.plan.name}-{self.number}",
        )

    def _hosts(self, name: str) -> dict[str, str]:
        """The addresses of the hosts of a slice, by node, in the order of their ranks."""
        return {each.node.id: each.node.address for each in self.members if _slice(each) == name}


def _slice(member: Member) -> str:
    return member.node.labels.get(SLICE, member.node.id)


def _order(member: Member) -> tuple[Any, ...]:
    """Ranks follow Ray's numbers; on a TPU they follow the slices, their hosts, and the chips of a host."""
    if SLICE not in member.node.labels:
        return "", 0, member.worker
    chips = member.environment.get("TPU_VISIBLE_CHIPS", "")
    return (
        _slice(member),
        int(member.node.labels.get(WORKER, 0)),
        *map(int, filter(None, chips.split(","))),
        member.worker,
    )


def _unwrap(error: BaseException) -> BaseException:
    """Unwrap Ray's exceptions down to what happened."""
    for name in ("controller_failure", "_base_exc", "cause", "__cause__"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _unwrap(inner)
    return error
