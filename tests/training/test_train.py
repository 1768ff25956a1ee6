from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch._dynamo.backends.debugging import aot_eager

from tests.training.ranks import losses, spawn, train_in, train_in_world
from tests.training.test_files import fill
from training import train as module
from training.bert.config import TrainConfig
from training.bert.model import load_model, load_tokenizer
from training.bert.sources import find_source
from training.bert.tokens import encode
from training.data.sampler import Position, steps
from training.distributed.random_state import seed_all
from training.distributed.world import World
from training.errors import ConfigError
from training.files import read_lines
from training.reporting.trackers import Trackers
from training.train import check

ONE = World(threads=1)
Options = dict[str, Any]


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


def plain_loop(
    options: Options, seed: int, lr: float, *, fused: bool, max_grad_norm: float = 0.0
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The training loop of the recipe, with only the order of samples from this package."""
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
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, model.state_dict()


def test_the_losses_are_those_of_the_plain_loop(tmp_path: Path, options: Options) -> None:
    """On one rank all losses are bit-identical to those of the recipe."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected, weights = plain_loop(options, 3, 1e-3, fused=True)
        unfused, _ = plain_loop(options, 3, 1e-3, fused=False)
        clipped, _ = plain_loop(options, 3, 1e-3, fused=True, max_grad_norm=0.01)
    finally:
        torch.set_num_threads(threads)
    train_in(ONE, tmp_path / "run", **options, seed=3, lr=1e-3)
    assert list(losses(tmp_path / "run").values()) == expected
    assert expected == pytest.approx(unfused, rel=1e-5)  # only because the fused optimizer rounds differently
    assert clipped != expected
    train_in(ONE, tmp_path / "clipped", **options, seed=3, lr=1e-3, max_grad_norm=0.01)
    assert list(losses(tmp_path / "clipped").values()) == clipped
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(weights[name], trained[name]) for name in trained)


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_accumulation_and_ranks_take_the_same_step(tmp_path: Path, options: Options) -> None:
    """Global batch 8 as one batch, as microbatches of 3, and on 3 ranks: equal up to rounding."""
    train_in(ONE, tmp_path / "one", **options)
    expected = losses(tmp_path / "one")
    train_in(ONE, tmp_path / "micro", **{**options, "batch_size": 3, "global_batch": 8})
    assert losses(tmp_path / "micro") == pytest.approx(expected, rel=1e-4)
    results = spawn(train_in_world, 3, tmp_path / "ranks", {**options, "batch_size": 3, "global_batch": 8})
    assert losses(tmp_path / "ranks") == pytest.approx(expected, rel=1e-4)
    assert all(result == results[0] for result in results)


@pytest.mark.slow
def test_compiled_it_learns_the_same(tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled up to the traced graphs; generating C++ would take most of a minute."""
    options |= {"length_buckets": True, "max_steps": 2}
    train_in(ONE, tmp_path / "plain", **options)
    lengths: set[int] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        lengths.update(each.shape[1] for each in inputs if each.dtype == torch.int64 and each.dim() == 2)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    train_in(ONE, tmp_path / "run", **options, compile=True)
    torch._dynamo.reset()
    assert lengths - {1, 128} == {32}, "padded to multiples of 32"
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000000002" / "model.safetensors")
    assert saved.keys() == load_model("tiny", 2).state_dict().keys(), "not the names of the compiled wrapper"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.slow
def test_lower_precision_learns_the_same(tmp_path: Path, options: Options, precision: str) -> None:
    train_in(ONE, tmp_path / "full", **options)
    train_in(ONE, tmp_path / precision, **options, precision=precision, max_grad_norm=1.0)
    assert losses(tmp_path / precision) == pytest.approx(losses(tmp_path / "full"), abs=0.05)
    weights = load_file(tmp_path / precision / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_pretrained_model_is_trained_with_dropout_and_evaluated_without(
    tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries load models in evaluation mode."""
    model = load_model("tiny", 2)
    model.config.hidden_dropout_prob = 0.5
    type(model)(model.config).save_pretrained(tmp_path / "model")
    load_tokenizer("tiny").save_pretrained(tmp_path / "model")
    modes: list[tuple[bool, bool]] = []
    dropout = torch.nn.functional.dropout

    def noted(values: torch.Tensor, p: float, training: bool, inplace: bool = False) -> torch.Tensor:
        modes.append((training, torch.is_grad_enabled()))
        return dropout(values, p, training, inplace)

    monkeypatch.setattr(torch.nn.functional, "dropout", noted)
    train_in(ONE, tmp_path / "run", **options, model=str(tmp_path / "model"), max_steps=8)
    assert {(True, True), (False, False)} == set(modes)
    assert modes[0] == (True, True)


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


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's value, which ends there
def test_trackers_that_cannot_write_do_not_end_training(disk: Path) -> None:
    trackers = Trackers(Accelerator(cpu=True), ("tensorboard",), disk, {})
    trackers.log(1, {"loss": 0.5})
    fill(disk)

    def go_on() -> None:
        for step in range(2, 500):
            trackers.log(step, {"loss": 0.5})
        trackers.close()

    with pytest.warns(UserWarning, match="record nothing more in this attempt: .*No space"):
        go_on()


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


def changing_data(split: str) -> list[dict[str, Any]]:
    """Like a function that shuffles with a seed of its process."""
    return [{"sentence1": f"{os.getpid()}", "sentence2": "b", "label": 1}]


def _bad_data(world: World, run_dir: Path, options: Options) -> str:
    try:
        train_in(world, run_dir, **options)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_every_rank_hears_of_unusable_data(tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found while loading, after the rows that are checked before submission."""
    file = Path(options["dataset"]) / "train.csv"
    rows = [f"a b,b a,{1 if row < 20_100 else 5},{row}" for row in range(20_101)]
    file.write_text("sentence1,sentence2,label,idx\n" + "\n".join(rows) + "\n")
    for message in spawn(_bad_data, 2, tmp_path / "run", options):
        assert "row 20101: label 5 is outside the model's range 0..1" in message
    for message in spawn(_bad_data, 2, tmp_path / "run", {**options, "dataset": f"{__name__}:changing_data"}):
        assert "rank 1 has other data than rank 0" in message
