"""Run a `transformers.Trainer` inside a run: heartbeats, metrics, the agreed stop, and checkpoints that are whole.

    run = RunCallback()
    trainer = Trainer(model=model, args=TrainingArguments(run.output_dir, save_total_limit=2, ...), callbacks=[run])
    trainer.train(resume_from_checkpoint=run.newest_checkpoint())

The Trainer keeps its own order of samples, its own generators and its own format of checkpoints, in which the optimizer
is pickled. It skips the samples that were used; their order is another one on another number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from training.context import Context
from training.integrations.sealed import folder_of, newest, rotate, seal


class RunCallback(TrainerCallback):  # type: ignore[misc]  # the library has no types here
    """Report the steps of a Trainer, log its metrics, stop it when the run is asked to, and seal its checkpoints.

    A stop is agreed by all ranks; the Trainer saves a checkpoint before it ends. A sealed checkpoint has a manifest with
    the size and hash of each file, without which `newest_checkpoint` takes it for incomplete. Checkpoints beyond the
    Trainer's `save_total_limit` are removed after a newer one is sealed.

    Args:
        ctx: the Context of a function; by default that of this process (`Context.current`).

    Attributes:
        output_dir: a folder for the Trainer in the run directory, as text.
    """

    def __init__(self, ctx: Context | None = None) -> None:
        self.ctx = ctx if ctx is not None else Context.current()
        self.output_dir = str(self.ctx.run_dir / "trainer")
        self._limit: int | None = None

    def newest_checkpoint(self, output_dir: str | Path | None = None) -> str | None:
        """Return the newest whole checkpoint in `output_dir`, the same one on all ranks; None if there is none.

        A collective. Raises CheckpointError if there are sealed checkpoints and all are damaged.
        """
        found = newest(self.ctx, Path(output_dir or self.output_dir))
        return str(found) if found else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over the removal of old checkpoints: the Trainer would remove a whole one before the next is sealed."""
        self._limit, args.save_total_limit = args.save_total_limit, None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report that the training has ended; what the program does afterwards has no time limit."""
        args.save_total_limit = self._limit
        self.ctx.heartbeat.idle()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step; if all ranks stop now, save and end the training."""
        if state.global_step >= state.max_steps:  # done: a run does not stop any more
            self.ctx.heartbeat.beat(state.global_step)
        elif self.ctx.should_stop(state.global_step):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report progress inside of a step."""
        self.ctx.heartbeat.beat()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report progress inside of an evaluation."""
        self.ctx.heartbeat.beat()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add a line to `metrics.jsonl`; the metrics of an evaluation are under "eval"."""
        values = {name: value for name, value in (logs or {}).items() if not name.startswith("eval_")}
        evaluation = {name[5:]: value for name, value in (logs or {}).items() if name.startswith("eval_")}
        more = {"eval": evaluation} if evaluation else {}
        self.ctx.log(state.global_step, total_steps=state.max_steps, **values, **more)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the checkpoint that all ranks have written. A collective."""
        ctx, output_dir = self.ctx, Path(args.output_dir)
        with ctx.phase("saving"):
            ctx.group.barrier()  # other ranks write their generators
            if ctx.world.rank == 0:
                try:
                    seal(folder_of(output_dir, state.global_step), state.global_step)
                    ctx.note_saved(state.global_step)
                    if self._limit is not None and self._limit > 0:
                        best = (Path(state.best_model_checkpoint).name,) if state.best_model_checkpoint else ()
                        rotate(output_dir, self._limit, protected=best)
                except OSError as error:
                    ctx.note_failed_save(state.global_step, error)
            ctx.group.barrier()
