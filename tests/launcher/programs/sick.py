"""A target that reports a faulty GPU in its first attempt."""

from __future__ import annotations

from training.context import Context


def main(ctx: Context) -> None:
    if ctx.world.attempt == 1:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
