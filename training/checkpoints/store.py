"""Atomic checkpoints, written in the background.

    checkpoints/
      step-000000500/            committed: renamed after all files were written, hashed and fsynced
        model.safetensors  optimizer.safetensors  rng.safetensors  state.json  config.json
        manifest.json            bytes and hash of each file; written last
      .step-000000600.staging/   a save in progress or interrupted; not read

A checkpoint is a mapping of file names to content: tensors by name for `*.safetensors`, a JSON value for `*.json`.
Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.checkpoints.host_copy import Buffers, Copy
from training.checkpoints.manifest import FORMAT, rankable, read_manifest, step_of, verify, write_file, write_manifest
from training.checkpoints.staging import Staging
from training.errors import CheckpointError
from training.files import sync_folder

PATIENCE = 600.0  # seconds that ranks wait for each other's parts
Part = tuple[int, int]  # rank, ranks
Parts = Mapping[str, Any]  # file name -> Mapping[str, torch.Tensor] for *.safetensors, a JSON value for *.json


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        score: of its evaluation, higher is better; None without one.
        stall_seconds: seconds for which the save delayed training, on the host or on a GPU; set for `on_saved` only.
    """

    step: int
    path: Path
    score: float | None = None
    stall_seconds: float = field(default=0.0, compare=False)


class Checkpoints:
    """The checkpoints in one folder. One process writes (rank 0); any process reads.

    `on_saved(checkpoint)` and `on_failed(step, error)` are called from the writer's thread, `on_damaged(error)` by
    `latest` for each checkpoint that it skips.
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
        self._buffers = Buffers()
        self._copy: Copy | None = None

    def save(
        self,
        step: int,
        parts: Parts,
        *,
        score: float | None = None,
        wait: bool = False,
        part: Part = (0, 1),
        started_at: float | None = None,
        later: bool = False,
    ) -> None:
        """Save `parts` as the checkpoint of `step`, after the end of the previous save.

        Returns when the tensors are copied to host memory. A failed write does not raise: `on_failed` is called, and the
        committed checkpoints remain.

        Args:
            wait: return after the commit, or after the failure.
            part: (rank, ranks) of a sharded checkpoint. All ranks save different file names to a shared folder; rank 0
                commits when all parts are written.
            started_at: time (`time.monotonic`) at which the caller began to gather the parts, for `stall_seconds`.
            later: return before the copy. The caller calls `wait_for_copy` before it changes a tensor, so the copy overlaps
                with the next forward and backward pass (as in CheckFreq; Mohan, Phanishayee, Chidambaram 2021).
        """
        started_at = time.monotonic() if started_at is None else started_at
        self.wait()
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "checkpoint-writer")
        copy = self._copy = Copy(parts, self._buffers)
        if not later:
            copy.finish()
        copy.stall_seconds += time.monotonic() - started_at
        self._under_way = self._writer.submit(self._write, step, copy, score, part)
        if wait:
            self.wait()

    def wait_for_copy(self) -> None:
        """Return when the tensors of the newest save may change: they are copied.

        Those of a GPU may change by work on its current stream, which waits there for the copy.
        """
        if self._copy is not None and self._copy.hold_updates():
            self._copy = None

    def wait(self) -> None:
        """Wait for the save in progress."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Wait for the save in progress and end the writer's thread."""
        try:
            self.wait()
        finally:
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
                found.append(Checkpoint(step, path, rankable(manifest["score"]) if manifest else None))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that passes verification; None if there is no checkpoint.

        A damaged checkpoint is skipped with a warning that names the file.

        Raises:
            CheckpointError: all checkpoints are damaged. Starting from step 0 would discard work without notice.
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
        """Remove the remains of interrupted saves. For the writing process, before its first save."""
        for path in self.folder.glob(".step-*") if self.folder.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)

    def _write(self, step: int, copy: Copy, score: float | None, part: Part) -> None:
        rank, ranks = part
        staging = Staging(self.folder / f".step-{step:09d}.staging", self.patience)
        target = self.folder / f"step-{step:09d}"
        try:
            parts = copy.finish()
            if ranks > 1 or not self._already_there(target):
                staging.create(shared=ranks > 1)
                files = {name: write_file(staging.path / name, content) for name, content in parts.items()}
                if rank:
                    staging.report(rank, files)
                    staging.wait_for_commit(target)
                    return
                files |= staging.collect(ranks)
                write_manifest(staging.path, {"format": FORMAT, "step": step, "score": score, "files": files})
                if ranks > 1 and self._already_there(target):
                    shutil.rmtree(staging.path)
                else:
                    os.rename(staging.path, target)
                sync_folder(self.folder)
            self.prune()
        except Exception as error:
            if ranks > 1:
                staging.give_up()
            staging.remove()
            self.on_failed(step, error)
        else:
            self.on_saved(Checkpoint(step, target, score, copy.stall_seconds + copy.idle_seconds()))

    def _already_there(self, target: Path) -> bool:
        """Whether the step has a valid checkpoint, as after resuming from an older one; removes a damaged one."""
        if not target.exists():
            return False
        try:
            verify(target)
        except CheckpointError:
            discard(target)
            return False
        return True

    def prune(self, *, but: str = "") -> None:
        """Remove all checkpoints except the newest `keep`, the best, and the one named `but`."""
        committed = self.committed()
        keep = kept(committed, self.keep)
        for checkpoint in committed:
            if checkpoint not in keep and checkpoint.path.name != but:
                discard(checkpoint.path)


def discard(path: Path) -> None:
    """Remove a checkpoint folder; it is renamed first, so that an interrupted removal leaves no incomplete one."""
    trash = path.with_name(f".{path.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def kept(committed: list[Checkpoint], keep: int) -> list[Checkpoint]:
    """Select the newest `keep` checkpoints and the best one.

    `committed` is sorted, oldest first; of equal scores the newest is best.
    """
    scored = [checkpoint for checkpoint in committed if checkpoint.score is not None]
    best = max(scored, key=lambda checkpoint: (checkpoint.score or 0.0, checkpoint.step)) if scored else None
    newest = committed[-keep:]
    return newest if best is None or best in newest else [best, *newest]
