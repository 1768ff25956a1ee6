"""Run a `transformers.Trainer` inside a run: progress, metrics, the agreed stop, and checkpoints that are whole.

    trainer = Trainer(model=model, args=TrainingArguments(output, save_total_limit=2, ...), callbacks=[RunCallback(ctx)])
    trainer.train(resume_from_checkpoint=newest_checkpoint(ctx, output))

The Trainer keeps its own order of samples, its own generators and its own format of checkpoints, in which the optimizer
is pickled. It skips the samples that were used; their order is another one on another number of ranks.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from training.checkpoints.manifest import FORMAT, HASHES, read_manifest, verify, write_manifest
from training.errors import CheckpointError
from training.files import open_plain

if TYPE_CHECKING:
    from training.context import Context

PREFIX = "checkpoint-"


class RunCallback(TrainerCallback):  # type: ignore[misc]  # the library has no types here
    """Report the steps of a Trainer to `ctx`, log its metrics, stop it when the run is asked to, and seal its saves.

    A stop is agreed by all ranks; the Trainer saves a checkpoint before it ends. A sealed checkpoint has a manifest with
    the size and hash of each file, without which `newest_checkpoint` takes it for incomplete.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step; if all ranks stop now, save and end the training."""
        if self._ctx.should_stop(state.global_step) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report progress inside of a step."""
        self._ctx.heartbeat.beat()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report progress inside of an evaluation."""
        self._ctx.heartbeat.beat()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add a line to `metrics.jsonl`; the metrics of an evaluation are under "eval"."""
        values = {name: value for name, value in (logs or {}).items() if not name.startswith("eval_")}
        evaluation = {name[5:]: value for name, value in (logs or {}).items() if name.startswith("eval_")}
        more = {"eval": evaluation} if evaluation else {}
        self._ctx.log(state.global_step, total_steps=state.max_steps, **values, **more)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the checkpoint that all ranks have written. A collective."""
        ctx = self._ctx
        with ctx.phase("saving"):
            ctx.group.barrier()  # other ranks write their generators
            folder = Path(args.output_dir) / f"{PREFIX}{state.global_step}"
            if ctx.world.rank == 0:
                try:
                    seal(folder, state.global_step)
                    ctx.note_saved(state.global_step)
                except OSError as error:
                    ctx.note_failed_save(state.global_step, error)
            ctx.group.barrier()


def seal(folder: Path, step: int) -> None:
    """Flush the files of a checkpoint to disk, and write their sizes and hashes to its manifest. Raises OSError."""
    kind, new = HASHES[FORMAT]
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.is_symlink() and path.name != "manifest.json":
            with os.fdopen(open_plain(path), "rb") as file:
                digest = hashlib.file_digest(file, new).hexdigest()
                os.fsync(file.fileno())
                files[path.name] = {"bytes": os.fstat(file.fileno()).st_size, kind: digest}
    write_manifest(folder, {"format": FORMAT, "step": step, "score": None, "files": files})


def newest_checkpoint(ctx: Context, output_dir: str | Path) -> str | None:
    """Return the newest sealed checkpoint in `output_dir` whose files are as they were written; None if there is none.

    The same on all ranks: rank 0 chooses. A collective.
    """
    found: Path | None = None
    if ctx.world.rank == 0:
        folders = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
        for folder in sorted(folders, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True):
            try:
                verify(folder)
            except CheckpointError as error:
                ctx.checkpoints.on_damaged(error)
                continue
            found = folder
            ctx.note_resumed(read_manifest(folder)["step"])
            break
    chosen = ctx.group.broadcast(str(found) if found else None)
    return str(chosen) if chosen else None
