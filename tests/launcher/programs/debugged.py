"""Some steps under DDP, and a breakpoint in rank 1 in the middle of them."""

from __future__ import annotations

import hashlib
import time

import torch

from training.context import Context


def main(ctx: Context, steps: int = 40, breakpoint_at: int = 0) -> dict[str, str]:
    torch.manual_seed(0)
    model = ctx.setup(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, steps + 1):
        loss = model(torch.full((4, 8), 0.1 * (step + ctx.world.rank))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ctx.log(step, loss=loss)
        if step == breakpoint_at and ctx.world.rank == 1:
            breakpoint()
        time.sleep(0.05)
    weights = b"".join(each.detach().numpy().tobytes() for each in model.parameters())
    return {"digest": hashlib.sha256(weights).hexdigest()}
