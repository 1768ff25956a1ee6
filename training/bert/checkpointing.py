"""Checkpoints of the reference job: find one on all ranks, save, mirror, and publish the final model."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.bert.state import capture
from training.checkpoints.manifest import load, read_manifest, verify
from training.checkpoints.mirror import Mirror
from training.checkpoints.store import Checkpoint
from training.errors import CheckpointError, ConfigError
from training.files import sync_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from training.bert.config import TrainConfig
    from training.bert.engine import Engine
    from training.context import Context

PROBE_SECONDS = 1.0  # how long a node waits for a file of rank 0: a network disk may cache that it was missing


class Store:
    """The checkpoints of a run, on one rank."""

    def __init__(self, ctx: Context, config: TrainConfig) -> None:
        self._ctx = ctx
        self._one_disk = True  # whether all nodes share the folder of checkpoints; set by `find`
        self._mirror = Mirror(config.mirror, ctx.run_dir.name, keep=config.keep) if config.mirror else None
        ctx.checkpoints.keep = config.keep
        ctx.checkpoints.on_saved = self._saved
        if self._mirror is not None:
            self._mirror.on_damaged = ctx.checkpoints.on_damaged
            self._mirror.on_mirrored = lambda step: ctx.event("mirrored", step=step)
            self._mirror.on_failed = lambda step, error: ctx.event("mirror-failed", step=step, error=str(error))

    def find(self) -> dict[str, Any] | None:
        """Load the newest valid checkpoint of this disk or the mirror, as chosen by rank 0. A collective.

        Raises, on all ranks:
            CheckpointError: all are damaged, or a node cannot get the chosen one. ConfigError: the mirror cannot be read.
        """
        group, folder = self._ctx.group, self._ctx.checkpoints.folder
        self._one_disk = self._ctx.world.num_nodes == 1 or self._look_for_one_disk()
        chosen: tuple[str, str] | None = None
        problem: Exception | None = None
        if self._ctx.world.rank == 0:
            try:
                newest = self._newest()
                chosen = (newest.path.name, read_manifest(newest.path)["sha256"]) if newest else None
            except (CheckpointError, ConfigError) as error:
                problem = error
        chosen, problem = group.broadcast((chosen, problem))
        if problem is not None:
            raise problem
        if chosen is None:
            return None
        name, digest = chosen
        lacking = ""
        if self._ctx.world.local_rank == 0 and not self._one_disk and self._ctx.world.node_rank:
            try:
                self._bring(name, digest)
            except CheckpointError as error:
                lacking = f"{error} (on {socket.gethostname()}; nodes that share no disk need --mirror)"
        for text in group.gather(lacking):
            if text:
                raise CheckpointError(text)
        return load(folder / name)

    def _look_for_one_disk(self) -> bool:
        """Whether all nodes see a new file of rank 0 in the folder of checkpoints. A collective."""
        group, folder = self._ctx.group, self._ctx.checkpoints.folder
        probe: Path | None = None
        if self._ctx.world.rank == 0:
            with contextlib.suppress(OSError):  # the first save reports this error
                folder.mkdir(parents=True, exist_ok=True)
                fresh = folder / f".step-probe-{secrets.token_hex(8)}"  # a name that `clean` removes
                fresh.touch()
                probe = fresh
        name = group.broadcast(probe.name if probe else "")
        patience = time.monotonic() + PROBE_SECONDS
        while not (there := bool(name) and (folder / name).is_file()) and name and time.monotonic() < patience:
            time.sleep(0.05)
        seen = all(group.gather(there))
        if probe is not None:
            probe.unlink()
        return seen

    def _bring(self, name: str, digest: str) -> None:
        """Provide the checkpoint that rank 0 chose on this node's own disk, and prune the others.

        Raises CheckpointError if it is missing or differs from that of rank 0.
        """
        checkpoints = self._ctx.checkpoints
        path = checkpoints.folder / name
        try:
            same = read_manifest(path)["sha256"] == digest
            verify(path)
        except CheckpointError:
            same = False
            if self._mirror is None:
                raise
        if not same:
            if self._mirror is None:
                raise CheckpointError(f"{path} is not the checkpoint that rank 0 has")
            self._mirror.pull(name, checkpoints.folder)
            if read_manifest(path)["sha256"] != digest:
                raise CheckpointError(f"{path} as the mirror has it is not the checkpoint that rank 0 has")
        checkpoints.prune(but=name)

    def save(self, engine: Engine, step: int, state: dict[str, Any], score: float | None) -> None:
        """Save a checkpoint in the background; the next update of the engine waits for the copy. A collective."""
        started_at = time.monotonic()
        world = self._ctx.world
        in_parts = engine.sharded and self._one_disk
        parts = capture(engine, in_parts=in_parts)
        if world.rank == 0:
            parts["state.json"] = state
        if world.rank == 0 or in_parts:
            part = (world.rank, world.world_size if in_parts else 1)
            self._ctx.checkpoints.save(step, parts, score=score, part=part, started_at=started_at, later=True)

    def finish(self) -> None:
        """Wait on all ranks until the last checkpoint is committed. A collective."""
        self._ctx.checkpoints.wait()
        self._ctx.group.barrier()

    def publish(self, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> str:
        """Save the final model for `from_pretrained`, atomically, to `run_dir/model`; returns the folder name.

        Raises OSError if it cannot be written. A collective.
        """
        from safetensors import SafetensorError

        from training.checkpoints.sharding import whole

        weights = whole(engine.model.state_dict(), keep=self._ctx.world.rank == 0)
        if self._ctx.world.rank == 0:
            staging, target = self._ctx.run_dir / ".model.staging", self._ctx.run_dir / "model"
            shutil.rmtree(staging, ignore_errors=True)
            try:
                engine.model.save_pretrained(staging, state_dict=weights)
            except SafetensorError as error:  # hides the errno, such as that of a full disk
                number = re.search(r"os error (\d+)", str(error))
                if number is None:
                    raise
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(staging)) from error
            tokenizer.save_pretrained(staging)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(staging, target)
            sync_folder(self._ctx.run_dir)
        self._ctx.group.barrier()
        return "model"

    def close(self) -> None:
        """Wait for the save and the copies in progress."""
        try:
            self._ctx.checkpoints.close()
        finally:
            if self._mirror is not None:
                self._mirror.close()

    def _newest(self) -> Checkpoint | None:
        self._ctx.checkpoints.clean()
        if self._mirror is None:
            return self._ctx.checkpoints.latest()
        self._mirror.check()
        local, problem = None, None
        try:
            local = self._ctx.checkpoints.latest()
        except CheckpointError as error:  # all local checkpoints are damaged; the mirror may have a valid one
            problem = error
        for there in reversed(self._mirror.checkpoints()):
            if local is not None and local.step >= there.step:
                break
            try:
                path = self._mirror.pull(there.path.name, self._ctx.checkpoints.folder)
            except CheckpointError as error:
                self._ctx.checkpoints.on_damaged(error)
                continue
            self._ctx.event("fetched", step=there.step)
            return Checkpoint(there.step, path, there.score)
        if local is None and problem is not None:
            raise problem
        return local

    def _saved(self, checkpoint: Checkpoint) -> None:
        self._ctx.note_saved(checkpoint.step, checkpoint.stall_seconds)
        if self._mirror is not None:
            self._mirror.push(checkpoint)
