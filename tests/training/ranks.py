"""Real ranks for tests, joined over gloo; forked from a server that has imported torch and transformers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from training.checkpoints.manifest import load
from training.context import Context
from training.distributed.world import World
from training.files import read_lines

PRELOAD = ["tests.training.preload"]
SECONDS = 240.0


@contextmanager
def serving(*modules: str) -> Iterator[None]:
    """The server from which `spawn` forks ranks; it imports `modules` ahead, too."""
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOAD, *modules])
    forkserver.ensure_running()
    try:
        yield
    finally:
        server: Any = vars(forkserver)["_forkserver"]
        os.kill(server._forkserver_pid, signal.SIGKILL)  # with SIGTERM it takes seconds to unload its modules
        server._stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def worlds(size: int, *, attempt: int = 1) -> list[World]:
    port = free_port()
    return [
        World(rank, rank, 0, size, size, 1, "127.0.0.1", port if size > 1 else 0, "cpu", 1, attempt, "test")
        for rank in range(size)
    ]


def spawn(
    work: Callable[..., Any], size: int, *args: Any, watch: Callable[[list[int]], object] | None = None
) -> list[Any]:
    """The results of `work(world, *args)` on `size` ranks; raises the first exception, with its traceback.

    For tests with the fixture `rank_server`. `watch` is called with the process ids, which it may kill, and waited for.
    """
    context = multiprocessing.get_context("forkserver")
    ranks = []
    for world in worlds(size):
        here, there = context.Pipe()
        process = context.Process(target=_enter, args=(there, work, world, args, dict(os.environ)))
        process.start()
        there.close()
        ranks.append((process, here))
    results: list[Any] = [None] * size
    try:
        if watch is not None:
            watch([process.pid or 0 for process, _ in ranks])
        pending: dict[Any, int] = {here: rank for rank, (_, here) in enumerate(ranks)}
        while pending:
            ready = wait(list(pending), SECONDS)
            assert ready, f"ranks {sorted(pending.values())} have not answered within {SECONDS} s"
            for answered in ready:
                assert isinstance(answered, Connection)
                rank = pending.pop(answered)
                try:
                    ok, value = answered.recv()
                except EOFError:
                    ok, value = True, None  # killed, as some tests intend
                if not ok:
                    raise AssertionError(f"rank {rank}:\n{value}")
                results[rank] = value
    finally:
        for process, _ in ranks:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
    return results


def _enter(pipe: Any, work: Callable[..., Any], world: World, args: tuple[Any, ...], env: dict[str, str]) -> None:
    os.environ.update(env)  # the server's environment may be older than the test's
    try:
        pipe.send((True, work(world, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def train_in(world: World, run_dir: Path, **options: Any) -> tuple[dict[str, Any], bool]:
    """Run the reference job as one rank; returns its result, and whether it was stopped."""
    from training.bert.config import TrainConfig
    from training.train import train

    run_dir.mkdir(parents=True, exist_ok=True)
    with Context(run_dir, world) as ctx:
        return train(ctx, TrainConfig(**options)), ctx.stopped


def train_in_world(world: World, run_dir: Path, options: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    torch.set_num_threads(1)
    return train_in(world, run_dir, **options)


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> the last logged loss."""
    return {line["step"]: line["loss"] for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line}


def final(run_dir: Path) -> dict[str, Any]:
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return load(newest)


def assert_same_checkpoint(left: Path, right: Path) -> None:
    """Compare weights, optimizer, generators, position and losses for bit-identity."""
    one, other = final(left), final(right)
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith(".safetensors"):
            assert one[name].keys() == other[name].keys()
            for key in one[name]:
                assert torch.equal(one[name][key], other[name][key]), f"{name}: {key}"
        else:
            assert one[name] == other[name], name
    assert losses(left) == losses(right)


def assert_same_end(left: Path, right: Path) -> None:
    """Compare the newest checkpoints, the losses and the published models for bit-identity."""
    assert_same_checkpoint(left, right)
    assert (left / "model" / "model.safetensors").read_bytes() == (right / "model" / "model.safetensors").read_bytes()
