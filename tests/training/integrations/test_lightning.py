"""A Lightning Trainer in a run: stopped by agreement with a checkpoint, and continued at the exact sample."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.loop.jobs import Net, Rows
from tests.training.ranks import spawn
from training.context import Context
from training.distributed.world import World
from training.errors import ConfigError
from training.files import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rank_server")]

SIZE, BATCH, EPOCHS = 48, 4, 2


class Numbered(Rows):
    """Rows with their numbers."""

    def __getitem__(self, sample: int) -> Any:
        return sample, *super().__getitem__(sample)


def train(
    world: World, run_dir: Path, stop_at: int = 0, accumulate: int = 1, how: str = "request", loader: str = "own"
) -> tuple[int, bool, float]:
    """Train; rank `world_size - 1` is asked to stop at the step `stop_at`. Returns step, stopped, sum of the weights."""
    os.environ.update(world.environment())  # as a launcher does; the process is the test's own
    import logging

    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader
    from torchdata.stateful_dataloader import StatefulDataLoader

    from training.integrations.lightning import RunCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    run_dir.mkdir(exist_ok=True)
    torch.set_num_threads(1)

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            ids, x, y = batch
            ctx.event("ids", epoch=self.current_epoch, step=self.global_step + 1, ids=ids.tolist())
            loss = (self.net(x) - y).square().mean()
            self.log("error", loss.detach())
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.global_step == stop_at - 1 and world.rank == world.world_size - 1:
                ctx.request_stop("test") if how == "request" else os.kill(os.getpid(), signal.SIGTERM)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_error", (self.net(batch[1]) - batch[2]).square().mean(), sync_dist=True)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    with Context(run_dir, world) as ctx, warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        signal.signal(signal.SIGTERM, lambda *_: ctx.request_stop("SIGTERM"))
        torch.manual_seed(0)
        run = RunCallback(ctx, every=5)
        size = BATCH // world.world_size
        if loader == "own":
            data = run.loader(Numbered(SIZE), batch_size=size, seed=3)
        else:
            kind = StatefulDataLoader if loader == "torchdata" else DataLoader
            data = kind(Numbered(SIZE), batch_size=size, shuffle=True)
        validation = DataLoader(Numbered(10), batch_size=2)
        trainer = Trainer(
            callbacks=[run], devices=run.devices, num_nodes=run.num_nodes, accelerator="cpu", max_epochs=EPOCHS,
            accumulate_grad_batches=accumulate, log_every_n_steps=1, default_root_dir=run_dir / "lightning",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            strategy="ddp" if world.world_size > 1 else "auto", num_sanity_val_steps=0,
        )  # fmt: skip
        module = Module()
        trainer.fit(module, data, validation, ckpt_path=run.newest_checkpoint(), weights_only=False)
        assert ctx.failed_saves == []
        warned = [str(each.message) for each in found if "RunCallback.loader" in str(each.message)]
        assert len(warned) == (loader != "own" and (world.world_size > 1 or loader == "plain") and world.rank == 0)
        return trainer.global_step, ctx.stopped, sum(float(p.detach().double().sum()) for p in module.parameters())


def lines(run_dir: Path, name: str) -> dict[int, Any]:
    return {line["step"]: line[name] for line in read_lines(run_dir / "metrics.jsonl") if name in line}


def saved(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_lines(run_dir / "events.jsonl") if line["event"] == "saved"]


def ids(run_dir: Path) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for line in read_lines(run_dir / "events.jsonl"):
        if line["event"] == "ids":
            found.setdefault(line["epoch"], []).extend(line["ids"])
    return found


@pytest.mark.parametrize(("size", "accumulate", "stop_at"), [(1, 1, 7), (1, 2, 3), (1, 1, 12), (2, 1, 7), (2, 2, 4)])
def test_stopped_and_resumed_ends_as_if_never_stopped(tmp_path: Path, size: int, accumulate: int, stop_at: int) -> None:
    total = SIZE * EPOCHS // BATCH // accumulate
    whole = spawn(train, size, tmp_path / "whole", 0, accumulate)
    assert [each[:2] for each in whole] == [(total, False)] * size
    assert sorted(lines(tmp_path / "whole", "loss")) == list(range(1, total + 1))
    assert sorted(lines(tmp_path / "whole", "error")) == list(range(1, total + 1))
    assert sorted(lines(tmp_path / "whole", "eval")) == [total // 2, total]
    assert all(each["val_error"] > 0 and "error" not in each for each in lines(tmp_path / "whole", "eval").values())
    parts = spawn(train, size, tmp_path / "parts", stop_at, accumulate)
    (stopped,) = {each[0] for each in parts}
    assert stop_at <= stopped <= stop_at + 1
    assert all(each[1] for each in parts)
    assert saved(tmp_path / "parts")[-1] == stopped
    assert spawn(train, size, tmp_path / "parts", 0, accumulate) == whole, "weights to the bit"
    assert lines(tmp_path / "parts", "loss") == lines(tmp_path / "whole", "loss")
    assert lines(tmp_path / "parts", "eval") == lines(tmp_path / "whole", "eval")
    assert {epoch: sorted(each) for epoch, each in ids(tmp_path / "parts").items()} == {
        epoch: list(range(SIZE)) for epoch in range(EPOCHS)
    }
    assert spawn(train, size, tmp_path / "parts", 0, accumulate) == whole, "nothing is left to do"


@pytest.mark.parametrize(("size", "loader"), [(1, "torchdata"), (1, "plain"), (2, "torchdata")])
def test_loaders_that_do_not_keep_their_position_are_named(tmp_path: Path, size: int, loader: str) -> None:
    """`train` checks the warning; torchdata's own loader keeps its position on one rank."""
    whole = spawn(train, size, tmp_path / "whole", 0, 1, "request", loader)
    if (size, loader) == (1, "torchdata"):
        spawn(train, 1, tmp_path / "parts", 7, 1, "request", loader)
        assert spawn(train, 1, tmp_path / "parts", 0, 1, "request", loader) == whole


def test_sigterm_stops_with_a_checkpoint(tmp_path: Path) -> None:
    """The handler of Lightning would end the process without one."""
    ((step, stopped, _),) = spawn(train, 1, tmp_path, 7, 1, "SIGTERM")
    assert (step, stopped) == (7, True)
    assert saved(tmp_path) == [5, 7]


def test_a_trainer_with_other_ranks_than_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the Trainer has 1 ranks, and the run has 2; start all of them with"):
        spawn(mismatch, 2, tmp_path)


def mismatch(world: World, run_dir: Path) -> None:
    from lightning.pytorch import Trainer

    from training.integrations.lightning import RunCallback

    with Context(run_dir, world) as ctx:
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        RunCallback(ctx).setup(trainer, None, "fit")


def test_a_child_of_lightnings_own_launcher_is_refused() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 and no RANK, as processes have that Lightning started"):
        World.from_environment({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0", "MASTER_PORT": "1234"})
