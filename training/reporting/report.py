"""What a training job reports: metrics, progress and trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from training.reporting.progress import Progress
from training.reporting.trackers import Trackers, make_accelerator

if TYPE_CHECKING:
    from training.context import Context
    from training.loop.steps import Step, Steps


class Report:
    """Records steps and evaluations in `metrics.jsonl` and in the trackers `names` of accelerate, and shows them.

    `settings` are the options of the run, for the trackers. All ranks use it.
    """

    def __init__(self, ctx: Context, steps: Steps, names: tuple[str, ...], settings: Mapping[str, Any]) -> None:
        self._ctx, self._steps = ctx, steps
        first = ctx.world.rank == 0  # accelerate takes each rank for the main one on a device that it does not know
        self._progress = Progress(steps.total, steps.number, steps.global_batch, enabled=first)
        self._trackers = Trackers(make_accelerator(ctx), names if first else (), ctx.run_dir, settings)

    def step(self, step: Step, *, lr: float) -> None:
        """Record the mean loss since the last record, and the learning rate."""
        loss = self._steps.mean_loss()
        self._record(step.number, self._progress.line(step.number, loss, lr, self._steps.per_epoch))

    def evaluation(self, step: Step, evaluate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the values of `evaluate`, and record them."""
        began = time.monotonic()
        values = evaluate()
        seconds = round(time.monotonic() - began, 6)
        self._record(step.number, {"epoch": step.number / self._steps.per_epoch, "eval": values, "seconds": seconds})
        self._progress.evaluation(step.number, values)
        return values

    def close(self) -> None:
        """Close the progress bar, then the trackers."""
        with closing(self._trackers), closing(self._progress):
            pass

    def _record(self, number: int, values: dict[str, Any]) -> None:
        self._ctx.log(number, **values)
        self._trackers.log(number, values)
