"""Run the reference job without the launcher.

`python -m training RUN_DIR [FLAGS]`, or `torchrun ... -m training RUN_DIR [FLAGS]`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from training.bert.config import TrainConfig
from training.context import Context
from training.distributed.world import World
from training.errors import CheckpointError, ConfigError
from training.flags.fields import parse, usage
from training.train import check, train

STOPPED = 3  # exit status of a run that was stopped and can be resumed


def main(args: Sequence[str]) -> int:
    """Train as the rank that the environment describes.

    Returns the exit status: 0, 2 for wrong input, or 3 if the run was stopped.
    """
    if not args or args[0].startswith("-"):
        print(f"usage: python -m training RUN_DIR [FLAGS]\n\n{usage(TrainConfig)}")
        return 0 if "--help" in args else 2
    try:
        config = parse(TrainConfig, args[1:], prog="training")
        check(config)
        world = World.from_environment(os.environ)
        if world.device == "cpu" and "ACCELERATE_USE_CPU" not in os.environ and _has_gpu():
            world = replace(world, device="cuda")
        run_dir = Path(args[0])
        run_dir.mkdir(parents=True, exist_ok=True)
        with Context(run_dir, world) as ctx:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: ctx.request_stop(signal.Signals(number).name))
            result = train(ctx, config)
    except (ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if world.rank == 0:
        print(result)
    return STOPPED if ctx.stopped else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
