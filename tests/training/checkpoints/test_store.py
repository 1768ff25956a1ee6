from __future__ import annotations

import hashlib
import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.faults import parts, same, save_with_a_fault
from tests.training.ranks import spawn
from training.checkpoints import host_copy
from training.checkpoints.manifest import FORMAT, MANIFEST, load, read_manifest, verify, write_file, write_manifest
from training.checkpoints.store import Checkpoint, Checkpoints
from training.distributed.world import World
from training.errors import CheckpointError


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    assert store.latest() is None
    store.save(5, parts(5), wait=True)
    newest = store.latest()
    store.close()
    assert newest is not None
    assert newest.step == 5
    assert same(load(newest.path), parts(5))
    assert torch.equal(load_file(newest.path / "model.safetensors")["weight"], parts(5)["model.safetensors"]["weight"])
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000000005"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.9), (5, 0.1), (6, None), (7, None)):
        store.save(step, parts(step), score=score)
    store.close()
    assert [saved.step for saved in store.committed()] == [4, 6, 7]  # the newer of 2 and 4, which have the same score
    assert [saved.score for saved in store.committed()] == [0.9, None, None]


def test_training_may_change_the_tensors_once_save_has_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Checkpoint] = []
    store = Checkpoints(tmp_path, keep=9)
    store.on_saved = saved.append
    go = threading.Event()

    def slow(path: Path, content: Any) -> dict[str, Any]:
        assert go.wait(20)
        return write_file(path, content)

    monkeypatch.setattr("training.checkpoints.store.write_file", slow)
    state = parts(1)
    store.save(1, state)
    state["model.safetensors"]["weight"].zero_()
    assert store.committed() == []
    threading.Timer(0.2, go.set).start()
    began = time.monotonic()
    store.save(2, parts(2))  # waits for the first
    assert time.monotonic() - began > 0.1
    store.close()
    assert [checkpoint.step for checkpoint in saved] == [1, 2]
    assert same(load(saved[0].path), parts(1))


def test_tensors_are_copied_while_training_goes_on_until_it_changes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Checkpoint] = []
    store = Checkpoints(tmp_path)
    store.on_saved = saved.append
    go = threading.Event()
    copy = host_copy._copy

    def slow(pairs: Any) -> None:
        assert go.wait(20)
        copy(pairs)

    monkeypatch.setattr(host_copy, "_copy", slow)
    state = parts(1)
    store.save(1, state, later=True)  # returns before anything is copied
    threading.Timer(0.2, go.set).start()
    store.wait_for_copy()
    state["model.safetensors"]["weight"].zero_()
    store.wait_for_copy()  # returns at once
    store.close()
    assert same(load(saved[0].path), parts(1))
    assert 0.1 < saved[0].stall_seconds < 10


def test_a_copy_that_fails_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[Exception] = []
    store = Checkpoints(tmp_path)
    store.on_failed = lambda step, error: failed.append(error)

    def fails(pairs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(host_copy, "_copy", fails)
    store.save(1, parts(1), later=True)
    store.wait_for_copy()
    store.close()
    assert [type(error) for error in failed] == [MemoryError]
    assert store.committed() == []


def test_a_full_disk_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[tuple[int, str]] = []
    store = Checkpoints(tmp_path)
    store.on_failed = lambda step, error: failed.append((step, str(error)))
    store.save(1, parts(1), wait=True)

    def full(path: Path, content: Any) -> dict[str, Any]:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("training.checkpoints.store.write_file", full)
        store.save(2, parts(2), wait=True)
    assert failed == [(2, "[Errno 28] No space left on device")]
    assert os.listdir(tmp_path) == ["step-000000001"]
    store.save(3, parts(3))
    store.close()
    assert [saved.step for saved in store.committed()] == [1, 3]


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        store.save(step, parts(step), wait=True)
    (tmp_path / "step-000000003" / "state.json").write_text("{}")
    (tmp_path / "step-000000002" / MANIFEST).unlink()
    told: list[str] = []
    store.on_damaged = lambda error: told.append(str(error))
    with pytest.warns(UserWarning, match="passing over a damaged checkpoint") as warned:
        newest = store.latest()
    assert newest is not None
    assert newest.step == 1
    assert ["state.json" in str(warned[0].message), MANIFEST in str(warned[1].message)] == [True, True]
    assert len(told) == 2
    store.save(3, parts(3), wait=True)  # the run repeats step 3, which replaces the damaged checkpoint
    store.close()
    newest = store.latest()
    assert newest is not None
    assert newest.step == 3


def test_a_good_checkpoint_of_the_same_step_stays(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, parts(1), wait=True)
    before = (tmp_path / "step-000000001").stat().st_ino
    store.save(1, parts(1))
    store.close()
    assert (tmp_path / "step-000000001").stat().st_ino == before


def test_where_all_are_damaged_nothing_is_thrown_away(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, parts(1))
    store.close()
    (tmp_path / "step-000000001" / "model.safetensors").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match=r"every checkpoint .* damaged .*model.safetensors.*move that folder"),
    ):
        store.latest()


@pytest.mark.slow
def test_a_thousand_random_damages_are_all_detected(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "store")
    store.save(1, parts(1))
    store.close()
    good, bad = tmp_path / "store" / "step-000000001", tmp_path / "bad"
    names = sorted(os.listdir(good))
    rng = random.Random(0)
    for trial in range(1000):
        shutil.copytree(good, bad)
        file = bad / rng.choice(names)
        raw = bytearray(file.read_bytes())
        kind = ("flip", "flip", "cut", "gone")[trial % 4]
        if kind == "flip":
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            file.write_bytes(raw)
        elif kind == "cut":
            file.write_bytes(raw[: rng.randrange(len(raw))])
        else:
            file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            verify(bad)
        shutil.rmtree(bad)


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"format": 99, "step": 1, "score": None, "files": {}})
    with pytest.raises(CheckpointError, match="has format 99"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(tmp_path)


def test_a_checkpoint_of_the_format_before_is_read_still(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, parts(1), wait=True)
    store.close()
    folder = tmp_path / "step-000000001"
    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in read_manifest(folder)["files"]
    }
    write_manifest(folder, {"format": 1, "step": 1, "score": None, "files": files})
    newest = store.latest()
    assert newest is not None
    assert same(load(newest.path), parts(1))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written: its sha256 differs"):
        verify(folder)


def test_a_file_that_cannot_be_parsed_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no")
    entry = {"bytes": 2, "xxh3_128": "0" * 32}
    write_manifest(tmp_path, {"format": FORMAT, "step": 1, "score": None, "files": {"model.safetensors": entry}})
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


def _kill_at_every_change(world: World, folder: Path, changes: int) -> None:
    for when in range(1, changes + 1):
        child = os.fork()  # forked from a process without threads, so that no lock is held in the child
        if child == 0:
            save_with_a_fault(folder / str(when), when, kill=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), "the fault has not come"


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize("kill", [True, False])
def test_a_fault_at_any_change_of_a_file_leaves_a_good_checkpoint(tmp_path: Path, kill: bool) -> None:
    changes, saved = save_with_a_fault(tmp_path / "all", 0, kill=False)
    assert saved == [1, 2, 3]
    if kill:
        spawn(_kill_at_every_change, 1, tmp_path, changes)
    for when in range(1, changes + 1):
        folder = tmp_path / str(when)
        if not kill:
            save_with_a_fault(folder, when, kill=False)
        store = Checkpoints(folder, keep=1)
        newest = store.latest()  # warnings are errors: no damaged checkpoint is found
        assert newest is not None or not (tmp_path / f"{when}.committed").exists()
        if newest is not None:
            assert same(load(newest.path), parts(newest.step))
        store.clean()
        store.save(9, parts(9), wait=True)
        store.close()
        newest = store.latest()
        assert newest is not None
        assert newest.step == 9
        assert all(name.startswith("step-") for name in os.listdir(folder))
