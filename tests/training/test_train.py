from __future__ import annotations

import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.ranks import assert_same_end, losses, spawn, train_in
from training import train as module
from training.context import Context
from training.data import encode
from training.engine import Engine
from training.errors import CheckpointError, ConfigError
from training.files import read_lines
from training.manifest import write_file
from training.model import load_model, load_tokenizer
from training.sampler import Position, steps
from training.sources import find_source
from training.state import seed_all
from training.train import TrainConfig, check, train
from training.world import World

ONE = World(threads=1)
Options = dict[str, Any]


@pytest.fixture
def options(small: Path, tmp_path: Path) -> Options:
    return {
        "dataset": str(small), "batch_size": 8, "epochs": 2, "log_every": 1, "save_every": 2, "keep": 100,
        "cache": tmp_path / "cache", "log_with": (),
    }  # fmt: skip


def test_a_run_from_start_to_end(tmp_path: Path, options: Options) -> None:
    run = tmp_path / "run"
    result, stopped = train_in(ONE, run, **options)
    assert not stopped
    assert result["samples"] == 23
    assert result["steps"] == 2 * math.ceil(50 / 8)
    assert result["epochs"] == 2
    assert set(result) == {"accuracy", "f1", "samples", "steps", "epochs", "best", "model"}
    assert result["best"]["score"] >= result["accuracy"]
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 15))
    assert {"step", "total_steps", "epoch", "loss", "lr", "samples_per_second"} <= lines[0].keys()
    assert [line["eval"]["samples"] for line in lines if "eval" in line] == [23, 23]
    saved = [line["step"] for line in read_lines(run / "events.jsonl") if line["event"] == "saved"]
    assert saved == [2, 4, 6, 7, 8, 10, 12, 14]
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    again = AutoModelForSequenceClassification.from_pretrained(run / "checkpoints" / "step-000000014")
    for left, right in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)
    assert AutoTokenizer.from_pretrained(run / "model")("anna sold the boat .")["input_ids"]
    before = sorted(os.listdir(run))
    assert train_in(ONE, run, **options)[0] == result, "a finished run that is started again has its result"
    assert sorted(os.listdir(run)) == before


def plain_loop(options: Options, seed: int, lr: float, fused: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The recipe's loop with nothing of ours but the order of the samples."""
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding, get_scheduler

    tokenizer = load_tokenizer("tiny")
    source = find_source("train", options["dataset"], "")
    data = encode(source, tokenizer, max_length=128, num_labels=2, cache=options["cache"])
    seed_all(seed)
    model = load_model("tiny", 2)
    seed_all(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=fused)
    batches = [
        list(step.microbatches[0])
        for epoch in (0, 1)
        for step in steps(50, Position(seed, epoch), rank=0, world_size=1, batch_size=8, global_batch=8)
    ]
    scheduler = get_scheduler("linear", optimizer, 0, len(batches))
    rows = data.rows(range(50))
    loader: Any = DataLoader(rows, batch_sampler=batches, collate_fn=DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]
    found = []
    model.train()
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, model.state_dict()


def test_the_losses_are_those_of_the_plain_loop(tmp_path: Path, options: Options) -> None:
    """The same recipe, not a similar one: every loss equal to the bit on one rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected, weights = plain_loop(options, 3, 1e-3, True)
        unfused, _ = plain_loop(options, 3, 1e-3, False)
    finally:
        torch.set_num_threads(threads)
    train_in(ONE, tmp_path / "run", **options, seed=3, lr=1e-3)
    assert list(losses(tmp_path / "run").values()) == expected
    assert expected == pytest.approx(unfused, rel=1e-5)  # the fused optimizer rounds differently, and that is all
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], trained[name]) for name in trained)


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_accumulation_and_ranks_take_the_same_step(tmp_path: Path, options: Options) -> None:
    """Global batch 8 as one batch, as microbatches of 3, and on 2 and 3 ranks: equal up to rounding."""
    train_in(ONE, tmp_path / "one", **options)
    expected = losses(tmp_path / "one")
    train_in(ONE, tmp_path / "micro", **{**options, "batch_size": 3, "global_batch": 8})
    assert losses(tmp_path / "micro") == pytest.approx(expected, rel=1e-4)
    for size in (2, 3):
        run = tmp_path / str(size)
        results = spawn(train_in_world, size, run, {**options, "batch_size": 3, "global_batch": 8})
        assert losses(run) == pytest.approx(expected, rel=1e-4)
        assert all(result == results[0] for result in results)


def train_in_world(world: World, run_dir: Path, options: Options) -> tuple[dict[str, Any], bool]:
    torch.set_num_threads(1)
    return train_in(world, run_dir, **options)


def train_and_die(world: World, run_dir: Path, options: Options, kills: dict[str, int]) -> None:
    """As a rank that is killed at the given count of steps taken, evaluations begun, or files written by a save."""
    counts = dict.fromkeys(kills, 0)

    def die(kind: str) -> None:
        if kind in kills:
            counts[kind] += 1
            if counts[kind] == kills[kind]:
                os.kill(os.getpid(), signal.SIGKILL)

    step, evaluate = Engine.step, Engine.evaluate
    Engine.step = lambda self, *args: (die("step"), step(self, *args))[1]  # type: ignore[method-assign,func-returns-value]
    Engine.evaluate = lambda self, *args: (die("evaluate"), evaluate(self, *args))[1]  # type: ignore[method-assign,func-returns-value]
    patch = pytest.MonkeyPatch()  # never undone: the process is the test's own
    patch.setattr("training.checkpoints.write_file", lambda *args: (die("write"), write_file(*args))[1])  # type: ignore[func-returns-value]
    train_in_world(world, run_dir, options)


def some_kill(rng: random.Random) -> dict[str, int]:
    return rng.choice(
        [{"step": rng.randint(1, 9)}, {"step": rng.randint(1, 9)}, {"write": rng.randint(1, 30)}, {"evaluate": 1}]
    )


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize(("size", "schedules"), [(1, 5), (2, 2), (3, 1)])
def test_killed_and_resumed_ends_as_if_never_killed(
    tmp_path: Path, options: Options, size: int, schedules: int
) -> None:
    options |= {"batch_size": -(-8 // size), "global_batch": 8}
    spawn(train_in_world, size, tmp_path / "whole", options)
    rng = random.Random(int(os.environ.get("KILL_SEED", "1")))
    for schedule in range(int(os.environ.get("KILL_SCHEDULES", schedules))):
        run = tmp_path / f"killed{schedule}"
        for _ in range(3):
            spawn(train_and_die, size, run, options, some_kill(rng))
        spawn(train_in_world, size, run, options)
        assert_same_end(tmp_path / "whole", run)


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, options: Options) -> None:
    """Stopped on 2 ranks, resumed on 1, then on 3: the same steps, so the same losses up to rounding."""
    options |= {"batch_size": 4, "global_batch": 8}
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_in(ONE, whole, **options)
    for size, stop_after in ((2, 3), (1, 5), (3, 0)):
        for result, stopped in spawn(train_and_stop, size, run, options, stop_after):
            assert stopped == bool(stop_after)
            assert ("model" in result) != stopped
    assert sorted(losses(run)) == list(range(1, 15))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-3)


def train_and_stop(world: World, run_dir: Path, options: Options, after: int) -> tuple[dict[str, Any], bool]:
    """As a rank of which the last one is asked to stop after some steps."""
    torch.set_num_threads(1)
    run_dir.mkdir(parents=True, exist_ok=True)
    with Context(run_dir, world) as ctx:
        step, count = Engine.step, 0

        def counted(self: Engine, *args: Any) -> None:
            nonlocal count
            step(self, *args)
            count += 1
            if count == after and world.rank == world.world_size - 1:
                ctx.request_stop("test")

        Engine.step = counted  # type: ignore[method-assign,assignment]
        try:
            return train(ctx, TrainConfig(**options)), ctx.stopped
        finally:
            Engine.step = step  # type: ignore[method-assign]


def test_a_stop_saves_and_the_run_ends_as_if_never_stopped(tmp_path: Path, options: Options) -> None:
    options["save_every"] = 1000
    train_in(ONE, tmp_path / "whole", **options)
    result, stopped = train_and_stop(ONE, tmp_path / "run", options, 4)
    assert stopped
    assert result["steps"] == 4
    assert not (tmp_path / "run" / "model").exists()
    assert not train_in(ONE, tmp_path / "run", **options)[1]
    assert_same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.slow
def test_lower_precision_learns_the_same(tmp_path: Path, options: Options, precision: str) -> None:
    train_in(ONE, tmp_path / "full", **options)
    train_in(ONE, tmp_path / precision, **options, precision=precision, max_grad_norm=1.0)
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "full"), abs=0.05)
    weights = load_file(tmp_path / precision / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_length_buckets_keep_the_samples_and_may_not_change_within_a_run(tmp_path: Path, options: Options) -> None:
    train_in(ONE, tmp_path / "run", **options, length_buckets=True, max_steps=3)
    with pytest.raises(ConfigError, match="--length-buckets cannot be changed"):
        train_in(ONE, tmp_path / "run", **options)
    assert train_in(ONE, tmp_path / "run", **options, length_buckets=True)[0]["steps"] == 14


def test_tensorboard_gets_the_numbers(tmp_path: Path, options: Options) -> None:
    train_in(ONE, tmp_path / "run", **{**options, "log_with": ("tensorboard",)})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx(losses(tmp_path / "run"))
    assert len(events.Scalars("eval/accuracy")) == 2


def _tells(world: World, run_dir: Path, options: Options) -> list[tuple[int, bool, bool]]:
    run_dir.mkdir(exist_ok=True)
    told: list[tuple[int, bool, bool]] = []
    with Context(run_dir, world) as ctx:
        ctx.on_checkpoint.append(lambda step, evaluation, path: told.append((step, bool(evaluation), path is not None)))
        train(ctx, TrainConfig(**options))
    return told


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_every_checkpoint_is_told_once_it_is_committed(tmp_path: Path, options: Options) -> None:
    """On all ranks at the same steps; rank 0 knows the folder, and from the first epoch on there is an evaluation."""
    first, second = spawn(_tells, 2, tmp_path / "run", {**options, "batch_size": 4})
    assert first == [(step, step >= 7, True) for step in (2, 4, 6, 7, 8, 10, 12, 14)]
    assert second == [(step, evaluated, False) for step, evaluated, _ in first]


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0 must be more than 0"),
        ({"keep": 0}, "--keep 0 must be 1 or more"),
        ({"seed": -1}, "--seed -1 must be 0 or more"),
        ({"model": "./nowhere"}, "no such folder"),
        ({"dataset": "./nowhere"}, "no such folder"),
        ({"num_labels": 1, "lr": -1.0}, "--lr"),
        ({"log_with": ("tensorbord",)}, "did you mean tensorboard"),
        ({"log_with": ("wandb",)}, "pip install wandb"),
        ({"metric": "no such:thing"}, "written package.module:function"),
        ({"metric": "./none.py"}, "no such file"),
    ],
)
def test_bad_requests(change: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(TrainConfig(**change))
    assert module.train.check is check  # type: ignore[attr-defined]


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


def _bad_data(world: World, run_dir: Path, options: Options) -> str:
    try:
        train_in(world, run_dir, **options)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_every_rank_hears_of_unusable_data(tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found only while loading, past the rows that are checked before a run is sent."""
    file = Path(options["dataset"]) / "train.csv"
    rows = [f"a b,b a,{1 if row < 20_100 else 5},{row}" for row in range(20_101)]
    file.write_text("sentence1,sentence2,label,idx\n" + "\n".join(rows) + "\n")
    for message in spawn(_bad_data, 2, tmp_path / "run", options):
        assert "row 20101: label 5 is outside the model's range 0..1" in message
