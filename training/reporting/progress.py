"""Show progress on rank 0: a bar on a terminal, otherwise at most one line every 10 seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

QUIET_SECONDS = 10.0  # minimum between two lines, if the output is not a terminal


class Progress:
    """Show the progress of a run, and compute the values of a training step for the metrics file.

    Args:
        total: optimizer steps of the whole run.
        step: optimizer steps done before this attempt.
        global_batch: samples of one optimizer step.
        enabled: whether progress is shown; true on rank 0.
    """

    def __init__(self, total: int, step: int, global_batch: int, *, enabled: bool) -> None:
        self.total = total
        self.global_batch = global_batch
        self.enabled = enabled
        self._previous = (time.perf_counter(), step)
        self._next_line = 0.0
        self._bar: Any = None
        if enabled and sys.stdout.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=total, initial=step, unit="step", file=sys.stdout, dynamic_ncols=True)

    def line(self, step: int, loss: float, lr: float, per_epoch: int) -> dict[str, Any]:
        """Show the training step `step` and return its values for the metrics file."""
        now = time.perf_counter()
        began, at = self._previous
        self._previous = (now, step)
        rate = (step - at) * self.global_batch / max(now - began, 1e-9)
        left = (self.total - step) * self.global_batch / rate if rate else 0.0
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {rate:.0f} samples/s", refresh=False)
            self._bar.update(step - self._bar.n)
        elif self.enabled and now >= self._next_line:
            self._next_line = now + QUIET_SECONDS
            print(
                f"step {step}/{self.total}  loss {loss:.4f}  lr {lr:.2e}  {rate:.0f} samples/s  {left:.0f} s left",
                flush=True,
            )
        return {
            "total_steps": self.total,
            "epoch": step / per_epoch,
            "loss": loss,
            "lr": lr,
            "samples_per_second": rate,
        }

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Show the values of an evaluation after `step` optimizer steps."""
        if not self.enabled:
            return
        text = "  ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        (self._bar.write if self._bar is not None else print)(f"evaluation at step {step}: {text}")
        sys.stdout.flush()

    def close(self) -> None:
        """Close the bar; its last state remains visible."""
        if self._bar is not None:
            self._bar.close()
