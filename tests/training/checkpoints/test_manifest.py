"""Hostile manifests: names, types and sizes are reported as damage; no file outside is touched."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.training.faults import parts, same
from training.checkpoints.manifest import MANIFEST, load, parse_manifest, read_manifest, verify, write_file
from training.checkpoints.mirror import Mirror
from training.checkpoints.store import Checkpoints
from training.errors import CheckpointError
from training.files import MAX_JSON_BYTES

NAMES = [
    "../../outside/sentinel", "/{root}/outside/sentinel", "", ".", "..", "a/b", "a\\b", "a\0b", "x\n", "\ud800",
    "x" * 300, "manifest.json", "é" * 200,
]  # fmt: skip
FIELDS: list[dict[str, Any]] = [
    {"step": 1}, {"step": "2"}, {"step": -2}, {"step": True}, {"step": 2.0}, {"step": [2]}, {"step": None}, {"step": 10**400},
    {"score": "high"}, {"score": [1]}, {"score": True}, {"score": 10**400}, {"format": "2"}, {"format": [2]}, {"format": True},
    {"format": {}}, {"files": []}, {"files": None}, {"files": {"state.json": 7}}, {"files": {"state.json": {}}},
    *({"files": {"state.json": {"bytes": size, "xxh3_128": "0" * 32}}} for size in (-1, 1.5, "1", 2**63, None, float("nan"))),
    *({"files": {"state.json": {"bytes": 1, "xxh3_128": text}}} for text in ("", 5, "Z" * 32, "0" * 33, None)),
]  # fmt: skip
LACKING = ["step", "score", "format", "files", "sha256"]
RAW = [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"9" * 5000]


def spelled(body: dict[str, Any]) -> bytes:
    body = {key: value for key, value in body.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1).encode()


def attacks(folder: Path, good: dict[str, Any]) -> list[bytes]:
    """Manifests with a valid hash and an invalid field, and files that are no manifest."""
    content = (folder / "outside" / "sentinel").read_bytes()
    entry = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    named = [{**good, "files": {name.replace("/{root}", str(folder)): entry}} for name in NAMES]
    typed = [{**good, **fields} for fields in FIELDS]
    lacking = [{k: v for k, v in good.items() if k != name} for name in LACKING[:-1]]
    return [*map(spelled, [*named, *typed, *lacking]), *RAW]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2, local and in a store, and a file that must not change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "sentinel").write_text("untouched")
    mirror, store = Mirror(f"file://{tmp_path}/store", "run"), Checkpoints(tmp_path / "here")
    store.on_saved = mirror.push
    for step in (1, 2):
        store.save(step, parts(step), wait=True)
    store.close()
    mirror.close()
    return tmp_path


def untouched(folder: Path) -> bool:
    outside = folder / "outside"
    return os.listdir(outside) == ["sentinel"] and (outside / "sentinel").read_text() == "untouched"


@pytest.mark.filterwarnings("ignore:passing over a damaged checkpoint")
def test_a_hostile_manifest_is_a_damaged_checkpoint(two: Path) -> None:
    path = two / "here" / "step-000000002"
    for raw in attacks(two, read_manifest(path)):
        (path / MANIFEST).write_bytes(raw)
        store, told = Checkpoints(two / "here"), []  # type: ignore[var-annotated]
        store.on_damaged = lambda error, told=told: told.append(str(error))  # type: ignore[misc]
        newest = store.latest()
        assert newest is not None
        assert (newest.step, len(told)) == (1, 1), raw[:200]
        assert "step-000000002/manifest.json" in told[0]
        with pytest.raises(CheckpointError):
            load(path)
        assert untouched(two)


def test_a_hostile_manifest_in_a_store_is_passed_over(two: Path) -> None:
    there = two / "store" / "run" / "step-000000002"
    for raw in attacks(two, read_manifest(there)):
        (there / MANIFEST).write_bytes(raw)
        mirror, told = Mirror(f"file://{two}/store", "run"), []  # type: ignore[var-annotated]
        mirror.on_damaged = lambda error, told=told: told.append(str(error))  # type: ignore[misc]
        assert [checkpoint.step for checkpoint in mirror.checkpoints()] == [1], raw[:200]
        assert len(told) == 1
        with pytest.raises(CheckpointError):
            mirror.pull("step-000000002", two / "elsewhere")
        assert os.listdir(two / "elsewhere") == []
        assert untouched(two)
    assert same(load(mirror.pull("step-000000001", two / "elsewhere")), parts(1))
    for name in ("../../outside", "", ".", "step-٠٠٠٠٠٠٠٠١", "step-1"):
        with pytest.raises(CheckpointError, match="is not the name of a checkpoint"):
            mirror.pull(name, two / "elsewhere")


def test_a_hostile_manifest_here_uploads_nothing(two: Path) -> None:
    path = two / "here" / "step-000000002"
    before = sorted(map(str, (two / "store").rglob("*")))
    for raw in attacks(two, read_manifest(path)):
        (path / MANIFEST).write_bytes(raw)
        with pytest.raises(CheckpointError):
            Mirror(f"file://{two}/store", "run")._upload(path)
    assert sorted(map(str, (two / "store").rglob("*"))) == before


def test_a_link_in_a_checkpoint_is_not_followed(two: Path) -> None:
    path = two / "here" / "step-000000002"
    real = (path / "state.json").rename(two / "outside.json")
    (path / "state.json").symlink_to(real)
    for act in (verify, load, Mirror(f"file://{two}/store", "run")._upload):
        with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
            act(path)
    moved = path.rename(two / "moved")
    path.symlink_to(moved)
    with pytest.raises(CheckpointError, match="symbolic link, which is not followed"):
        verify(path)


def test_a_link_or_a_pipe_in_a_store_is_not_fetched(two: Path) -> None:
    there = two / "store" / "run" / "step-000000002"
    mirror = Mirror(f"file://{two}/store", "run")
    for name in ("state.json", MANIFEST):
        (there / name).unlink()
        (there / name).symlink_to("/dev/zero")
        with pytest.raises(CheckpointError, match="is a link, a folder, a pipe or a device"):
            mirror.pull("step-000000002", two / "elsewhere")
    (there / MANIFEST).unlink()
    for make in (os.mkfifo, os.mkdir):
        make(there / MANIFEST)
        assert [checkpoint.step for checkpoint in mirror.checkpoints()] == [1]
        (there / MANIFEST).unlink() if make is os.mkfifo else (there / MANIFEST).rmdir()


def test_a_manifest_of_8_gib_is_not_read(two: Path) -> None:
    for folder in (two / "here", two / "store" / "run"):
        with (folder / "step-000000002" / MANIFEST).open("wb") as file:
            file.truncate(8 << 30)  # sparse
    with pytest.raises(CheckpointError, match=f"larger than {MAX_JSON_BYTES} bytes"):
        read_manifest(two / "here" / "step-000000002")
    mirror = Mirror(f"file://{two}/store", "run")
    assert [checkpoint.step for checkpoint in mirror.checkpoints()] == [1]
    with pytest.raises(CheckpointError, match="has 8589934592 bytes"):
        mirror.pull("step-000000002", two / "elsewhere")
    with pytest.raises(CheckpointError, match="larger than"):
        parse_manifest(bytes(MAX_JSON_BYTES + 1), "it")


def test_a_score_that_orders_nothing_costs_no_checkpoint(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    for step, score in ((1, 0.5), (2, float("nan")), (3, float("nan"))):
        store.save(step, parts(step), score=score, wait=True)
    store.close()
    assert [(saved.step, saved.score) for saved in store.committed()] == [(1, 0.5), (2, None), (3, None)]
    newest = store.latest()
    assert newest is not None
    assert newest.step == 3


def test_what_could_not_be_read_is_not_saved(tmp_path: Path) -> None:
    failed: list[str] = []
    store = Checkpoints(tmp_path / "here")
    store.on_failed = lambda step, error: failed.append(str(error))
    store.save(1, {"..": {"a": 1}}, wait=True)
    store.close()
    assert len(failed) == 1
    with pytest.raises(CheckpointError, match="not a plain file name"):
        write_file(tmp_path / "a\nb", b"")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="is a link"):
        write_file(tmp_path / "link", b"")
    assert not (tmp_path / "outside").exists()
