"""Checkpoint folders that another library writes: sealed with a manifest, chosen by rank 0, rotated.

checkpoint-500/
  ...                            the files of the library
  generators-00000.safetensors   random generators of rank 0 (Lightning and accelerate)
  manifest.json                  bytes and hash of each file, and hash of the manifest of each subfolder; written last
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from training.checkpoints.manifest import FORMAT, HASHES, MANIFEST, read_manifest, verify, write_file, write_manifest
from training.checkpoints.store import discard
from training.distributed.random_state import mixed_seed
from training.errors import CheckpointError, ConfigError
from training.files import open_plain, sync_folder

if TYPE_CHECKING:
    from training.context import Context

PREFIX = "checkpoint-"

REMAINS = re.compile(rf"\.{re.escape(MANIFEST)}\..*\.tmp|\.tmp[A-Za-z0-9]{{6}}")
"""Files that a process leaves if it is killed while it writes: a manifest, or a file of safetensors."""


class Schedule:
    """When a checkpoint is due: every so many steps (`every`), or `seconds` after the last one by the clock of rank 0.

    Raises ConfigError, as `caller`, if `every` or `keep` is less than 1.
    """

    def __init__(self, ctx: Context, caller: str, *, every: int | None, seconds: float | None, keep: int) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise ConfigError(f"{caller}: {name}={value} must be 1 or more")
        self.keep = keep
        self._ctx, self._every, self._seconds = ctx, every, seconds
        self.restart()

    def restart(self) -> None:
        """Count the seconds from now on."""
        self._since = time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step`, the same on all ranks. A collective."""
        due = self._every is not None and step % self._every == 0
        if self._seconds is not None:
            late = self._ctx.world.rank == 0 and time.monotonic() - self._since >= self._seconds
            due = self._ctx.vote("save", late) or due
        return due


def save(ctx: Context, output_dir: Path, step: int, write: Callable[[Path], object], *, keep: int) -> None:
    """Save a checkpoint with `write(folder)` and the generators of every rank, beside its place, and rename it.

    A collective. A save that fails on a rank does not raise: it is recorded, and older checkpoints stay.
    """
    started_at = time.monotonic()
    staging, target = output_dir / f".{PREFIX}{step}.staging", folder_of(output_dir, step)
    problem: Exception | None = None
    with ctx.phase("saving"):
        try:
            staging.mkdir(parents=True, exist_ok=True)
            write(staging)
            write_file(staging / f"generators-{ctx.world.rank:05d}.safetensors", ctx.runtime.rng_state())
        except Exception as error:  # libraries have exceptions of their own for a full disk
            problem = error
        texts = ctx.group.gather(f"{type(problem).__name__}: {problem}" if problem else "")
        if ctx.world.rank == 0:
            try:
                for rank, text in enumerate(texts):
                    if text:
                        raise problem or CheckpointError(f"rank {rank}: {text}")
                seal(staging, step)
                if target.exists():
                    discard(target)
                staging.rename(target)
                sync_folder(output_dir)
                rotate(output_dir, keep)
                ctx.note_saved(step, time.monotonic() - started_at)
            except Exception as error:
                shutil.rmtree(staging, ignore_errors=True)
                ctx.note_failed_save(step, error)
        ctx.group.barrier()


def folder_of(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`."""
    return output_dir / f"{PREFIX}{step}"


def seal(folder: Path, step: int) -> None:
    """Flush the files in `folder` and its subfolders to disk, and write their sizes and hashes. Raises OSError."""
    kind, new = HASHES[FORMAT]
    files, folders = {}, {}
    for path in sorted(folder.iterdir()):
        if REMAINS.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()
            continue
        if path.is_symlink() or path.name == MANIFEST:
            continue
        if path.is_dir():
            seal(path, step)
            folders[path.name] = read_manifest(path)["sha256"]
        elif path.is_file():
            with os.fdopen(open_plain(path), "rb") as file:
                digest = hashlib.file_digest(file, new).hexdigest()
                os.fsync(file.fileno())
                files[path.name] = {"bytes": os.fstat(file.fileno()).st_size, kind: digest}
    write_manifest(folder, {"format": FORMAT, "step": step, "score": None, "files": files, "folders": folders})


def check(folder: Path) -> None:
    """Compare a sealed folder and its subfolders with their manifests. Raises CheckpointError."""
    verify(folder)
    for name, digest in read_manifest(folder).get("folders", {}).items():
        if "/" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{folder / MANIFEST} names {name[:80]!r}, which is not a folder in it")
        check(folder / name)
        if read_manifest(folder / name)["sha256"] != digest:
            raise CheckpointError(f"{folder / name} is not what was written: its manifest is another one")


def newest(ctx: Context, output_dir: Path) -> Path | None:
    """Return the newest sealed checkpoint in `output_dir` whose files are as they were written; None if there is none.

    Rank 0 chooses, so that it is the same one on all ranks; a folder without a manifest is an interrupted save, and is
    skipped. A collective. Raises CheckpointError, on all ranks, if there are sealed checkpoints and all are damaged.
    """
    found, problem = None, ""
    if ctx.world.rank == 0:
        for remains in output_dir.glob(f".{PREFIX}*"):  # of interrupted saves and removals
            shutil.rmtree(remains, ignore_errors=True)
        for folder in reversed(numbered(output_dir)):
            if not (folder / MANIFEST).exists():
                continue
            try:
                check(folder)
            except CheckpointError as error:
                ctx.checkpoints.on_damaged(error)
                problem = problem or str(error)
                continue
            found, problem = folder, ""
            ctx.note_resumed(step_in(folder))
            break
    name, problem = ctx.group.broadcast((found.name if found else "", problem))
    if problem:
        raise CheckpointError(
            f"every checkpoint in {output_dir} is damaged ({problem}); to start from the beginning, move that folder away"
        )
    return output_dir / name if name else None


def rotate(output_dir: Path, keep: int, *, protected: tuple[str, ...] = ()) -> None:
    """Remove all checkpoints older than the newest `keep` sealed ones, except those with a name in `protected`.

    Call it after a checkpoint was sealed: whatever is interrupted, `keep` whole ones remain.
    """
    folders = numbered(output_dir)
    sealed = [folder for folder in folders if (folder / MANIFEST).exists()]
    for folder in folders:
        if sealed[-keep:] and step_in(folder) < step_in(sealed[-keep:][0]) and folder.name not in protected:
            discard(folder)


def numbered(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, sealed or not, in the order of their steps."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_in)


def step_in(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix(PREFIX))


def load_generators(ctx: Context, folder: Path) -> None:
    """Restore the generators of this rank; seed them anew if `folder` was saved by another number of ranks."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("generators-*.safetensors"))
    if len(files) == ctx.world.world_size:
        ctx.runtime.set_rng_state(load_file(files[ctx.world.rank]))
    elif files:
        words = load_file(files[0])["torch"].numpy().tobytes()
        ctx.runtime.seed(mixed_seed(words, step_in(folder), ctx.world.rank))
