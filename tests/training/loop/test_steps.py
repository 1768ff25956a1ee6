"""ctx.steps: the order and the microbatches of a run, and what it refuses."""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.loop.jobs import Rows
from training.context import Context
from training.data.sampler import order
from training.distributed.world import World
from training.errors import ConfigError
from training.files import read_lines

ONE = World(threads=1)


def test_attributes(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        steps = ctx.steps(list(range(10)), global_batch=4, epochs=2, microbatch=3, seed=5)
        assert (steps.number, steps.total, steps.per_epoch, steps.loss) == (0, 6, 3, None)
        seen: list[int] = []
        for step in steps:
            sizes = []
            for batch in step:
                sizes.append(len(batch))
                seen += batch.tolist()
                step.backward(torch.tensor(float(len(batch)), requires_grad=True))
            assert step.ids == tuple(seen[-step.samples :])
            assert sizes == [[3, 1], [3, 1], [2]][(step.number - 1) % 3]
            assert step.loss == pytest.approx(sum(size * size for size in sizes) / step.samples)
            assert operator.index(step) == step.number
            assert (step.epoch, step.ends_epoch) == ((step.number - 1) // 3, step.number % 3 == 0)
            assert step.is_last == (step.number == 6)
            ctx.log(step, loss=step.loss)
        assert seen == [*order(10, 5, 0), *order(10, 5, 1)]
        assert (steps.number, list(steps)) == (6, [])
        assert steps.loss == 2.0
    (*_, line) = read_lines(tmp_path / "metrics.jsonl")
    assert (line["step"], line["total_steps"], line["epoch"], line["loss"]) == (6, 6, 2.0, 2.0)


def numbers(steps: Any, most: int = 99) -> list[int]:
    found: list[int] = []
    for step in steps:
        for batch in step:
            found += batch.tolist()
        if step.number == most:
            break
    return found


def test_it_goes_on_at_the_sample_and_with_other_epochs(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        data = list(range(10))
        whole = numbers(ctx.steps(data, global_batch=4, epochs=3))
        first = ctx.steps(data, global_batch=4, epochs=3)
        begun = numbers(first, 4)
        second = ctx.steps(data, global_batch=4, epochs=3, microbatch=2)
        second.load_state_dict(first.state_dict())
        assert begun + numbers(second) == whole
        assert begun + numbers(first) == whole, "after a break, the next loop goes on"
        longer = ctx.steps(data, global_batch=4, epochs=4)
        longer.load_state_dict(second.state_dict())
        assert numbers(longer) == order(10, 0, 3).tolist()
        assert numbers(ctx.steps(data, global_batch=4, epochs=3, max_steps=4)) == begun


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"seed": 2}, "seed is 2, but this run began with 0"),
        ({"global_batch": 5}, "global_batch is 5, but this run began with 4"),
        ({"data": range(11)}, "the number of samples is 11, but this run began with 10"),
    ],
    ids=repr,
)
def test_another_order_is_refused(tmp_path: Path, other: dict[str, Any], text: str) -> None:
    with Context(tmp_path, ONE) as ctx:
        ctx.state(steps=ctx.steps(range(10), global_batch=4)).save(0, wait=True)
        with pytest.raises(ConfigError, match=text):
            ctx.state(steps=ctx.steps(**{"data": range(10), "global_batch": 4, **other})).restore()


class Stream(torch.utils.data.IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


@pytest.mark.parametrize(
    "data", [Stream(), iter([1]), {"a": 1}, 5, (x for x in range(3))], ids=lambda d: type(d).__name__
)
def test_a_stream_is_refused_with_what_to_do(tmp_path: Path, data: Any) -> None:
    with Context(tmp_path, ONE) as ctx:
        with pytest.raises(ConfigError, match=r"ctx\.steps needs a dataset with len.*StatefulDataLoader.*ctx\.state"):
            ctx.steps(data, global_batch=2)
        with pytest.raises(ConfigError, match=r"ctx\.evaluate needs a dataset"):
            ctx.evaluate(len, data, len)


@pytest.mark.parametrize(
    "options", [{"global_batch": 0}, {"global_batch": 2, "epochs": 0}, {"global_batch": 2, "microbatch": 0}], ids=repr
)
def test_numbers_below_one_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with Context(tmp_path, ONE) as ctx:
        with pytest.raises(ConfigError, match="must be 1 or more"):
            ctx.steps([1], **options)
        with pytest.raises(ConfigError, match="is empty"):
            ctx.steps([], global_batch=1)


def test_a_step_that_is_not_used_up(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        steps = iter(ctx.steps(range(9), global_batch=4, microbatch=1))
        step = next(steps)
        assert len(next(iter(step))) == 1
        with pytest.raises(ConfigError, match="known after its last batch"):
            _ = step.loss
        with pytest.raises(ConfigError, match="step 1 has ended before its batches"):
            next(steps)


@pytest.mark.parametrize("weights", [(None, 2), (2, None)])
def test_weights_of_some_calls_only(tmp_path: Path, weights: tuple[int | None, int | None]) -> None:
    with Context(tmp_path, ONE) as ctx:
        steps = iter(ctx.steps(range(9), global_batch=4))
        step = next(steps)
        next(iter(step))
        step.backward(torch.ones((), requires_grad=True), weight=weights[0])
        with pytest.raises(ConfigError, match=r"give each call of step\.backward a weight, or none"):
            step.backward(torch.ones((), requires_grad=True), weight=weights[1])


def test_a_save_inside_of_a_step_fails(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        steps = ctx.steps(range(9), global_batch=4)
        state = ctx.state(steps=steps)
        for step in steps:
            for _ in step:
                state.save(wait=True)
        assert [each["step"] for each in ctx.failed_saves] == [0, 1, 2]
        assert "inside of `for batch in step`" in ctx.failed_saves[0]["error"]


class Noisy:
    """A dataset that draws from all global generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, sample: int) -> tuple[int, float]:
        return sample, random.random() + np.random.rand() + torch.rand(()).item()


@pytest.mark.parametrize("workers", [0, 2])
def test_random_samples_depend_on_the_position_and_leave_the_generators_alone(tmp_path: Path, workers: int) -> None:
    def draws(start: dict[str, Any] | None, most: int) -> tuple[list[Any], dict[str, Any]]:
        steps = ctx.steps(Noisy(), global_batch=4, epochs=2, microbatch=3, workers=workers)
        if start:
            steps.load_state_dict(start)
        found = []
        for step in steps:
            for batch in step:
                random.random()
                found.append([part.tolist() for part in batch])
            if step.number == most:
                break
        return found, steps.state_dict()

    with Context(tmp_path, ONE) as ctx:
        ctx.seed(1)
        before = torch.get_rng_state()
        whole, _ = draws(None, 6)
        assert torch.equal(torch.get_rng_state(), before)
        ctx.seed(2)
        first, position = draws(None, 4)
        second, _ = draws(position, 6)
        assert first + second == whole
        values = [value for _, batch in whole for value in batch]
        assert len(set(values)) == 24
        if workers == 0:
            assert whole == draws(None, 6)[0]


def test_samples_in_bulk(tmp_path: Path) -> None:
    class Bulk:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, sample: int) -> int:
            raise AssertionError

        def __getitems__(self, samples: list[int]) -> list[int]:
            return [sample * 10 for sample in samples]

    with Context(tmp_path, ONE) as ctx:
        assert sorted(numbers(ctx.steps(Bulk(), global_batch=2))) == [0, 10, 20, 30, 40]
        assert ctx.evaluate(lambda batch: batch, Bulk(), lambda p: float(p.sum())) == {"<lambda>": 100.0, "samples": 5}


@dataclass
class Pair:
    left: torch.Tensor

    def to(self, device: torch.device) -> Pair:
        return Pair(self.left.to(device))


def test_a_collate_of_ones_own(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        steps = ctx.steps(Rows(4), lambda rows: {"x": [Pair(x) for x, _ in rows], "n": len(rows)}, global_batch=4)
        for step in steps:
            for batch in step:
                assert batch["n"] == 4
                assert torch.equal(batch["x"][0].left, Rows(4).x[step.ids[0]])
