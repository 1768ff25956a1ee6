from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.faults import parts, same
from tests.training.ranks import train_in
from training.bert.config import TrainConfig
from training.checkpoints import mirror as module
from training.checkpoints.manifest import MANIFEST, load
from training.checkpoints.mirror import Mirror, open_store
from training.checkpoints.store import Checkpoints
from training.distributed.world import World
from training.errors import CheckpointError, ConfigError
from training.files import read_lines
from training.train import check


def saved(folder: Path, mirror: Mirror, *steps: int) -> None:
    store = Checkpoints(folder)
    store.on_saved = mirror.push
    for step in steps:
        store.save(step, parts(step), score=1.0 if step == 1 else None, wait=True)
    store.close()
    mirror.close()


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_checkpoints_go_there_and_come_back(tmp_path: Path, uri: str) -> None:
    failed: list[Exception] = []
    mirror = Mirror(uri, "a run")
    mirror.on_failed = lambda step, error: failed.append(error)
    mirror.check()
    assert mirror.checkpoints() == []
    saved(tmp_path / "here", mirror, 1, 2, 3, 4)
    assert failed == []
    assert [checkpoint.step for checkpoint in mirror.checkpoints()] == [1, 3, 4], "the best and the newest two"
    path = Mirror(uri, "a run").pull("step-000000004", tmp_path / "elsewhere")
    assert same(load(path), parts(4))
    assert os.listdir(tmp_path / "elsewhere") == ["step-000000004"]


def test_a_copy_without_its_manifest_or_with_a_wrong_byte_is_none(tmp_path: Path) -> None:
    mirror = Mirror(f"file://{tmp_path}/store", "run")
    saved(tmp_path / "here", mirror, 2, 3)
    there = tmp_path / "store" / "run"
    (there / "step-000000003" / MANIFEST).unlink()
    assert [checkpoint.step for checkpoint in mirror.checkpoints()] == [2]
    file = there / "step-000000002" / "state.json"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"state\.json is not what was written"):
        mirror.pull("step-000000002", tmp_path / "elsewhere")
    assert os.listdir(tmp_path / "elsewhere") == []
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        mirror.pull("step-000000002", tmp_path / "elsewhere")


class Shaky:
    """A store whose operations fail sometimes, or always."""

    def __init__(self, fs: Any, period: int) -> None:
        self.fs, self.period, self.calls = fs, period, 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls % self.period == 0:
                raise ConnectionError("reset by peer")
            return getattr(self.fs, name)(*args, **kwargs)

        return call


def test_errors_that_pass_are_tried_again_and_others_do_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)
    mirror = Mirror(f"file://{tmp_path}/store", "run")
    failed: list[int] = []
    mirror.on_failed = lambda step, error: failed.append(step)
    fs = mirror._fs
    mirror._fs = Shaky(fs, 3)
    saved(tmp_path / "here", mirror, 1, 2)
    assert failed == []
    assert [checkpoint.step for checkpoint in mirror.checkpoints()] == [1, 2]
    mirror._fs = Shaky(fs, 1)
    saved(tmp_path / "here", mirror, 3)
    assert failed == [3]
    with pytest.raises(ConfigError, match=r"the store cannot be read and written .*reset by peer"):
        mirror.check()
    mirror._fs = fs
    assert [checkpoint.step for checkpoint in mirror.checkpoints()] == [1, 2]


class Garbling:
    """A store that changes what it stores."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fs, name)

    def pipe_file(self, path: str, content: bytes) -> None:
        self.fs.pipe_file(path, content[:-1])


def test_what_the_store_keeps_is_read_back(tmp_path: Path) -> None:
    mirror = Mirror(f"file://{tmp_path}/store", "run")
    failed: list[str] = []
    mirror.on_failed = lambda step, error: failed.append(str(error))
    mirror._fs = Garbling(mirror._fs)
    saved(tmp_path / "here", mirror, 1)
    assert len(failed) == 1
    assert failed[0].endswith("step-000000001/manifest.json is not what was written")
    assert mirror.checkpoints() == []


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_found_out_at_once_and_not_made(uri_of_s3: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read and written .*that the bucket exists"):
        Mirror("s3://no-such-bucket/folder", "run").check()
    assert not open_store("s3://no-such-bucket")[0].exists("no-such-bucket")
    mirror = Mirror(uri_of_s3, "run")
    mirror.check()
    assert mirror._fs.find(mirror._root) == [], "nothing is left of the probe"


def test_stores_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="write it as s3://"):
        check(TrainConfig(mirror="nonsense://bucket"))
    from fsspec.registry import known_implementations  # type: ignore[import-untyped]

    odd = {"class": "no_such_package.Odd", "err": "Install no_such_package to use it"}
    monkeypatch.setitem(known_implementations, "odd", odd)
    with pytest.raises(ConfigError, match="Install no_such_package"):
        open_store("odd://bucket/folder")


@pytest.mark.slow
@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("uri", ["folder"], indirect=True)  # S3 with two nodes: see test_store.py
def test_a_run_goes_on_from_the_mirror_where_its_disk_is_gone(tmp_path: Path, small: Path, uri: str) -> None:
    options: dict[str, Any] = {
        "dataset": str(small), "epochs": 2, "batch_size": 8, "log_with": (), "cache": tmp_path / "cache", "mirror": uri,
    }  # fmt: skip
    one, other = tmp_path / "one" / "run", tmp_path / "other" / "run"
    train_in(World(threads=1), one, **options, max_steps=10)
    assert [line["step"] for line in read_lines(one / "events.jsonl") if line["event"] == "mirrored"] == [7, 10]
    result, _ = train_in(World(threads=1), other, **options)
    events = {line["event"]: line for line in read_lines(other / "events.jsonl")}
    assert events["fetched"]["step"] == events["resumed"]["step"] == 10
    assert result["steps"] == 14


@pytest.mark.slow
def test_a_damaged_disk_is_healed_by_the_mirror(tmp_path: Path, small: Path) -> None:
    options: dict[str, Any] = {
        "dataset": str(small), "epochs": 2, "batch_size": 8, "log_with": (), "cache": tmp_path / "cache",
        "mirror": f"file://{tmp_path}/store",
    }  # fmt: skip
    run = tmp_path / "run"
    train_in(World(threads=1), run, **options, max_steps=10)
    for file in run.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        result, _ = train_in(World(threads=1), run, **options)
    assert result["steps"] == 14
    assert "fetched" in {line["event"] for line in read_lines(run / "events.jsonl")}
    shutil.rmtree(tmp_path / "store")


class Dying:
    """A store that fails from its `when`-th operation on, as if this process had been killed."""

    def __init__(self, fs: Any, when: int) -> None:
        self.fs, self.when, self.calls = fs, when, 0

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls >= self.when:
                if name == "put_file":
                    Path(args[1]).write_bytes(b"half")
                raise ConnectionError("killed")
            return getattr(self.fs, name)(*args, **kwargs)

        return call


@pytest.mark.slow
def test_a_death_at_any_operation_of_an_upload_leaves_whole_copies_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRIES", 1)
    for when in range(1, 100):
        uri = f"file://{tmp_path}/store{when}"
        saved(tmp_path / f"here{when}", Mirror(uri, "run"), 2, 3)
        mirror = Mirror(uri, "run")
        dying = Dying(mirror._fs, when)
        mirror._fs = dying
        saved(tmp_path / f"here{when}", mirror, 4, 5)
        there = Mirror(uri, "run")
        steps = [checkpoint.step for checkpoint in there.checkpoints()]
        assert steps
        assert set(steps) <= {2, 3, 4, 5}
        for checkpoint in there.checkpoints():
            path = there.pull(checkpoint.path.name, tmp_path / f"elsewhere{when}")
            assert same(load(path), parts(checkpoint.step))
        if dying.calls < when:
            assert steps == [4, 5]
            return
    pytest.fail("an upload takes fewer operations than that")
