"""Whether evaluations over several ranks count right: ``python -m benchmarks.metrics_exact [REPEATS]``.

Real processes over gloo, one start per number of ranks. The "model" is arithmetic on the sample id, so what is timed is
the way results come together. A cell (ranks, batch size, samples) is wrong where a rank gets another number than one
process computes from all samples (accuracy and F1, compared to the bit), or where the samples are not counted once each,
or where it fails: a rank raises, or waits for the others for longer than PATIENCE. New ranks then go on with the next cell.

- ours: `ctx.evaluate`, as the reference job calls it.
- gather_for_metrics: on a DataLoader that accelerate has prepared; of a list, and of an iterable data set, which has no
  length: dispatched by rank 0 (accelerate's default) or read by every rank (`dispatch_batches=False`).
- evaluate(num_process=N): GLUE's definition as the module for `evaluate` that ships with `training`; every rank brings
  exactly its samples in one call of `compute`. It answers on rank 0 only.

Building loaders and loading the metric is not timed. Files are those that any rank opens for writing, by path.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.paired import rounds
from launcher.agent.network.addresses import reserve_port
from training.bert.metric_lookup import GLUE
from training.context import Context
from training.data.metrics import accuracy_and_f1
from training.distributed.group import Group, TorchGroup
from training.distributed.world import World
from training.reporting.trackers import make_accelerator

if TYPE_CHECKING:
    from torch.utils.data import Dataset

WORLDS = (1, 2, 3)
BATCHES = (1, 7, 8, 32)
SIZES = (1, 3, 8, 31, 32, 33, 100)
PATIENCE = timedelta(seconds=5)
COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "gather", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor",
    "scatter",
)  # fmt: skip

Values = dict[str, float]
Answer = tuple[Values, int] | None  # the metric and the number of samples in it; None where this rank is told nothing
Evaluation = Callable[[], Answer]


def label(sample: int) -> int:
    return int((sample * 7 + sample // 3) % 3 > 0)


def predict(sample: int) -> int:
    return label(sample) if sample % 4 else 1 - label(sample)


def truth(size: int) -> Values:
    """What one process computes from all samples."""
    samples = range(size)
    return accuracy_and_f1(
        np.array([predict(sample) for sample in samples], float), np.array([label(sample) for sample in samples], float)
    )


@dataclass
class Measured:
    """One evaluation on one rank."""

    answer: Answer = None
    error: str = ""
    seconds: float = 0.0
    collectives: int = 0
    files: set[str] = field(default_factory=set)


class Watch:
    """Counts the collectives and the files of this process while it is on."""

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed import distributed_c10d as c10d

        self.measured: Measured | None = None
        # Functions for objects are made of these, so they count for what they are made of.
        self._inside = False
        for name in filter(c10d.__dict__.get, COLLECTIVES):  # torch's versions differ in what they have
            counting = self._counting(getattr(c10d, name))
            setattr(c10d, name, counting)
            setattr(dist, name, counting)
        sys.addaudithook(self._opened)

    def run(self, evaluation: Evaluation) -> Measured:
        """The evaluation, measured; what it raises is kept."""
        measured = self.measured = Measured()
        started = time.perf_counter()
        try:
            measured.answer = evaluation()
        except Exception:
            measured.error = traceback.format_exc(limit=-1)
        measured.seconds = time.perf_counter() - started
        self.measured = None
        return measured

    def _counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.measured is None or self._inside:
                return function(*args, **kwargs)
            self.measured.collectives += 1
            self._inside = True  # some are made of others
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False

        return call

    def _opened(self, event: str, args: tuple[Any, ...]) -> None:
        if self.measured is None or event != "open" or not isinstance(args[0], str | os.PathLike):
            return
        path = os.fspath(args[0])
        if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not str(path).startswith(("/dev/", "/proc/")):
            self.measured.files.add(str(path))


class Rank:
    """One rank and what it needs for each of the ways."""

    def __init__(self, world: World, folder: Path) -> None:
        self.rank, self.ranks, self.folder = world.rank, world.world_size, folder
        self.ctx = Context(folder, world)
        self.group = TorchGroup(world, PATIENCE) if world.world_size > 1 else Group()
        self.ctx.group = self.group
        self.accelerator: Any = make_accelerator(self.ctx)
        self._module: Any = None

    def ours(self, size: int, batch_size: int) -> Evaluation:
        lengths = [1 + sample * 37 % 61 for sample in range(size)]

        def answers(batch: Any) -> tuple[list[int], list[int]]:
            return [predict(sample) for sample in batch.tolist()], [label(sample) for sample in batch.tolist()]

        def evaluation() -> Answer:
            values = self.ctx.evaluate(answers, range(size), accuracy_and_f1, batch_size=batch_size, lengths=lengths)
            return values, int(values.pop("samples"))

        return evaluation

    def gathered(self, data: Dataset[int], batch_size: int, dispatch: bool | None) -> Evaluation:
        import torch
        from torch.utils.data import DataLoader

        self.accelerator.dataloader_config.dispatch_batches = dispatch
        loader = self.accelerator.prepare_data_loader(DataLoader(data, batch_size))

        def evaluation() -> Answer:
            predictions: list[int] = []
            references: list[int] = []
            for batch in loader:
                samples = batch.tolist()
                answers = torch.tensor([predict(sample) for sample in samples])
                right = torch.tensor([label(sample) for sample in samples])
                answers, right = self.accelerator.gather_for_metrics((answers, right))
                predictions += answers.tolist()
                references += right.tolist()
            return accuracy_and_f1(np.array(predictions, float), np.array(references, float)), len(predictions)

        return evaluation

    def with_length(self, size: int, batch_size: int) -> Evaluation:
        listed: Any = list(range(size))
        return self.gathered(listed, batch_size, None)

    def dispatched(self, size: int, batch_size: int) -> Evaluation:
        return self.gathered(stream(size), batch_size, None)

    def read_by_all(self, size: int, batch_size: int) -> Evaluation:
        return self.gathered(stream(size), batch_size, False)

    def evaluated(self, size: int, batch_size: int) -> Evaluation:
        if self._module is None:
            self._module = self.load()
        module, count = self._module, 0
        starts = range(self.rank * batch_size, size, self.ranks * batch_size)
        ids = [sample for start in starts for sample in range(start, min(start + batch_size, size))]

        def evaluation() -> Answer:
            nonlocal count
            predictions, references = [predict(sample) for sample in ids], [label(sample) for sample in ids]
            counted = module._compute

            def counting(predictions: Sequence[int], references: Sequence[int]) -> Values:
                nonlocal count
                count = len(predictions)
                values: Values = counted(predictions=predictions, references=references)
                return values

            module._compute = counting
            try:
                values = module.compute(predictions=predictions, references=references)
            finally:
                module._compute = counted
            return None if self.rank else (values, count)

        return evaluation

    def load(self) -> Any:
        """GLUE's definition by evaluate, one rank after the other, as they copy it to the same place."""
        import evaluate

        module = None
        for turn in range(self.ranks):
            if turn == self.rank:
                module = evaluate.load(
                    str(GLUE), "mrpc", num_process=self.ranks, process_id=self.rank,
                    cache_dir=str(self.folder), timeout=5,
                )  # fmt: skip
            self.group.barrier()
        return module


def stream(size: int) -> Dataset[int]:
    """A data set without a length."""
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(size))

    return Stream()


WAYS: dict[str, Callable[[Rank, int, int], Evaluation]] = {
    "ours": Rank.ours,
    "gather_for_metrics, with a length": Rank.with_length,
    "gather_for_metrics, iterable, dispatched": Rank.dispatched,
    "gather_for_metrics, iterable, every rank reads": Rank.read_by_all,
    "evaluate(num_process=N)": Rank.evaluated,
}
WARM_UP = (8, 24)
Task = tuple[str, int, int]  # way, batch size, samples
Found = dict[Task, list[list[Measured]]]  # -> for each repeat, what each rank has measured


def enter(pipe: Connection, world: World, folder: Path) -> None:
    """One rank: does the tasks that come through the pipe, until None, and sends what it has measured."""
    import torch

    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    try:
        rank = Rank(world, folder)
        watch = Watch()
        while (task := pipe.recv()) is not None:
            way, batch_size, size = task
            evaluation = WAYS[way](rank, size, batch_size)
            rank.group.barrier()
            pipe.send(watch.run(evaluation))
        rank.ctx.close()
    except Exception:
        pipe.send(Measured(error=traceback.format_exc()))


class Ranks:
    """Rank processes that wait for tasks."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "accelerate", "datasets", "evaluate", "sklearn.metrics"])
        self._folder = tempfile.TemporaryDirectory()
        self._holder = reserve_port("127.0.0.1")
        self._ranks = []
        port = self._holder.getsockname()[1] if size > 1 else 0
        for rank in range(size):
            world = World(rank, rank, 0, size, size, 1, "127.0.0.1", port, "cpu", 1)
            here, there = context.Pipe()
            process = context.Process(target=enter, args=(there, world, Path(self._folder.name)))
            process.start()
            there.close()
            self._ranks.append((process, here))
        for way in WAYS:
            for measured in self.do((way, *WARM_UP)):
                if measured.error:
                    self.close()
                    raise RuntimeError(f"{way}, {size} ranks, warming up:\n{measured.error}")

    def do(self, task: Task) -> list[Measured]:
        """What each rank has measured."""
        for _, pipe in self._ranks:
            pipe.send(task)
        return [pipe.recv() for _, pipe in self._ranks]

    def close(self, *, kill: bool = False) -> None:
        for process, pipe in self._ranks:
            if kill:
                process.kill()
            else:
                pipe.send(None)
        for process, pipe in self._ranks:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
        self._ranks = []
        self._holder.close()
        self._folder.cleanup()


def measure(size: int, repeats: int) -> Found:
    """All cells of `size` ranks, the ways in turn; one that fails is not repeated."""
    found: Found = {}
    failed: set[Task] = set()
    ranks = Ranks(size)
    try:
        for batch_size in BATCHES:
            for samples in SIZES:
                for _ in range(repeats):
                    for way in WAYS:
                        task = (way, batch_size, samples)
                        if task in failed:
                            continue
                        measured = ranks.do(task)
                        found.setdefault(task, []).append(measured)
                        if any(part.error for part in measured):
                            failed.add(task)
                            ranks.close(kill=True)
                            ranks = Ranks(size)
        ranks.close()
    finally:
        ranks.close(kill=True)
    return found


def main() -> None:
    repeats = rounds(3)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"HF_HOME": name, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        found = {size: measure(size, repeats) for size in WORLDS}
    report(found, repeats, time.perf_counter() - began)


def report(found: dict[int, Found], repeats: int, seconds: float) -> None:
    cells = len(WORLDS) * len(BATCHES) * len(SIZES)
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "accelerate", "evaluate", "datasets"))
    print(
        f"\nEvaluations of {cells} cells: ranks {WORLDS} x batch {BATCHES} x samples {SIZES}\n"
        f"{repeats} repeats, interleaved, {seconds:.0f} s in all; {versions}; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}\n"
    )
    print(
        f"{'':<48} {'wrong':>5} {'metric':>7} {'count':>6} {'failed':>6} {'collectives':>12} {'files':>6}   "
        + " ".join(f"{f'ms, {size} ranks':>11}" for size in WORLDS)
    )
    errors: dict[str, str] = {}
    for way in WAYS:
        wrong, metric, count, failed = set(), set(), set(), set()
        collectives: list[int] = []
        files: list[int] = []
        milliseconds: dict[int, list[float]] = {size: [] for size in WORLDS}
        for size, measured in found.items():
            for (by, batch_size, samples), repeated in measured.items():
                cell = (size, batch_size, samples)
                for parts in repeated if by == way else ():
                    problems = [part.error for part in parts if part.error]
                    if problems:
                        failed.add(cell)
                        errors.setdefault(way, f"{cell}: " + _short(problems))
                        continue
                    answers = [part.answer for part in parts if part.answer is not None]
                    if not answers or any(values != truth(samples) for values, _ in answers):
                        metric.add(cell)
                    if any(number != samples for _, number in answers):
                        count.add(cell)
                    if size > 1:
                        collectives.append(parts[0].collectives)
                    files.append(len(set[str]().union(*(part.files for part in parts))))
                    milliseconds[size].append(parts[0].seconds * 1000)
        wrong = metric | count | failed
        times = " ".join(f"{statistics.median(milliseconds[size]):>11.2f}" for size in WORLDS)
        print(
            f"{way:<48} {len(wrong):>5} {len(metric):>7} {len(count):>6} {len(failed):>6} {_range(collectives):>12} "
            f"{_range(files):>6}   {times}"
        )
    print("\nwrong: cells with another metric, another number of samples, or an error; collectives: with 2 and 3 ranks")
    for way, error in errors.items():
        print(f"first failure of {way}, (ranks, batch, samples) = {error}")


def _short(problems: Sequence[str]) -> str:
    lines = {text.strip().splitlines()[-1] for text in problems}
    return "; ".join(sorted(line if len(line) < 120 else f"{line[:20]} ... {line[-80:]}" for line in lines))


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


if __name__ == "__main__":
    main()
