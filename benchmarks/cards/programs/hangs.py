"""Starts work that does not end in its sixth step."""

import time
from typing import Any

import torch


def main(ctx: Any) -> None:
    one = torch.ones(1, device=ctx.device)
    for step in range(1, 9):
        if step == 6 and one.is_cuda:
            torch.cuda._sleep(10**12)  # type: ignore[no-untyped-call]
        while step == 6 and not one.is_cuda:
            time.sleep(1)
        one.item()
        ctx.should_stop(step)
        ctx.log(step, loss=1.0)
        time.sleep(0.3)
