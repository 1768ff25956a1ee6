"""A target that hangs in a different way in each of its first attempts, then succeeds."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

from training.files import read_json, write_atomic

if TYPE_CHECKING:
    from training.context import Context

WAYS = ("stopped", "never loads", "skips a collective")


def main(ctx: Context) -> dict[str, Any]:
    state = ctx.run_dir / "state.json"
    first = ctx.group.broadcast(read_json(state) or 0)
    way = dict(enumerate(WAYS, start=1)).get(ctx.world.attempt)
    guilty = ctx.world.rank == ctx.world.attempt % ctx.world.world_size
    for step in range(first + 1, 21):
        time.sleep(0.02)
        if guilty and way and step == first + 5:
            if way == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif way == "never loads":
                load()
            else:
                skip(ctx, step)
        ctx.group.barrier()
        if ctx.world.rank == 0:
            write_atomic(state, str(step))
        ctx.log(step, loss=1 / step)
        ctx.should_stop(step)
    return {"attempt": ctx.world.attempt}


def load() -> None:
    time.sleep(1e6)


def skip(ctx: Context, step: int) -> None:
    """Skip the barrier in which the others wait, then wait in the next step for a message that is not sent."""
    import torch

    ctx.heartbeat.beat(step)
    torch.distributed.recv(torch.zeros(1), src=0)
