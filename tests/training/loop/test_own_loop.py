"""A loop without ctx.steps: a loader of torchdata that keeps its position, saved by ctx.state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.loop.jobs import Net, Rows
from tests.training.ranks import losses, spawn
from training.context import Context
from training.distributed.world import World
from training.files import read_lines

SIZE, EPOCHS = 44, 3


def train(world: World, run_dir: Path, stop_at: int, workers: int) -> tuple[bool, list[float]]:
    """Train with 4 samples a batch of a rank; the last batch of an epoch is smaller. Rank 0 is asked to stop."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

    torch.set_num_threads(1)
    run_dir.mkdir(exist_ok=True)
    with Context(run_dir, world) as ctx:
        ctx.seed(0)
        data = list(zip(range(SIZE), Rows(SIZE).x, Rows(SIZE).y, strict=True))
        sampler = StatefulDistributedSampler(data, world.world_size, world.rank)
        loader = StatefulDataLoader(
            data, batch_size=4, sampler=sampler, num_workers=workers, generator=torch.Generator()
        )
        model = ctx.setup(Net())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        state = ctx.state(model=model, optimizer=optimizer, loader=loader)
        step = state.restore()
        for epoch in range(step // len(loader), EPOCHS):
            sampler.set_epoch(epoch)
            for ids, x, y in loader:
                loss = (model(x) - y).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                ctx.log(step, loss=loss)
                ctx.event("ids", epoch=epoch, ids=ids)
                if step == stop_at and world.rank == 0:
                    ctx.request_stop("test")
                if ctx.should_stop(step, save=state, every=100):
                    return True, []
        return False, [float(p.detach().double().sum()) for p in model.parameters()]


def ids(run_dir: Path) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for line in read_lines(run_dir / "events.jsonl"):
        if line["event"] == "ids":
            found.setdefault(line["epoch"], []).extend(line["ids"])
    return {epoch: sorted(each) for epoch, each in found.items()}


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize(("size", "workers", "stop_at"), [(1, 0, 5), (1, 2, 16), (2, 0, 8)])
def test_a_loader_that_keeps_its_position(tmp_path: Path, size: int, workers: int, stop_at: int) -> None:
    whole: list[Any] = spawn(train, size, tmp_path / "whole", 0, workers)
    assert [stopped for stopped, _ in spawn(train, size, tmp_path / "parts", stop_at, workers)] == [True] * size
    assert spawn(train, size, tmp_path / "parts", 0, workers) == whole
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert ids(tmp_path / "parts") == {epoch: list(range(SIZE)) for epoch in range(EPOCHS)}
