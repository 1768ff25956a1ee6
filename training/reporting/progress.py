"""Progress on rank 0: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.train import State

QUIET_SECONDS = 10.0  # between two lines where the output is no terminal


class Progress:
    """Shows how far a run is; `line` also makes the record for the metrics file."""

    def __init__(self, total: int, state: State, *, enabled: bool) -> None:
        self.total = total
        self.enabled = enabled
        self._since = (time.perf_counter(), state.step)
        self._next_line = 0.0
        self._bar: Any = None
        if enabled and sys.stdout.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]

            self._bar = tqdm(total=total, initial=state.step, unit="step", file=sys.stdout, dynamic_ncols=True)

    def line(self, state: State, loss: float, lr: float, per_epoch: int) -> dict[str, Any]:
        """The values of a training step for the metrics file, shown on the way."""
        now = time.perf_counter()
        began, at = self._since
        self._since = (now, state.step)
        rate = (state.step - at) * state.global_batch / max(now - began, 1e-9)
        left = (self.total - state.step) * state.global_batch / rate if rate else 0.0
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {rate:.0f} samples/s", refresh=False)
            self._bar.update(state.step - self._bar.n)
        elif self.enabled and now >= self._next_line:
            self._next_line = now + QUIET_SECONDS
            print(
                f"step {state.step}/{self.total}  loss {loss:.4f}  lr {lr:.2e}  "
                f"{rate:.0f} samples/s  {left:.0f} s left",
                flush=True,
            )
        return {
            "total_steps": self.total,
            "epoch": state.step / per_epoch,
            "loss": loss,
            "lr": lr,
            "samples_per_second": rate,
        }

    def evaluation(self, state: State) -> None:
        """Show the newest evaluation."""
        if not self.enabled:
            return
        text = "  ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in state.evaluations[-1].items()
        )
        (self._bar.write if self._bar is not None else print)(f"evaluation at step {state.step}: {text}")
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
