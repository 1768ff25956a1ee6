from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.sampler import Position, order, shuffle, steps, steps_per_epoch
from training.errors import ConfigError


def test_the_order_is_the_same_for_ever() -> None:
    assert shuffle(10, 42, 0).tolist() == [4, 3, 5, 8, 0, 9, 7, 6, 1, 2]
    assert shuffle(1000, 42, 0).tolist() != shuffle(1000, 42, 1).tolist()
    assert shuffle(1000, 42, 0).tolist() != shuffle(1000, 43, 0).tolist()


@given(st.integers(0, 400), st.integers(0, 2**40), st.integers(0, 50), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=100)
def test_an_order_is_a_permutation(size: int, seed: int, epoch: int, batch: int, by_length: bool) -> None:
    lengths = [(sample * 7919) % 60 for sample in range(size)] if by_length else None
    assert sorted(order(size, seed, epoch, global_batch=batch, lengths=lengths).tolist()) == list(range(size))


def test_a_shuffle_looks_random() -> None:
    places = np.mean([shuffle(100, seed, 0).argsort() for seed in range(400)], axis=0)
    assert np.abs(places - 49.5).max() < 6  # each mean has a standard deviation of 1.44


@given(
    st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.booleans(),
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 12)), min_size=1, max_size=6),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_each_sample_once_per_epoch_over_interruptions_and_changes_of_ranks(
    size: int, global_batch: int, batch_size: int, by_length: bool, lives: list[tuple[int, int]]
) -> None:
    """A ledger of sample ids: each attempt runs some steps on some number of ranks; the last one completes the epoch."""
    lengths = [(sample * 31) % 17 for sample in range(size)] if by_length else None
    seen: Counter[int] = Counter()
    batches = []
    at = Position(7)
    for life, (world_size, count) in enumerate([*lives, (1, 10**9)]):
        ranks = [
            steps(size, at, rank=rank, world_size=world_size, batch_size=batch_size, global_batch=global_batch,
                  lengths=lengths)
            for rank in range(world_size)
        ]  # fmt: skip
        for number, together in enumerate(zip(*ranks, strict=True)):
            if number == count and life < len(lives):
                break
            ids = [sample for step in together for microbatch in step.microbatches for sample in microbatch]
            assert len({len(step.microbatches) for step in together}) == 1, "ranks must meet in as many collectives"
            assert all(len(microbatch) <= batch_size for step in together for microbatch in step.microbatches)
            weight = sum(step.weight(part, world_size) for step in together for part in step.microbatches) / world_size
            assert weight == pytest.approx(1)
            seen.update(ids)
            batches.append(frozenset(ids))
            at = together[0].after
        if at.epoch:
            break
    assert at == Position(7, 1)
    assert seen == Counter(range(size))
    alone = steps(size, Position(7), rank=0, world_size=1, batch_size=size, global_batch=global_batch, lengths=lengths)
    assert batches == [frozenset(step.microbatches[0]) for step in alone], "a step is the same on any number of ranks"
    assert len(batches) == steps_per_epoch(size, global_batch)


def test_length_buckets_pad_less() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 2000)

    def padding(by_length: list[int] | None) -> int:
        samples = order(2000, 1, 0, global_batch=16, lengths=by_length).reshape(-1, 16)
        return int((lengths[samples].max(1, keepdims=True) - lengths[samples]).sum())

    assert padding(lengths.tolist()) < padding(None) / 10


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be 1 or more"):
        next(steps(10, Position(0), rank=0, world_size=1, batch_size=0, global_batch=1))
    with pytest.raises(ConfigError, match="the data set has changed"):
        next(steps(10, Position(0, 0, 11), rank=0, world_size=1, batch_size=1, global_batch=1))
