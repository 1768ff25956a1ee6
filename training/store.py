"""What the reference job does with checkpoints: find one on all ranks, save, mirror, and publish the final model."""

from __future__ import annotations

import os
import shutil
import socket
from typing import TYPE_CHECKING, Any

from training.checkpoints import Checkpoint
from training.errors import CheckpointError, ConfigError
from training.files import sync_folder
from training.manifest import load, read_manifest
from training.mirror import Mirror

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from training.context import Context
    from training.engine import Engine
    from training.train import TrainConfig


class Store:
    """The checkpoints of a run, seen from one rank."""

    def __init__(self, ctx: Context, config: TrainConfig) -> None:
        self._ctx = ctx
        self._untold: tuple[int, dict[str, Any]] | None = None
        self._mirror = Mirror(config.mirror, ctx.run_dir.name, keep=config.keep) if config.mirror else None
        ctx.checkpoints.keep = config.keep
        ctx.checkpoints.on_saved = self._saved
        ctx.checkpoints.on_failed = lambda step, error: ctx.event("save-failed", step=step, error=str(error))
        ctx.checkpoints.on_damaged = lambda error: ctx.event("checkpoint-damaged", error=str(error))
        if self._mirror is not None:
            self._mirror.on_mirrored = lambda step: ctx.event("mirrored", step=step)
            self._mirror.on_failed = lambda step, error: ctx.event("mirror-failed", step=step, error=str(error))

    def find(self) -> dict[str, Any] | None:
        """The parts of the newest good checkpoint, of this disk or the mirror, the same on all ranks: rank 0 chooses.

        Raises, on all ranks, CheckpointError where all are damaged or a node does not get it, and ConfigError where the
        mirror cannot be read.
        """
        group, folder = self._ctx.group, self._ctx.checkpoints.folder
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
        if self._ctx.world.local_rank == 0:
            try:
                if not (folder / name).exists() and self._mirror is not None:
                    self._mirror.pull(name, folder)
                if read_manifest(folder / name)["sha256"] != digest:
                    lacking = f"{folder / name} on {socket.gethostname()} is not the checkpoint that rank 0 has"
            except CheckpointError as error:
                lacking = f"{error} (on {socket.gethostname()}; nodes that share no disk need --mirror)"
        for text in group.gather(lacking):
            if text:
                raise CheckpointError(text)
        return load(folder / name)

    def save(self, engine: Engine, step: int, state: dict[str, Any], score: float | None) -> None:
        """Save a checkpoint in the background; on return all state is copied. A collective."""
        self._tell()
        parts, world = engine.capture(), self._ctx.world
        if world.rank == 0:
            parts["state.json"] = state
        if world.rank == 0 or engine.sharded:
            part = (world.rank, world.world_size if engine.sharded else 1)
            self._ctx.checkpoints.save(step, parts, score=score, part=part)
        self._untold = (step, (state["evaluations"] or [{}])[-1])

    def finish(self) -> None:
        """Wait until the last checkpoint is committed, so that no rank leaves before. A collective."""
        self._ctx.checkpoints.wait()
        self._tell()
        self._ctx.group.barrier()

    def publish(self, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> str:
        """Save the final model for `from_pretrained` as `run_dir/model`, whole or absent; the folder's name."""
        from training.sharding import whole

        weights = whole(engine.model.state_dict())
        if self._ctx.world.rank == 0:
            staging, target = self._ctx.run_dir / ".model.staging", self._ctx.run_dir / "model"
            shutil.rmtree(staging, ignore_errors=True)
            engine.model.save_pretrained(staging, state_dict=weights)
            tokenizer.save_pretrained(staging)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(staging, target)
            sync_folder(self._ctx.run_dir)
        self._ctx.group.barrier()
        return "model"

    def close(self) -> None:
        """Wait for the save and the copies under way."""
        self._ctx.checkpoints.close()
        if self._mirror is not None:
            self._mirror.close()

    def _tell(self) -> None:
        """Tell of the checkpoint before: the next may begin, so it must be finished now anyway."""
        untold, self._untold = self._untold, None
        if untold is None or not self._ctx.on_checkpoint:
            return
        step, evaluation = untold
        self._ctx.checkpoints.wait()
        there = {saved.step: saved.path for saved in self._ctx.checkpoints.committed()}
        path = there.get(step) if self._ctx.world.rank == 0 else None
        for tell in self._ctx.on_checkpoint:
            tell(step, evaluation, path)

    def _newest(self) -> Checkpoint | None:
        self._ctx.checkpoints.clean()
        if self._mirror is None:
            return self._ctx.checkpoints.latest()
        self._mirror.check()
        local, problem = None, None
        try:
            local = self._ctx.checkpoints.latest()
        except CheckpointError as error:  # all that lie here are damaged, but perhaps not those over there
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
        self._ctx.event("saved", step=checkpoint.step)
        if self._mirror is not None:
            self._mirror.push(checkpoint)
