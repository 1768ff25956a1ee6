"""Functions of users that tests train on real ranks."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.checkpoints import store
from training.context import Context
from training.data.sampler import order
from training.distributed.world import World
from training.files import read_lines
from training.loop import evaluation
from training.loop.steps import Step


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
    shard: bool = False
    precision: str = "fp32"
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


class Normed(torch.nn.Module):
    """A model whose buffers differ from rank to rank until they are sent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.norm(x))[:, 0]
        return found


def fit(ctx: Context, config: Config) -> dict[str, Any]:
    """The function of the how-to, with the samples of every step recorded."""
    ctx.seed(1)
    life = time.monotonic() if ctx.world.world_size == 1 else ctx.group.broadcast(time.monotonic())
    data, validation = Rows(config.size), Rows(11)
    model = ctx.setup(Net(config.dropout), shard=config.shard, precision=config.precision)
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
        ctx.event("ids", step=step.number, epoch=step.epoch, ids=step.ids, life=life)
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


def reference(config: Config) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """Losses by step, and the final weights, of `fit` as a plain loop of one process over whole batches."""
    torch.manual_seed(1)
    data, model = Rows(config.size), Net(0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: dict[int, float] = {}
    for epoch in range(config.epochs):
        samples = order(config.size, 3, epoch)
        for at in range(0, config.size, config.global_batch):
            batch = samples[at : at + config.global_batch]
            loss = torch.nn.functional.mse_loss(model(data.x[batch]), data.y[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            found[len(found) + 1] = loss.item()
    return found, model.state_dict()


def ids_of_epochs(run_dir: Path) -> dict[int, list[int]]:
    """The ids of the samples of each epoch, from the last record of each step."""
    steps: dict[int, dict[int, tuple[int, list[int]]]] = {}
    attempts: dict[int, float] = {}
    for line in read_lines(run_dir / "events.jsonl"):
        if line["event"] == "ids":
            if line["life"] != attempts.get(line["step"]):
                steps[line["step"]] = {}  # an earlier life did this step, and its checkpoint was not reached
                attempts[line["step"]] = line["life"]
            steps[line["step"]][line["rank"]] = (line["epoch"], line["ids"])
    epochs: dict[int, list[int]] = {}
    for ranks in steps.values():
        for epoch, ids in ranks.values():
            epochs.setdefault(epoch, []).extend(ids)
    return epochs


def fit_and_die(world: World, run_dir: Path, config: Config, victim: int, kill: tuple[str, int]) -> None:
    """`fit` as a rank; `victim` is killed at the n-th call of a kind. The others are ended as a launcher would do."""
    kind, left = kill

    def dying(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and world.rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    where: dict[str, tuple[Any, str]] = {
        "backward": (Step, "backward"),
        "update": (torch.optim.AdamW, "step"),
        "evaluation": (evaluation, "_columns"),
        "write": (store, "write_file"),
        "manifest": (store, "write_manifest"),
        "rename": (os, "rename"),
    }
    owner, name = where[kind]
    setattr(owner, name, dying(getattr(owner, name)))  # never undone: the process is the test's own
    try:
        fit_in_world(world, run_dir, config)
    except RuntimeError:
        os.kill(os.getpid(), signal.SIGKILL)
