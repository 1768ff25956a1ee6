"""The world and run directory of a process that nobody gave a Context."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from training.distributed.world import World


def describe(env: Mapping[str, str], run_dir: str | Path | None) -> tuple[Path, World]:
    """Return the run directory and World that `env` describes, as set by ``launch``, ``torchrun`` or nobody.

    Raises ConfigError for a variable that is not a whole number.
    """
    world = World.from_environment(env)
    if world.device == "cpu" and "ACCELERATE_USE_CPU" not in env and "CUDA_VISIBLE_DEVICES" not in env and _has_gpu():
        world = replace(world, device="cuda")
    if run_dir is None and "LAUNCH_FINISHED" in env:  # <run directory>/logs/<attempt>/<rank>.finished
        run_dir = Path(env["LAUNCH_FINISHED"]).parents[2]
    folder = Path(run_dir) if run_dir is not None else Path("runs") / (Path(sys.argv[0]).stem or "python")
    return folder, replace(world, run_id=world.run_id or folder.name)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
