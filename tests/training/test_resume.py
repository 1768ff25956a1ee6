"""Killed or stopped runs that resume end like uninterrupted ones."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.ranks import assert_same_end, losses, spawn, train_in, train_in_world
from training.bert.config import TrainConfig
from training.bert.model import load_model, load_tokenizer
from training.checkpoints.manifest import write_file
from training.context import Context
from training.data.sampler import Position, steps
from training.distributed.world import World
from training.errors import CheckpointError, ConfigError
from training.files import append_line, read_lines
from training.loop import evaluation
from training.loop.steps import Step
from training.train import train

ONE = World(threads=1)
Options = dict[str, Any]


def train_and_die(world: World, run_dir: Path, options: Options, victim: int, kills: dict[str, int]) -> None:
    """Run a rank; `victim` is killed at the given count of steps, evaluations or files of a save.

    The other ranks lose it and are killed, as by the launcher.
    """
    counts = dict.fromkeys(kills, 0)

    def die(kind: str) -> None:
        if kind in kills and world.rank == victim:
            counts[kind] += 1
            if counts[kind] == kills[kind]:
                os.kill(os.getpid(), signal.SIGKILL)

    def dying(kind: str, function: Any) -> Any:
        return lambda *args, **kwargs: (die(kind), function(*args, **kwargs))[1]  # type: ignore[func-returns-value]

    patch = pytest.MonkeyPatch()  # not undone: the process belongs to the test
    patch.setattr(Step, "__iter__", dying("step", Step.__iter__))
    patch.setattr(evaluation, "evaluate", dying("evaluate", evaluation.evaluate))
    patch.setattr("training.checkpoints.store.write_file", dying("write", write_file))
    with dying_of_loneliness():
        train_in_world(world, run_dir, options)


@contextlib.contextmanager
def dying_of_loneliness() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        os.kill(os.getpid(), signal.SIGKILL)


def some_kill(rng: random.Random, size: int) -> tuple[int, dict[str, int]]:
    """A victim among `size` ranks and the point of its death; rank 0 writes checkpoints."""
    victim, at = rng.randrange(size), rng.randint(1, 9)
    return rng.choice(
        [(victim, {"step": at}), (victim, {"step": at}), (0, {"write": rng.randint(1, 30)}), (victim, {"evaluate": 1})]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize(("size", "schedules"), [(1, 3), (2, 1), (3, 1)])
def test_killed_and_resumed_ends_as_if_never_killed(
    tmp_path: Path, options: Options, size: int, schedules: int
) -> None:
    options |= {"batch_size": -(-8 // size), "global_batch": 8}
    spawn(train_in_world, size, tmp_path / "whole", options)
    rng = random.Random(int(os.environ.get("KILL_SEED", "1")))
    for schedule in range(int(os.environ.get("KILL_SCHEDULES", schedules))):
        run = tmp_path / f"killed{schedule}"
        for _ in range(3):
            spawn(train_and_die, size, run, options, *some_kill(rng, size))
        spawn(train_in_world, size, run, options)
        assert_same_end(tmp_path / "whole", run)


def keep_ledger(world: World, run_dir: Path, options: Options, life: int, death: tuple[int, int]) -> None:
    """Run a rank that records the samples of each step; `death`: the killed rank and its step."""
    batches = Step.__iter__
    count = itertools.count(1)

    def noted(step: Step) -> Iterator[Any]:
        what = step._plan
        at = [what.after.epoch, what.after.position]
        append_line(run_dir / "ledger", {"life": life, "rank": world.rank, "at": at, "ids": what.microbatches})
        if (world.rank, next(count)) == death:
            os.kill(os.getpid(), signal.SIGKILL)
        return batches(step)

    Step.__iter__ = noted  # type: ignore[method-assign]
    with dying_of_loneliness():
        train_in_world(world, run_dir, options)


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_each_sample_counts_once_though_ranks_are_killed_and_their_number_changes(
    tmp_path: Path, options: Options
) -> None:
    """A ledger of sample ids over real ranks: one is killed, then another number of ranks resumes."""
    options |= {"batch_size": 3, "global_batch": 8}
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_in(ONE, whole, **{**options, "batch_size": 8})
    rng = random.Random(int(os.environ.get("KILL_SEED", "1")))
    sizes = (2, 4, 1, 2)
    for life, size in enumerate(sizes):
        death = (rng.randrange(size), rng.randint(5, 6) if life + 1 < len(sizes) else 0)
        spawn(keep_ledger, size, run, options, life, death)
    lines = read_lines(run / "ledger")
    ledger = {tuple(line["at"]): line["life"] for line in lines}  # a repeated step replaces the lost one
    assert len(lines) > sum(sizes[life] for life in ledger.values()), "no step was lost and taken again"
    assert {sizes[life] for life in ledger.values()} == {1, 2, 4}
    alone = [
        step
        for epoch in (0, 1)
        for step in steps(50, Position(42, epoch), rank=0, world_size=1, batch_size=8, global_batch=8)
    ]
    assert [*ledger] == [(step.after.epoch, step.after.position) for step in alone]
    seen: Counter[tuple[int, int]] = Counter()
    for number, step in enumerate(alone):
        at = (step.after.epoch, step.after.position)
        shares = {line["rank"]: line["ids"] for line in lines if (*line["at"], line["life"]) == (*at, ledger[at])}
        assert sorted(shares) == list(range(sizes[ledger[at]])), "every rank has its share"
        assert all(len(microbatch) <= 3 for share in shares.values() for microbatch in share)
        ids = [sample for share in shares.values() for microbatch in share for sample in microbatch]
        assert sorted(ids) == sorted(step.microbatches[0]), "the global batch is that of one rank"
        seen.update((number // 7, sample) for sample in ids)
    assert seen == Counter((epoch, sample) for epoch in (0, 1) for sample in range(50))
    assert sorted(losses(run)) == list(range(1, 15))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)


def train_and_stop(world: World, run_dir: Path, options: Options, after: int) -> tuple[dict[str, Any], bool]:
    """Run a rank; the last rank is asked to stop after some steps."""
    torch.set_num_threads(1)
    run_dir.mkdir(parents=True, exist_ok=True)
    with Context(run_dir, world) as ctx:
        finish, count = Step._finish, 0

        def counted(self: Step) -> None:
            nonlocal count
            finish(self)
            count += 1
            if count == after and world.rank == world.world_size - 1:
                ctx.request_stop("test")

        Step._finish = counted  # type: ignore[method-assign]
        try:
            return train(ctx, TrainConfig(**options)), ctx.stopped
        finally:
            Step._finish = finish  # type: ignore[method-assign]


def test_a_stop_saves_and_the_run_ends_as_if_never_stopped(tmp_path: Path, options: Options) -> None:
    options["save_every"] = 1000
    train_in(ONE, tmp_path / "whole", **options)
    result, stopped = train_and_stop(ONE, tmp_path / "run", options, 4)
    assert stopped
    assert result["steps"] == 4
    assert not (tmp_path / "run" / "model").exists()
    assert not train_in(ONE, tmp_path / "run", **options)[1]
    assert_same_end(tmp_path / "whole", tmp_path / "run")


def test_a_stop_asked_for_in_the_last_step_is_a_finish(tmp_path: Path, options: Options) -> None:
    result, stopped = train_and_stop(ONE, tmp_path / "run", options, 14)
    assert not stopped
    assert result["model"] == "model"


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_sharded_training_is_the_same_and_goes_on_with_any_number_of_ranks(tmp_path: Path, options: Options) -> None:
    options |= {"batch_size": 4, "global_batch": 8}
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_in(ONE, whole, **options)
    for size, stop_after, sharded in ((2, 3, True), (3, 3, True), (1, 3, False), (2, 0, True)):
        for _, stopped in spawn(train_and_stop, size, run, {**options, "shard": sharded}, stop_after):
            assert stopped == bool(stop_after)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)
    files = {path.name for path in max((run / "checkpoints").glob("step-*")).iterdir()}
    assert {"model.rank00000.safetensors", "model.rank00001.safetensors", "optimizer.rank00001.safetensors"} <= files
    sizes = [
        (run / "checkpoints/step-000000014" / f"model.rank0000{rank}.safetensors").stat().st_size for rank in (0, 1)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    ours = load_file(run / "model" / "model.safetensors")
    for name, tensor in load_file(whole / "model" / "model.safetensors").items():
        assert torch.allclose(ours[name], tensor, atol=1e-3), name


def test_a_run_does_not_go_on_with_other_data_seed_or_model(tmp_path: Path, options: Options, small: Path) -> None:
    run = tmp_path / "run"
    train_in(ONE, run, **{**options, "max_steps": 2})
    with pytest.raises(ConfigError, match="began with --seed 42"):
        train_in(ONE, run, **options, seed=1)
    with pytest.raises(ConfigError, match="--global-batch is 16, but this run began with 8"):
        train_in(ONE, run, **options, global_batch=16)
    wide = load_model("tiny", 2)
    wide.config.num_hidden_layers = 1
    type(wide)(wide.config).save_pretrained(tmp_path / "other")
    load_tokenizer("tiny").save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="of another model"):
        train_in(ONE, run, **{**options, "model": str(tmp_path / "other")})
    file = small / "train.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match=r"data have changed .* \(50 samples then, 49 now\)"):
        train_in(ONE, run, **options)
    for damaged in (run / "checkpoints").glob("step-*/manifest.json"):
        damaged.write_text(json.dumps({}))
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(CheckpointError, match="every checkpoint"):
        train_in(ONE, run, **options)
