"""The reference job, delayed at each step by the seconds in the file ``pace``, to leave time for faults."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, SupportsIndex

import torch.distributed
from accelerate import Accelerator  # noqa: F401
from datasets import load_from_disk  # noqa: F401
from transformers import BertForSequenceClassification, BertTokenizer, get_scheduler  # noqa: F401

from training.bert.config import TrainConfig
from training.context import Context
from training.train import train


def main(ctx: Context, config: TrainConfig) -> dict[str, Any]:
    asked = ctx.should_stop

    def slowly(step: SupportsIndex, **options: Any) -> bool:
        time.sleep(pace(ctx.run_dir / "pace"))
        hang(ctx)
        return asked(step, **options)

    ctx.should_stop = slowly  # type: ignore[method-assign]
    return train(ctx, config)


def hang(ctx: Context) -> None:
    """Hang once if the file ``hang`` names this rank: in a data loader, or in a receive."""
    try:
        rank, how = (ctx.run_dir / "hang").read_text().split()
    except (FileNotFoundError, ValueError):
        return
    if ctx.world.rank == int(rank):
        (ctx.run_dir / "hang").unlink()
        if how == "collective":
            other = (ctx.world.rank + 1) % ctx.world.world_size
            torch.distributed.recv(torch.zeros(1), src=other)  # which does not send
        time.sleep(1e6)


def pace(file: Path) -> float:
    """Extra seconds per step; 0 without a file."""
    try:
        return float(file.read_text() or 0)
    except FileNotFoundError:
        return 0.0
