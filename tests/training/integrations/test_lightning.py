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
from training.files import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rank_server")]

SIZE, BATCH, EPOCHS = 48, 4, 2


class Numbered(Rows):
    """Rows with their numbers."""

    def __getitem__(self, sample: int) -> Any:
        return sample, *super().__getitem__(sample)


def train(
    world: World, run_dir: Path, stop_at: int = 0, accumulate: int = 1, how: str = "request", loader: str = "stateful"
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

    with Context(run_dir, world) as ctx, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGTERM, lambda *_: ctx.request_stop("SIGTERM"))
        torch.manual_seed(0)
        run = RunCallback(ctx, every=5)
        kind = StatefulDataLoader if loader == "stateful" else DataLoader
        data = kind(Numbered(SIZE), batch_size=BATCH // world.world_size, shuffle=True)
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
