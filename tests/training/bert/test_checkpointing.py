"""Checkpoints of several machines and failing disks: no committed checkpoint is lost."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.faults import parts, save_with_a_fault, shards
from tests.training.ranks import assert_same_end, spawn, train_in
from training.checkpoints.manifest import load, read_manifest
from training.checkpoints.store import Checkpoints
from training.context import Context
from training.distributed.world import World
from training.errors import CheckpointError, ConfigError
from training.files import read_lines
from training.loop.saved import SavedState
from training.loop.steps import Step

Options = dict[str, Any]
AT_ONCE = 24  # trials in parallel; they mostly wait for each other and for the disk


@pytest.fixture
def options(small: Path, tmp_path: Path) -> Options:
    return {
        "dataset": str(small), "batch_size": 4, "global_batch": 8, "epochs": 2, "log_every": 1, "save_every": 3,
        "keep": 1, "cache": tmp_path / "cache", "log_with": (),
    }  # fmt: skip


# --- a sharded save in which one machine is killed


def _machine(folder: Path, rank: int, when: int) -> int:
    """One of two machines that save steps 1 and 2: a process, killed at its `when`-th change of a file."""
    child = os.fork()  # forked from a process without threads, so that no lock is held in the child
    if child == 0:
        try:
            save_with_a_fault(folder, when, kill=True, part=(rank, 2), steps=(1, 2), patience=0.3)
        finally:
            os._exit(0)
    return child


def _die_at_every_change(world: World, folder: Path, victim: int) -> int:
    """Kill rank `victim` at its first change of a file, its second, ...; returns the number of changes."""
    died = 0
    while True:
        trials = range(died + 1, died + 1 + AT_ONCE)
        pairs = [
            [_machine(folder / f"{victim}-{when}", rank, when * (rank == victim)) for rank in (0, 1)] for when in trials
        ]
        for when, pair in zip(trials, pairs, strict=True):
            killed = os.WIFSIGNALED(os.waitpid(pair[victim], 0)[1])
            if killed and when % 2:  # as the launcher does; in the other trials the survivor detects it by itself
                os.kill(pair[1 - victim], signal.SIGKILL)
            os.waitpid(pair[1 - victim], 0)
            died += killed
        if died < trials[-1]:
            return died


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_a_machine_that_dies_at_any_change_of_a_file_leaves_whole_checkpoints_only(tmp_path: Path) -> None:
    for victim, least in ((0, 20), (1, 8)):
        died = spawn(_die_at_every_change, 1, tmp_path, victim)[0]
        assert died > least
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(_goes_on, [tmp_path / f"{victim}-{when}" for when in range(1, died + 1)]))


def _goes_on(folder: Path) -> None:
    """Check that the checkpoints of two machines are valid and that two others can save again."""
    store, other = Checkpoints(folder, keep=1), Checkpoints(folder, keep=1)
    newest = store.latest()  # warnings are errors: no damaged checkpoint is found
    assert newest is not None or not folder.with_suffix(".committed").exists()
    if newest is not None:
        assert torch.equal(load(newest.path)["model.safetensors"]["weight"], whole(newest.step))
    store.clean()
    other.save(9, shards(9, 1), part=(1, 2))
    store.save(9, shards(9, 0), part=(0, 2), wait=True)
    other.close()
    store.close()
    assert os.listdir(folder) == ["step-000000009"]


def whole(step: int) -> torch.Tensor:
    return torch.cat([shards(step, rank)[f"model.rank{rank:05d}.safetensors"]["weight"] for rank in (0, 1)])


def test_no_rank_waits_for_ever_for_another(tmp_path: Path) -> None:
    stores = [Checkpoints(tmp_path), Checkpoints(tmp_path)]
    failed: list[str] = []
    for store in stores:
        store.patience = 0.05
        store.on_failed = lambda step, error: failed.append(str(error))
    stores[0].save(1, shards(1, 0), part=(0, 2), wait=True)
    assert failed.pop() == "rank 1 has not written its part of .step-000000001.staging in 0 s"
    stores[1].save(1, shards(1, 1), part=(1, 2), wait=True)  # starts late
    assert failed.pop() == "another rank could not write its part of .step-000000001.staging"
    stores[1].save(2, shards(2, 1), part=(1, 2), wait=True)
    assert "has not been committed by rank 0" in failed.pop()
    stores[0].clean()
    assert os.listdir(tmp_path) == []
    stores[1].save(1, shards(1, 1), part=(1, 2))
    stores[0].save(1, shards(1, 0), part=(0, 2))
    for store in stores:
        store.close()
    assert failed == []
    assert os.listdir(tmp_path) == ["step-000000001"]


# --- nodes without a shared disk


def train_apart(world: World, folder: Path, options: Options) -> tuple[dict[str, Any], list[str]]:
    """Run as one of the nodes with their own disks; returns the result or error, and its checkpoints."""
    node = replace(world, local_rank=0, node_rank=world.rank, local_world_size=1, num_nodes=world.world_size)
    run = folder / f"node{world.rank}" / "run"
    try:
        result = train_in(node, run, **options)[0]
    except (CheckpointError, ConfigError) as error:
        result = {"error": str(error)}
    return result, sorted(path.name for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.usefixtures("s3", "rank_server")
@pytest.mark.parametrize(("uri", "sharded"), [("folder", True), ("s3", False)], indirect=["uri"])
def test_nodes_without_a_common_disk_go_on_from_the_mirror(
    tmp_path: Path, options: Options, uri: str, sharded: bool
) -> None:
    options |= {"mirror": uri, "shard": sharded}
    spawn(train_apart, 2, tmp_path / "first", {**options, "max_steps": 4})
    # New machines: only the store has checkpoints.
    (one, there), (other, here) = spawn(train_apart, 2, tmp_path / "second", {**options, "max_steps": 9})
    assert one["steps"] == other["steps"] == 9
    assert (there, here) == (["step-000000009"], ["step-000000004"])
    events = {line["event"]: line for line in read_lines(tmp_path / "second/node0/run/events.jsonl")}
    assert events["fetched"]["step"] == events["resumed"]["step"] == 4
    # The second node has an old checkpoint, the first is new.
    shutil.rmtree(tmp_path / "second/node0")
    (_, there), (_, here) = spawn(train_apart, 2, tmp_path / "second", options)
    assert (there, here) == (["step-000000014"], ["step-000000009"])
    names = {path.name for path in (tmp_path / "second/node0/run/checkpoints/step-000000014").iterdir()}
    assert {"model.safetensors", "optimizer.safetensors"} <= names, "whole, because no other node could add its part"


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_a_node_that_lacks_the_checkpoint_is_named_to_all(tmp_path: Path, options: Options) -> None:
    options["max_steps"] = 1
    spawn(train_apart, 2, tmp_path, options)
    for result, _ in spawn(train_apart, 2, tmp_path, options):
        assert "is missing" in result["error"]
        assert "nodes that share no disk need --mirror" in result["error"]
    there = Checkpoints(tmp_path / "node1/run/checkpoints")
    there.save(1, parts(1))
    there.close()
    for result, _ in spawn(train_apart, 2, tmp_path, options):
        assert "is not the checkpoint that rank 0 has" in result["error"]


def test_a_copy_in_the_mirror_that_is_another_checkpoint_is_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        with Context(tmp_path / name / "run", World()) as ctx:
            ctx.state(mirror=f"file://{tmp_path}/store")
            ctx.run_dir.mkdir(parents=True)
            ctx.checkpoints.save(1, parts(len(name)), wait=True)
    digest = read_manifest(tmp_path / "one/run/checkpoints/step-000000001")["sha256"]
    with (
        Context(tmp_path / "third/run", World()) as ctx,
        pytest.raises(CheckpointError, match="as the mirror has it is not the checkpoint that rank 0 has"),
    ):
        ctx.state(mirror=f"file://{tmp_path}/store")._finder.bring("step-000000001", digest)


# --- failing disks


def fill(disk: Path, leave: int) -> Path:
    """Fill `disk` except for `leave` bytes; returns the file."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        file.write(b"\0" * max(0, shutil.disk_usage(disk).free - leave))
    return ballast


def at_step(monkeypatch: pytest.MonkeyPatch, actions: dict[int, Callable[[], object]]) -> None:
    """Call `actions` (step -> function) before these optimizer steps, without a save in progress."""
    batches = Step.__iter__
    count = itertools.count(1)

    def acting(step: Step) -> Iterator[Any]:
        if action := actions.get(next(count)):
            step._steps._rank.checkpoints.wait()
            action()
        return batches(step)

    monkeypatch.setattr(Step, "__iter__", acting)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(
    tmp_path: Path, options: Options, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = World(threads=1)
    train_in(one, tmp_path / "whole", **options)
    at_step(monkeypatch, {5: lambda: fill(disk, 200_000), 8: lambda: (disk / "ballast").unlink()})
    _, stopped = train_in(one, disk / "run", **options)
    assert not stopped
    events = read_lines(disk / "run" / "events.jsonl")
    assert [line["step"] for line in events if line["event"] == "saved"] == [3, 9, 12, 14]
    failed = {line["step"]: line["error"] for line in events if line["event"] == "save-failed"}
    assert failed.keys() == {6, 7}
    assert all("No space left on device" in error for error in failed.values())
    assert_same_end(tmp_path / "whole", disk / "run")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_nothing_ends_the_run_with_that_name_and_it_goes_on_later(
    tmp_path: Path, options: Options, disk: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    one, run = World(threads=1), disk / "run"
    train_in(one, tmp_path / "whole", **{**options, "keep": 9})

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True)

    with monkeypatch.context() as patch:
        at_step(patch, {8: (lambda: fill(disk, 0)) if fault == "full" else (lambda: remount("ro"))})
        with pytest.raises(OSError, match=r"run/.*\.jsonl|No space") as raised:
            train_in(one, run, **{**options, "keep": 9})
        assert raised.value.errno == {"full": errno.ENOSPC, "read-only": errno.EROFS}[fault]
    if fault == "read-only":
        with pytest.raises(OSError, match="Read-only file system"):  # nor can it start there
            train_in(one, run, **{**options, "keep": 9})
        remount("rw")
    else:
        (disk / "ballast").unlink()
    # On top of it the newest checkpoint is cut short, and the clock jumps forth and back from now on.
    newest = max((run / "checkpoints").glob("step-*")) / "model.safetensors"
    assert newest.parent.name == "step-000000007"
    os.truncate(newest, newest.stat().st_size // 2)
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(0, 4e9))
    with pytest.warns(UserWarning, match="damaged"):
        train_in(one, run, **{**options, "keep": 9})
    resumed = [line["step"] for line in read_lines(run / "events.jsonl") if line["event"] == "resumed"]
    assert resumed == [6]
    assert_same_end(tmp_path / "whole", run)


@pytest.mark.slow
def test_a_final_model_that_finds_no_room_is_published_by_the_next_start(
    tmp_path: Path, options: Options, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library that writes it raises its own exception, without the errno of a full disk."""
    one, run = World(threads=1), disk / "run"
    wait = SavedState.wait
    with monkeypatch.context() as patch:
        patch.setattr(SavedState, "wait", lambda self: (wait(self), fill(disk, 100_000))[0])
        with pytest.raises(OSError, match="No space left on device") as raised:
            train_in(one, run, **options)
    assert raised.value.errno == errno.ENOSPC
    assert not (run / "model").exists()
    (disk / "ballast").unlink()
    train_in(one, run, **options)
    assert sorted(path.name for path in run.iterdir() if path.name.startswith((".model", "model"))) == ["model"]
