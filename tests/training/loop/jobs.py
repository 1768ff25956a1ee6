"""Functions of users that tests train on real ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.context import Context
from training.distributed.world import World
from training.files import read_lines


class Rows(torch.utils.data.Dataset[Any]):
    """A regression task of `size` samples: 6 numbers, and what is to be predicted."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self.x = torch.randn(size, 6, generator=generator)
        self.y = self.x.sum(1) + 0.1 * torch.randn(size, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[sample], self.y[sample]


@dataclass(frozen=True)
class Config:
    """Of `fit`."""

    size: int = 53
    global_batch: int = 8
    microbatch: int | None = None
    epochs: int = 2
    every: int = 3
    dropout: float = 0.1
    stop_at: int = 0  # the step at which a stop is asked for


class Net(torch.nn.Module):
    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Dropout(dropout), torch.nn.ReLU(), torch.nn.Linear(16, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layers(x)[:, 0]
        return found


def fit(ctx: Context, config: Config) -> dict[str, Any]:
    """The function of the how-to, with the samples of every step recorded."""
    ctx.seed(1)
    data, validation = Rows(config.size), Rows(11)
    model = ctx.setup(Net(config.dropout))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps = ctx.steps(
        data, global_batch=config.global_batch, microbatch=config.microbatch, epochs=config.epochs, seed=3
    )
    state = ctx.state(model=model, optimizer=optimizer, steps=steps, keep=100)
    state.restore()
    for step in steps:
        for x, y in step:
            step.backward(torch.nn.functional.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        ctx.log(step, loss=step.loss)
        ctx.event("ids", step=int(step), epoch=step.epoch, ids=step.ids)
        if step.ends_epoch:
            ctx.log(step, eval=ctx.evaluate(lambda batch: model(batch[0]), validation, error_to(validation)))
        if step.number == config.stop_at and ctx.world.rank == ctx.world.world_size - 1:
            ctx.request_stop("test")
        if ctx.should_stop(step, save=state, every=config.every):
            break
    return {"loss": steps.loss}


def error_to(data: Rows) -> Any:
    def error(predictions: Any) -> float:
        return float(((predictions - data.y.numpy()) ** 2).mean())

    return error


def fit_in_world(world: World, run_dir: Path, config: Config) -> dict[str, Any]:
    torch.set_num_threads(1)
    run_dir.mkdir(parents=True, exist_ok=True)
    with Context(run_dir, world) as ctx:
        return {**fit(ctx, config), "stopped": ctx.stopped, "failed": ctx.failed_saves}


def evaluations(run_dir: Path) -> dict[int, Any]:
    return {line["step"]: line["eval"] for line in read_lines(run_dir / "metrics.jsonl") if "eval" in line}
