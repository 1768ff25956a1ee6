"""The working side on Ray: what the controller does when workers start, and what each worker runs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.util
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from launcher.network import reserve_port
from launcher.rundir import RunDir
from launcher.worker import RAISED, REFUSED, work
from training.world import World


class RankEnded(RuntimeError):
    """A rank ended badly; raised so that Ray ends the other ranks, which would wait for it in a collective."""

    def __init__(self, rank: int, status: int) -> None:
        super().__init__(rank, status)
        self.rank, self.status = rank, status


@dataclass(frozen=True)
class Rendezvous:
    """What the ranks of an attempt have to agree on."""

    address: str
    port: int
    attempt: int
    num_nodes: int = 1


_state: dict[str, Any] = {}
"""This worker process's rendezvous and the socket that holds its port: set by `on_start`, read by `train_rank`."""


def open_attempt(run_dir: str) -> Rendezvous:
    """On rank 0's worker: claim the attempt, and hold a port for its process group."""
    directory = RunDir(Path(run_dir))
    holder = _state["holder"] = reserve_port()
    return Rendezvous(ray.util.get_node_ip_address(), holder.getsockname()[1], directory.claim_attempt())


def where() -> tuple[str, str]:
    """On every worker: its node's id and its host's name."""
    return ray.get_runtime_context().get_node_id(), socket.gethostname()


def join_attempt(rendezvous: Rendezvous) -> None:
    """On every worker: remember the rendezvous."""
    _state["rendezvous"] = rendezvous


class AgreeOnly(Backend):  # type: ignore[misc]
    """Tells every worker where rank 0 is and leaves the process group to the target.

    Ray's own backend makes the group before the target runs, and a script written for torchrun then fails on
    `init_process_group`, "trying to initialize the default process group twice".
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: RankConfig) -> None:
        """Claim the attempt on rank 0 and tell every worker of it; Ray calls this before the train function."""
        rendezvous = worker_group.execute_single(0, open_attempt, backend_config.run_dir)
        nodes = dict(places := worker_group.execute(where))
        worker_group.execute(join_attempt, replace(rendezvous, num_nodes=len(nodes)))
        RunDir(Path(backend_config.run_dir)).event(
            "started", attempt=rendezvous.attempt, world_size=len(places), hosts=list(nodes.values())
        )


@dataclass
class RankConfig(TorchConfig):  # type: ignore[misc]
    """A TorchConfig whose backend is `AgreeOnly`."""

    run_dir: str = ""

    @property
    def backend_cls(self) -> type[Backend]:
        return AgreeOnly


def train_rank(config: dict[str, Any]) -> int:
    """The train function: be one rank of the run. Returns its exit status.

    Raises:
        RankEnded: the target raised.
    """
    run_dir = RunDir(Path(config["run_dir"]))
    context = ray.train.get_context()
    rendezvous: Rendezvous = _state["rendezvous"]
    world = World(
        rank=context.get_world_rank(),
        local_rank=context.get_local_rank(),
        node_rank=context.get_node_rank(),
        world_size=context.get_world_size(),
        local_world_size=context.get_local_world_size(),
        num_nodes=rendezvous.num_nodes,
        master_addr=rendezvous.address,
        master_port=rendezvous.port,
        device=config["device"],
        threads=config["threads"],
        attempt=rendezvous.attempt,
        run_id=config["name"],
    )
    with _logged(run_dir.log(world.attempt, world.rank)), _signals_tolerated():
        status = work(run_dir, world)
    if status in (RAISED, REFUSED):
        raise RankEnded(world.rank, status)
    return status


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send this process's output to the rank's log, its libraries' included; one rank has the process to itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


@contextmanager
def _signals_tolerated() -> Iterator[None]:
    """Let a script install signal handlers, as it does under torchrun; Ray runs it in a thread, where Python refuses.

    The handlers are never called: no signal reaches a Ray worker, whose stop comes through the run directory.
    """
    original = signal.signal

    def tolerant(number: int, handler: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            return original(number, handler)
        return signal.getsignal(number)

    signal.signal = tolerant  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = original
