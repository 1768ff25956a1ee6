from __future__ import annotations

import importlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.ranks import free_port, spawn
from training.context import Context
from training.distributed.group import Group, TorchGroup, make_group
from training.distributed.world import World
from training.errors import ConfigError, DeviceError
from training.files import read_lines
from training.loop import rank as module

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


def test_values_that_are_not_of_json(tmp_path: Path) -> None:
    import numpy as np
    import torch

    with Context(tmp_path, World()) as ctx:
        ctx.log(1, loss=torch.tensor(0.5), lr=np.float32(0.25), norm=float("nan"), eval={"f1": np.float64(0.1)})
        ctx.log(np.int64(2), loss=1)
    text = (tmp_path / "metrics.jsonl").read_text()
    one, two = (json.loads(line, parse_constant=pytest.fail) for line in text.splitlines())
    assert (one["loss"], one["lr"], one["norm"], one["eval"]) == (0.5, 0.25, "NaN", {"f1": 0.1})
    assert (two["step"], two["loss"]) == (2, 1)
    with Context(tmp_path, World()) as ctx:
        ctx.event("ids", ids=torch.tensor([1, 2]), share=np.float32(0.5))
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["ids"], event["share"]) == ([1, 2], 0.5)


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
    inner = TorchGroup(world)  # as in Ray: the process group exists already
    assert inner.gather(world.rank * 2) == [0, 2]
    assert inner.collect(world.rank * 2) == ([] if world.rank else [0, 2])
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
    assert alone.collect(4) == [4]
    alone.close()


def test_a_notebook_needs_no_more_than_a_folder(tmp_path: Path) -> None:
    with Context.single_process(tmp_path / "new" / "run") as ctx:
        assert ctx.device.type in ("cpu", "cuda")
        assert ctx.group.size == 1
        assert ctx.checkpoints.latest() is None


def gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None = None, problem: str = "") -> None:
    """A torch build for CUDA 13.0 with a number of GPUs; `problem` is the error of CUDA on first use."""
    import torch

    def use(*_: object) -> None:
        if problem:
            raise RuntimeError(problem)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", use)
    monkeypatch.setattr(torch.cuda, "init", use)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def device_of(folder: Path, rank: int, ranks: int) -> Any:
    world = World(rank, rank, 0, ranks, ranks, 1, master_port=free_port(), device="cuda")
    return Context(folder, world).device


TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"


@pytest.mark.parametrize(
    ("count", "visible", "problem", "rank", "words"),
    [
        (2, None, "", 2, "needs GPU 2, but 2 are visible: this machine has no more than 2"),
        (2, "4,5", "", 2, "needs GPU 2, but 2 are visible: CUDA_VISIBLE_DEVICES='4,5' shows 2, and hides the others"),
        (0, "", "", 0, "needs GPU 0, but 0 are visible: CUDA_VISIBLE_DEVICES='' shows 0, and hides the others"),
        (0, "-1,0", "No CUDA GPUs are available", 0, "CUDA_VISIBLE_DEVICES='-1,0' shows 0, and hides the others"),
        (0, "7", "No CUDA GPUs are available", 0, "CUDA_VISIBLE_DEVICES='7' names no GPU that this machine has"),
        (0, None, "No CUDA GPUs are available", 0, r"the driver shows no GPU \(No CUDA GPUs are available\)"),
        (0, None, NO_DRIVER, 0, "needs GPU 0, but 0 are visible: there is no NVIDIA driver"),
        (0, "0", TOO_OLD, 0, "it supports CUDA 12.2, and torch .* was built for CUDA 13.0"),
        (3, None, TOO_OLD, 1, "needs GPU 1, but the NVIDIA driver is too old: it supports CUDA 12.2, and torch"),
        (3, None, "CUDA driver version is insufficient for CUDA runtime version", 1, "its version is in nvidia-smi"),
        (
            1,
            None,
            "",
            0,
            "3 ranks on .* need a GPU each, but 1 is visible to all of them: this machine has no more than 1",
        ),
        (1, None, "", 1, "needs GPU 1, but 1 are visible: this machine has no more than 1"),
    ],
)
def test_a_gpu_that_is_not_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    visible: str | None,
    problem: str,
    rank: int,
    words: str,
) -> None:
    gpus(monkeypatch, count, visible, problem)
    with pytest.raises(DeviceError, match=words):
        device_of(tmp_path, rank, 3)


def test_a_gpu_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    gpus(monkeypatch, 2)
    assert device_of(tmp_path, 1, 2) == torch.device("cuda", 1)
    gpus(monkeypatch, 1, "MIG-11")  # each rank has its own
    assert device_of(tmp_path, 2, 3) == torch.device("cuda", 0)
    gpus(monkeypatch, 1)
    assert device_of(tmp_path, 0, 1) == torch.device("cuda", 0)


def test_what_is_not_about_the_driver_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1, problem="CUDA error: out of memory")
    with pytest.raises(RuntimeError, match=r"^CUDA error: out of memory$"):
        device_of(tmp_path, 0, 1)


def test_a_build_of_torch_for_cpus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(DeviceError, match=r"torch is a CPU build \(.*\); install its build for CUDA"):
        device_of(tmp_path, 0, 1)


def test_a_tpu_runtime_that_is_not_there_or_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that is not installed is an error of the profile; one that fails to load is an error of this machine."""
    monkeypatch.syspath_prepend(tmp_path)
    world = World(device="tpu")
    with pytest.raises(ConfigError, match=r"has no torch_tpu .*tpu_runtime = \"torch_xla\""):
        _ = Context(tmp_path, world).device
    for text, words in (
        ("import torch_tpu_part_that_is_not_there", "lacks a part: No module named 'torch_tpu_part_that_is_not_there'"),
        (
            "raise ImportError('libtpu.so: cannot open shared object file')",
            "cannot be loaded on .*: libtpu.so: cannot open",
        ),
        ("raise OSError('/dev/accel0: no such device')", "cannot be loaded on .*: /dev/accel0"),
    ):
        (tmp_path / "torch_tpu.py").write_text(f"{text}  # {len(text)}\n")
        with pytest.raises(DeviceError, match=words):
            _ = Context(tmp_path, world).device
        (tmp_path / "torch_tpu.py").unlink()
        importlib.invalidate_caches()
