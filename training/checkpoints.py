"""Checkpoints that are whole or absent, written while training goes on.

    checkpoints/
      step-000000500/            committed: appeared by one rename after all in it was written, hashed and fsynced
        model.safetensors  optimizer.safetensors  rng.safetensors  state.json  config.json
        manifest.json            bytes and sha256 of each file; written last
      .step-000000600.staging/   a save under way, or what a killed one left; never read

A checkpoint is a mapping of file names to content: tensors by name for `*.safetensors`, a JSON value for `*.json`.
Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import CheckpointError
from training.files import read_json, sync_folder, write_atomic
from training.sharding import assemble, is_part

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{9,})")
PATIENCE = 600.0  # seconds that ranks wait for one another's parts
POLL_SECONDS = 0.02
Part = tuple[int, int]  # rank, ranks
_CHUNK = 1 << 22  # bytes hashed and written at a time
Parts = Mapping[str, Any]  # file name -> Mapping[str, torch.Tensor] for *.safetensors, a JSON value for *.json


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `score` is its evaluation's, where it has one; higher is better."""

    step: int
    path: Path
    score: float | None = None


class Checkpoints:
    """The checkpoints in one folder. One process writes (rank 0); any process reads.

    `on_saved(checkpoint)` and `on_failed(step, error)` are called from the writer's thread, `on_damaged(error)` by
    `latest` for each checkpoint that it passes over.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self.patience = PATIENCE
        self.on_saved: Callable[[Checkpoint], None] = lambda checkpoint: None
        self.on_failed: Callable[[int, Exception], None] = lambda step, error: None
        self.on_damaged: Callable[[CheckpointError], None] = lambda error: None
        self._writer: ThreadPoolExecutor | None = None
        self._under_way: Future[None] | None = None
        self._host: dict[tuple[str, str], torch.Tensor] = {}

    def save(
        self, step: int, parts: Parts, *, score: float | None = None, wait: bool = False, part: Part = (0, 1)
    ) -> None:
        """Save `parts` as the checkpoint of `step`; returns once the tensors are copied to host memory.

        Where every rank brings files of its own, all call this with `part` = (rank, ranks) and different file names, in
        a folder that they share; rank 0 commits when all parts are there.

        Waits for the save before it, so none overtakes another. With `wait`, returns when the checkpoint is committed
        (or has failed). A failure to write does not raise: what was committed stays, and `on_failed` is told.
        """
        self.wait()
        copied = self._copy_to_host(parts)
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "checkpoint-writer")
        self._under_way = self._writer.submit(self._write, step, copied, score, part)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def close(self) -> None:
        """Wait for the save under way and end the writer's thread."""
        self.wait()
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def committed(self) -> list[Checkpoint]:
        """All committed checkpoints, oldest first; their content is not verified."""
        found = []
        for path in self.folder.glob("step-*") if self.folder.is_dir() else ():
            step = step_of(path.name)
            if step is not None and path.is_dir():
                manifest = None
                with contextlib.suppress(CheckpointError):
                    manifest = read_manifest(path)
                found.append(Checkpoint(step, path, manifest["score"] if manifest else None))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as it was written; None where there is no checkpoint at all.

        A damaged one is passed over with a warning that names the file. Raises CheckpointError where all are damaged:
        to start from nothing then would silently throw work away.
        """
        damaged = []
        for checkpoint in reversed(self.committed()):
            try:
                verify(checkpoint.path)
            except CheckpointError as error:
                damaged.append(str(error))
                warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)
                self.on_damaged(error)
                continue
            return checkpoint
        if damaged:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged ({damaged[0]}); "
                "to start from the beginning, move that folder away"
            )
        return None

    def clean(self) -> None:
        """Remove what killed saves left behind. Only for the process that writes, before its first save."""
        for path in self.folder.glob(".step-*") if self.folder.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)

    def _copy_to_host(self, parts: Parts) -> dict[str, Any]:
        import torch

        copied: dict[str, Any] = {}
        for file, content in parts.items():
            if not file.endswith(".safetensors"):
                copied[file] = json.dumps(content, indent=1).encode()
                continue
            copied[file] = {}
            for name, tensor in content.items():
                source = tensor.detach()
                # The buffers are kept from save to save: fresh pages would cost more than the copy itself.
                buffer = self._host.get((file, name))
                if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                    buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                    self._host[file, name] = buffer
                buffer.copy_(source, non_blocking=True)
                copied[file][name] = buffer
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().synchronize()
        return copied

    def _write(self, step: int, parts: dict[str, Any], score: float | None, part: Part) -> None:
        rank, ranks = part
        staging = self.folder / f".step-{step:09d}.staging"
        target = self.folder / f"step-{step:09d}"
        try:
            if ranks > 1 or not self._already_there(target):
                self.folder.mkdir(parents=True, exist_ok=True)
                if ranks == 1:
                    shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(exist_ok=ranks > 1)
                files = {name: _write_file(staging / name, content) for name, content in parts.items()}
                if rank:
                    write_atomic(staging / _report(rank), json.dumps(files))
                    self._wait_for_commit(staging, target)
                    return
                files |= self._others(staging, ranks)
                write_manifest(staging, {"format": FORMAT, "step": step, "score": score, "files": files})
                if ranks > 1 and self._already_there(target):
                    shutil.rmtree(staging)
                else:
                    os.rename(staging, target)
                sync_folder(self.folder)
            self._prune()
        except Exception as error:
            shutil.rmtree(staging, ignore_errors=True)  # also tells the other ranks, which wait for it to go
            self.on_failed(step, error)
        else:
            self.on_saved(Checkpoint(step, target, score))

    def _others(self, staging: Path, ranks: int) -> dict[str, Any]:
        """The manifest's entries of the files that ranks 1 and above have written, once all of them have."""
        files: dict[str, Any] = {}
        deadline = time.monotonic() + self.patience
        for rank in range(1, ranks):
            while (written := read_json(staging / _report(rank))) is None:
                if not staging.exists():
                    raise CheckpointError(f"a rank could not write its part of {staging.name}")
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"rank {rank} has not written its part of {staging.name} in {self.patience:.0f} s"
                    )
                time.sleep(POLL_SECONDS)
            (staging / _report(rank)).unlink()
            files |= written
        return files

    def _wait_for_commit(self, staging: Path, target: Path) -> None:
        deadline = time.monotonic() + self.patience
        while staging.exists() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if not target.exists():
            raise CheckpointError(f"{target} has not been committed by rank 0")

    def _already_there(self, target: Path) -> bool:
        """Whether a good checkpoint of this step is committed (a run that fell back comes by again); a bad one goes."""
        if not target.exists():
            return False
        try:
            verify(target)
        except CheckpointError:
            self._discard(target)
            return False
        return True

    def _prune(self) -> None:
        committed = self.committed()
        keep = kept(committed, self.keep)
        for checkpoint in committed:
            if checkpoint not in keep:
                self._discard(checkpoint.path)

    def _discard(self, path: Path) -> None:
        # Renamed first, so that a removal cut short leaves nothing that looks like a checkpoint.
        trash = path.with_name(f".{path.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def load(path: Path) -> dict[str, Any]:
    """The parts of the checkpoint in `path`, tensors on the CPU; files saved in parts under their whole name. Raises CheckpointError for a file it cannot read."""
    from safetensors.torch import load_file

    names = list(read_manifest(path)["files"])
    parts: dict[str, Any] = dict(assemble(path, names))
    for name in names:
        if is_part(name):
            continue
        try:
            file = path / name
            parts[name] = load_file(file) if name.endswith(".safetensors") else json.loads(file.read_bytes())
        except Exception as error:  # safetensors has its own kind of error
            raise CheckpointError(f"{path / name} cannot be read: {error}") from error
    return parts


def verify(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless every file of the checkpoint has the bytes it was written with."""
    for name, expected in read_manifest(path)["files"].items():
        try:
            with (path / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path / name} cannot be read: {error.strerror}") from None
        if digest != expected["sha256"]:
            raise CheckpointError(f"{path / name} is not what was written: its sha256 differs from the manifest's")


def _report(rank: int) -> str:
    return f"part-{rank:05d}.json"


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """Write `body` and its own hash to the manifest of `folder`, and fsync the folder."""
    write_atomic(folder / MANIFEST, _spell({**body, "sha256": hashlib.sha256(_spell(body)).hexdigest()}))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `path`. Raises CheckpointError where it is absent or not as written."""
    file = path / MANIFEST
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing, so this is no committed checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    return parse_manifest(raw, str(file))


def parse_manifest(raw: bytes, where: str) -> dict[str, Any]:
    """The manifest with the bytes `raw`. Raises CheckpointError, naming `where`, unless every byte is as written."""
    try:
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        whole = _spell(manifest) == raw and manifest["sha256"] == hashlib.sha256(_spell(body)).hexdigest()
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from None
    if not whole:
        raise CheckpointError(f"{where} is not what was written: its sha256 differs")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{where} has format {manifest['format']}; this version reads format {FORMAT}")
    return dict(manifest)


def step_of(name: str) -> int | None:
    """The step of a committed checkpoint's folder name; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def kept(committed: list[Checkpoint], keep: int) -> list[Checkpoint]:
    """Those of `committed` (oldest first) to keep: the newest `keep` and the best; of equal scores the newest is best."""
    scored = [checkpoint for checkpoint in committed if checkpoint.score is not None]
    best = max(scored, key=lambda checkpoint: (checkpoint.score or 0.0, checkpoint.step)) if scored else None
    newest = committed[-keep:]
    return newest if best is None or best in newest else [best, *newest]


def _spell(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _write_file(path: Path, content: Any) -> dict[str, Any]:
    """Write a file, fsynced, hashing what goes out; the manifest's entry for it."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in (content,) if isinstance(content, bytes) else _safetensors(content):
            for at in range(0, len(piece), _CHUNK):
                chunk = piece[at : at + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> list[bytes | memoryview]:
    """The pieces of a safetensors file: header length (u64), JSON header padded to 8 bytes, the tensors' bytes.

    Written here rather than by the library, which would copy all tensors into one string first. Format:
    https://github.com/huggingface/safetensors#format
    """
    import torch
    from safetensors.torch import _TYPES

    names = {dtype: name for name, dtype in _TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[bytes | memoryview] = []
    offset = 0
    # Widest types first, as the library sorts, so that every tensor stays aligned in the file.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        pieces.append(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *pieces]
