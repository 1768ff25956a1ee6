"""A loop with an Accelerator in a run: stopped by agreement, and continued at the exact sample, also on other ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.integrations.test_lightning import Numbered, ids, lines, saved
from tests.training.loop.jobs import Net
from tests.training.ranks import spawn
from training.context import Context
from training.distributed.world import World
from training.errors import CheckpointError, ConfigError
from training.files import read_lines
from training.integrations import sealed

SIZE = 48
EPOCHS = 3
ONE = World(threads=1)


def train(
    world: World, run_dir: Path, stop_at: int = 0, accumulate: int = 1, batch: int = 4, sampler: str = "plain"
) -> tuple[int, bool, float]:
    """Train; rank `world_size - 1` is asked to stop at the step `stop_at`. Returns step, stopped, sum of the weights."""
    os.environ.update(world.environment())  # as a launcher does; the process is the test's own
    from accelerate import Accelerator, DataLoaderConfiguration

    from training.integrations.accelerate import attach

    run_dir.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    with Context(run_dir, world) as ctx:
        torch.manual_seed(0)
        config = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=sampler == "seedable")
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, dataloader_config=config)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=30)
        loader = torch.utils.data.DataLoader(Numbered(SIZE), batch_size=batch, shuffle=True)
        model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
        run = attach(accelerator, ctx, every=5)
        run.restore()
        for epoch in run.epochs(EPOCHS):
            for numbers, x, y in run.batches(loader):
                with accelerator.accumulate(model):
                    loss = (model(x) - y).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                ctx.event("ids", epoch=epoch, ids=numbers.tolist())
                run.log(loss=loss)
                if run.step + 1 == stop_at and world.rank == world.world_size - 1:
                    ctx.request_stop("test")
                if run.should_stop():
                    break
        assert ctx.failed_saves == []
        return run.step, ctx.stopped, sum(float(p.detach().double().sum()) for p in model.parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize(
    ("size", "accumulate", "stop_at", "sampler"),
    [(1, 1, 7, "plain"), (1, 1, 12, "seedable"), (1, 5, 3, "plain"), (2, 1, 7, "seedable"), (2, 2, 8, "plain")],
)
def test_stopped_and_resumed_ends_as_if_never_stopped(
    tmp_path: Path, size: int, accumulate: int, stop_at: int, sampler: str
) -> None:
    """With 5 batches a step the last step of an epoch has 2."""
    total = EPOCHS * -(-SIZE // 4 // accumulate)
    whole = spawn(train, size, tmp_path / "whole", 0, accumulate, 4, sampler)
    assert [each[:2] for each in whole] == [(total, False)] * size
    parts = spawn(train, size, tmp_path / "parts", stop_at, accumulate, 4, sampler)
    (stopped,) = {each[0] for each in parts}
    assert stop_at <= stopped <= stop_at + 1
    assert all(each[1] for each in parts)
    assert saved(tmp_path / "parts")[-1] == stopped
    assert spawn(train, size, tmp_path / "parts", 0, accumulate, 4, sampler) == whole, "weights to the bit"
    assert lines(tmp_path / "parts", "loss") == lines(tmp_path / "whole", "loss")
    assert sorted(lines(tmp_path / "whole", "loss")) == list(range(1, total + 1))
    epochs = ids(tmp_path / "parts")
    assert {epoch: sorted(each) for epoch, each in epochs.items()} == {
        epoch: list(range(SIZE)) for epoch in range(EPOCHS)
    }
    assert epochs[0] != epochs[1], "shuffled anew"
    assert len(list((tmp_path / "parts" / "accelerate").iterdir())) == 2, "the newest two stay"
    assert spawn(train, size, tmp_path / "parts", 0, accumulate, 4, sampler) == whole, "nothing is left to do"


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_another_number_of_ranks_uses_each_sample_once(tmp_path: Path) -> None:
    for size, stop_at in ((2, 7), (1, 15), (4, 24), (2, 0)):
        spawn(train, size, tmp_path, stop_at)
    assert sorted(lines(tmp_path, "loss")) == list(range(1, 37))
    expected = {epoch: list(range(SIZE)) for epoch in range(EPOCHS)}
    assert {epoch: sorted(each) for epoch, each in ids(tmp_path).items()} == expected


def loop(
    run_dir: Path, *, size: int = 12, batch: int = 2, stop_at: int = 0, seed: int = 0, **options: Any
) -> list[int]:
    """Train one epoch in this process; returns the ids of its samples."""
    from accelerate import Accelerator

    from training.integrations.accelerate import attach

    with Context(run_dir, ONE) as ctx:
        accelerator = Accelerator(cpu=True)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = torch.utils.data.DataLoader(Numbered(size), batch_size=batch, shuffle=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        run = attach(accelerator, ctx, seed=seed, **options)
        run.restore()
        found = []
        for _ in run.epochs(1):
            for numbers, _x, _y in run.batches(loader):
                found += numbers.tolist()
                if run.step + 1 == stop_at:
                    ctx.request_stop("test")
                if run.should_stop():
                    break
        return found


def test_a_position_that_cannot_be_continued_is_refused(tmp_path: Path) -> None:
    assert len(loop(tmp_path, stop_at=3)) == 6
    with pytest.raises(ConfigError, match="6 samples of the epoch are used, and a batch of all ranks has 4"):
        loop(tmp_path, batch=4)
    with pytest.raises(ConfigError, match="the data has 14 samples, and this run began with 12"):
        loop(tmp_path, size=14)
    with pytest.raises(ConfigError, match="this run began with seed=0"):
        loop(tmp_path, seed=1)
    assert len(loop(tmp_path, batch=3)) == 6


def test_damaged_and_interrupted_saves(tmp_path: Path) -> None:
    loop(tmp_path, every=2)
    output = tmp_path / "accelerate"
    assert [sealed.step_in(each) for each in sealed.numbered(output)] == [4, 6]
    shutil.copytree(output / "checkpoint-6", output / ".checkpoint-8.staging")
    (output / "checkpoint-6" / "optimizer.bin").write_bytes(b"damaged")
    assert len(loop(tmp_path)) == 4, "after step 4"
    assert not list(output.glob(".*")), "what a killed save left is removed"
    assert [line["step"] for line in read_lines(tmp_path / "events.jsonl") if line["event"] == "resumed"] == [4]
    for folder in sealed.numbered(output):
        (folder / "position.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        loop(tmp_path)


def test_a_full_disk_costs_checkpoints_and_nothing_else(disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = disk / "run"
    run_dir.mkdir()
    ballast = shutil.disk_usage(disk).free - 4096
    (disk / "ballast").write_bytes(bytes(ballast))
    assert len(loop(run_dir, every=2)) == 12
    assert capfd.readouterr().err.count("could not be saved") == 3
    (disk / "ballast").unlink()
    assert len(loop(run_dir, every=2)) == 12
    assert [sealed.step_in(each) for each in sealed.numbered(run_dir / "accelerate")] == [4, 6]


def test_subfolders_are_sealed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3" / "shards").mkdir(parents=True)
    (tmp_path / "checkpoint-3" / "shards" / "0.bin").write_bytes(b"0")
    (tmp_path / "checkpoint-3" / "shards" / ".metadata").write_bytes(b"of torch.distributed.checkpoint")
    remains = [tmp_path / "checkpoint-3" / name for name in (".manifest.json.0123456789abcdef.tmp", ".tmpSyVCRK")]
    for each in remains:
        each.write_text("a killed process left it")
    sealed.seal(tmp_path / "checkpoint-3", 3)
    assert not any(each.exists() for each in remains)
    with Context(tmp_path, ONE) as ctx:
        assert sealed.newest(ctx, tmp_path) == tmp_path / "checkpoint-3"
        (tmp_path / "checkpoint-3" / "shards" / "0.bin").write_bytes(b"1")
        with pytest.raises(CheckpointError, match=r"0\.bin is not what was written"):
            sealed.newest(ctx, tmp_path)


def test_what_attach_refuses(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from training.integrations.accelerate import attach

    with Context(tmp_path, ONE) as ctx:
        with pytest.raises(ConfigError, match="every=0 must be 1 or more"):
            attach(Accelerator(cpu=True), ctx, every=0)
        naming = ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
        with pytest.raises(ConfigError, match="leave automatic_checkpoint_naming out"):
            attach(Accelerator(cpu=True, project_config=naming), ctx)
        with pytest.raises(ConfigError, match=r"inside `for batch in run\.batches\(loader\)`"):
            attach(Accelerator(cpu=True), ctx).should_stop()


def test_only_sealed_checkpoints_count_when_old_ones_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step in (1, 3, 5):
            sealed.seal(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-best").mkdir()
    sealed.rotate(tmp_path, 2, protected=("checkpoint-1",))
    assert [sealed.step_in(folder) for folder in sealed.numbered(tmp_path)] == [1, 3, 4, 5, 6]
    sealed.rotate(tmp_path, 1)
    assert [sealed.step_in(folder) for folder in sealed.numbered(tmp_path)] == [5, 6]
    assert (tmp_path / "checkpoint-best").exists()
