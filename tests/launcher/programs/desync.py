"""A target whose ranks enter different collectives: one way in each attempt, in the order of `WAYS`.

The main threads do not stand in a collective, as with NCCL: they ask, as for a GPU, until it has ended.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from training.context import Context

WAYS = ("late", "on a subgroup", "crosswise", "other sizes")


def main(ctx: Context) -> dict[str, Any]:
    rank, way = ctx.world.rank, dict(enumerate(WAYS, start=1)).get(ctx.world.attempt)
    _ = ctx.group
    pair = dist.new_group([1, 2], group_desc="pair")
    for step in range(1, 4):
        finish(torch.ones(3))
        if rank:
            finish(torch.ones(5), pair)
        ctx.log(step, loss=1 / step)
        ctx.should_stop(step)
    if way == "late" and rank == 1:
        compute()
    if way == "crosswise" and rank == 1:
        finish(torch.ones(5), pair)
    if way == "other sizes":
        disagree(rank)
    finish(torch.ones(3))
    if way == "on a subgroup" and rank == 2:
        compute()
    if rank:
        finish(torch.ones(5), pair)
    return {"attempt": ctx.world.attempt}


def finish(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None
    while not work.is_completed():
        time.sleep(0.01)


def disagree(rank: int) -> None:
    """Have rank 2 receive what the others reduce."""
    if rank == 2:
        dist.broadcast(torch.ones(3), src=0, async_op=True)
    else:
        dist.all_reduce(torch.ones(3), async_op=True)
    compute()


def compute() -> None:
    time.sleep(1e6)
