from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.training.ranks import free_port, spawn
from training import context as module
from training.context import Context
from training.errors import ConfigError
from training.files import read_lines
from training.group import Group, TorchGroup, make_group
from training.world import World

pytestmark = pytest.mark.usefixtures("rank_server")


def test_records(tmp_path: Path) -> None:
    with Context(tmp_path, World(attempt=3)) as ctx:
        ctx.log(5, loss=0.5)
        ctx.event("saved", step=5)
    with Context(tmp_path, World(1, 1, 0, 2, 2, 1, master_port=1)) as other:
        other.log(5, loss=0.7)
        other.event("hello")
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line == {"time": line["time"], "attempt": 3, "step": 5, "loss": 0.5}
    first, second = read_lines(tmp_path / "events.jsonl")
    assert first == {"time": first["time"], "attempt": 3, "rank": 0, "event": "saved", "step": 5}
    assert (second["rank"], second["event"]) == (1, "hello")


def test_one_process_stops_when_asked_by_a_signal_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAT_SECONDS", 0.0)
    ctx = Context(tmp_path, World())
    before = signal.signal(signal.SIGUSR1, lambda *_: ctx.request_stop("SIGUSR1"))
    try:
        assert not ctx.should_stop(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ctx.should_stop(2)
        assert ctx.stop_reason == "SIGUSR1"
    finally:
        signal.signal(signal.SIGUSR1, before)
    other = Context(tmp_path, World())
    assert not other.should_stop(1)
    (tmp_path / "stop").touch()
    assert other.should_stop(2)
    assert other.should_stop(3)
    assert other.stopped
    monkeypatch.setattr(module, "STAT_SECONDS", 60.0)
    other = Context(tmp_path, World())
    other._next_stat = time.monotonic() + 60
    assert not other.should_stop(1), "the disk is not asked at every step"


def _stops_at(world: World, folder: Path, asker: int, when: int) -> tuple[int, bool]:
    with Context(folder, world) as ctx:
        for step in range(1, 50):
            if step == when and world.rank == asker:
                ctx.request_stop("test")
            time.sleep(0.001 * ((world.rank * 7 + step) % 3))
            if ctx.should_stop(step):
                return step, ctx.stopped
    return 0, ctx.stopped


@pytest.mark.parametrize("asker", [0, 2])
@pytest.mark.slow
def test_all_ranks_stop_at_the_same_step(tmp_path: Path, asker: int) -> None:
    assert spawn(_stops_at, 3, tmp_path, asker, 7) == [(8, True)] * 3


@pytest.mark.slow
def test_nobody_asks_nobody_stops(tmp_path: Path) -> None:
    assert spawn(_stops_at, 2, tmp_path, 9, 0) == [(0, False)] * 2


def _collectives(world: World) -> object:
    import torch.distributed as dist

    group = make_group(world)
    group.barrier()
    found = group.broadcast({"from": world.rank}, src=1), group.gather(world.rank), group.any(world.rank == 1)
    inner = TorchGroup(world)  # as in Ray: the process group is there already
    assert inner.gather(world.rank * 2) == [0, 2]
    inner.close()
    assert dist.is_initialized()
    assert not group.any(False)
    group.close()
    group.close()
    assert not dist.is_initialized()
    return found


@pytest.mark.slow
def test_collectives() -> None:
    assert spawn(_collectives, 2) == [({"from": 1}, [0, 1], True)] * 2
    alone = Group()
    alone.barrier()
    assert (alone.broadcast(3), alone.gather(4), alone.any(True), alone.any(False)) == (3, [4], True, False)
    alone.close()


def test_a_notebook_needs_no_more_than_a_folder(tmp_path: Path) -> None:
    with Context.here(tmp_path / "new" / "run") as ctx:
        assert ctx.device.type in ("cpu", "cuda")
        assert ctx.group.size == 1
        assert ctx.checkpoints.latest() is None


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    worlds = [World(rank, rank, 0, 3, 3, 1, master_port=free_port(), device="cuda") for rank in range(3)]
    assert Context(tmp_path, worlds[1]).device == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="needs GPU 2, but 2 are visible"):
        _ = Context(tmp_path, worlds[2]).device
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Context(tmp_path, worlds[2]).device == torch.device("cuda", 0)
