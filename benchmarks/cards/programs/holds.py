"""Is killed twice while it holds most of the memory of a card."""

import os
import signal
import time
from typing import Any

import torch


def main(ctx: Any) -> None:
    began = time.monotonic()
    size = int(float(os.environ.get("HELD_GIB", 60)) * 2**30)
    held = torch.ones(size, dtype=torch.uint8, device=ctx.device)
    assert int(held[-1]) == 1  # waits for the device
    attempt = ctx.world.attempt
    print(f"attempt {attempt}: {size / 2**30:g} GiB after {time.monotonic() - began:.1f} s", flush=True)
    for step in range(3 * attempt + 1, 3 * attempt + 4):
        ctx.should_stop(step)
        ctx.log(step, loss=1.0)
        time.sleep(0.3)
    if attempt < 3:
        os.kill(os.getpid(), signal.SIGKILL)
