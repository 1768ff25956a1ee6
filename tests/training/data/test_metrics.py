from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.ranks import spawn
from training.context import Context
from training.data.metrics import (
    accuracy,
    accuracy_and_f1,
    evaluation_batches,
    metric_for,
    pearson_and_spearman,
)
from training.distributed.world import World
from training.loop.evaluation import measure

pytestmark = pytest.mark.usefixtures("rank_server")


def predict(sample: int) -> int:
    return (sample * 2654435761 >> 7) % 2


def reference(sample: int) -> int:
    return (sample * 40503 >> 3) % 3 > 0


def lengths(size: int) -> list[int]:
    return [(sample * 13) % 50 for sample in range(size)]


def shares(size: int, batch_size: int, world_size: int) -> list[list[int]]:
    batches = evaluation_batches(lengths(size), batch_size)
    return [[sample for batch in batches[rank::world_size] for sample in batch] for rank in range(world_size)]


def brought(ids: list[int]) -> tuple[list[int], list[Any]]:
    """What a rank sends: the ids, and the arrays of its batches."""
    arrays = [np.array([predict(sample) for sample in ids]), np.array([reference(sample) for sample in ids])]
    return ids, [arrays] if ids else []


@pytest.mark.parametrize("batch_size", [1, 7, 8, 32])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_any_number_of_ranks_gives_the_number_of_one(tmp_path: Path, world_size: int, batch_size: int) -> None:
    with Context(tmp_path, World()) as ctx:
        of_any_number_of_ranks(ctx, world_size, batch_size)


def of_any_number_of_ranks(ctx: Context, world_size: int, batch_size: int) -> None:
    for size in range(1, 409):
        whole = np.arange(size)
        alone = accuracy_and_f1(
            np.array([predict(int(i)) for i in whole], dtype=float), np.array([reference(int(i)) for i in whole], float)
        )
        ranks = [brought(ids) for ids in shares(size, batch_size, world_size)]
        assert measure(accuracy_and_f1, size, ranks, ctx) == {**alone, "samples": size}


def _evaluate(world: World, run_dir: Path, sizes: list[int]) -> list[dict[str, float]]:
    def answers(batch: Any) -> tuple[list[int], list[int]]:
        return [predict(sample) for sample in batch.tolist()], [reference(sample) for sample in batch.tolist()]

    with Context(run_dir, world) as ctx:
        return [
            ctx.evaluate(answers, range(size), accuracy_and_f1, batch_size=8, lengths=lengths(size)) for size in sizes
        ]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.slow
def test_real_ranks_give_the_number_of_one(tmp_path: Path, world_size: int) -> None:
    sizes = [1, 2, 7, 8, 9, 24, 25, 407, 408]
    alone = _evaluate(World(), tmp_path, sizes)
    for result in spawn(_evaluate, world_size, tmp_path, sizes):
        assert result == alone


@pytest.mark.parametrize(
    ("ids", "message"),
    [([0, 1], "1 are missing"), ([0, 1, 1], "1 are missing, 1 came more than once"), ([0, 1, 2, 3], "1 do not exist")],
)
def test_a_wrong_set_of_samples_is_an_error(tmp_path: Path, ids: list[int], message: str) -> None:
    with Context(tmp_path, World()) as ctx, pytest.raises(RuntimeError, match=message):
        measure(accuracy, 3, [brought(ids)], ctx)


vectors = st.integers(1, 60).flatmap(
    lambda size: st.tuples(*[st.lists(st.integers(0, 1), min_size=size, max_size=size)] * 2)
)


@given(vectors)
@settings(deadline=None, max_examples=200)
@pytest.mark.slow
def test_accuracy_and_f1_are_those_of_sklearn(pair: tuple[list[int], list[int]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    predictions, references = (np.array(values, dtype=float) for values in pair)
    ours = accuracy_and_f1(predictions, references)
    assert ours["accuracy"] == accuracy_score(references, predictions)
    assert ours["f1"] == f1_score(references, predictions, zero_division=0)


def test_the_correlations_are_those_of_scipy() -> None:
    from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]

    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 9, 100).astype(float), rng.normal(size=100)
    ours = pearson_and_spearman(left, right)
    assert ours["pearson"] == pytest.approx(pearsonr(left, right)[0], abs=1e-12)
    assert ours["spearmanr"] == pytest.approx(spearmanr(left, right)[0], abs=1e-12)
    assert pearson_and_spearman(np.ones(3), right[:3])["pearson"] == 0.0


@pytest.mark.parametrize(("labels", "metric"), [(1, pearson_and_spearman), (2, accuracy_and_f1), (7, accuracy)])
def test_the_task_decides_the_metric(labels: int, metric: Callable[..., Any]) -> None:
    assert metric_for(labels) is metric
