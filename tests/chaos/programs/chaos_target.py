"""The reference job, held up at every step for as long as the file ``pace`` says, so that there is time for a fault."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch.distributed  # noqa: F401
from accelerate import Accelerator  # noqa: F401
from datasets import load_from_disk  # noqa: F401
from transformers import BertForSequenceClassification, BertTokenizer, get_scheduler  # noqa: F401

from training.context import Context
from training.train import TrainConfig, train


def main(ctx: Context, config: TrainConfig) -> dict[str, Any]:
    asked = ctx.should_stop

    def slowly(step: int) -> bool:
        time.sleep(pace(ctx.run_dir / "pace"))
        return asked(step)

    ctx.should_stop = slowly  # type: ignore[method-assign]
    return train(ctx, config)


def pace(file: Path) -> float:
    """Seconds for each step; 0 where nobody has said anything."""
    try:
        return float(file.read_text() or 0)
    except FileNotFoundError:
        return 0.0
