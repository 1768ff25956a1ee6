"""A target with typed flags that counts steps, stops on request, and resumes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.files import read_json, write_atomic

if TYPE_CHECKING:
    from training.context import Context


@dataclass(frozen=True)
class Config:
    steps: int = 10  # how many
    seconds: float = 0.02  # that a step takes
    fail_at: int = -1  # the step at which the last rank raises


def main(ctx: Context, config: Config) -> dict[str, Any] | None:
    state = ctx.run_dir / "state.json"
    first = ctx.group.broadcast(read_json(state) or 0)
    for step in range(first + 1, config.steps + 1):
        time.sleep(config.seconds)
        if step == config.fail_at and ctx.world.rank == ctx.world.world_size - 1:
            raise LookupError(f"no sample at step {step}")
        ctx.group.barrier()
        ctx.log(step, total_steps=config.steps, loss=1 / step)
        if ctx.world.rank == 0:
            write_atomic(state, str(step))
        print(f"step {step}", flush=True)
        if ctx.should_stop(step):
            return None
    return {"first": first, "ranks": ctx.group.gather(ctx.world.rank), "steps": config.steps}


def broken(needs: int, three: int, things: int) -> None:
    """Not a target."""
