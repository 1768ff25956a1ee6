"""A user's function on real ranks: exact gradients, and runs that are stopped or killed and go on."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.loop.jobs import Config, evaluations, fit_and_die, fit_in_world, ids_of_epochs, reference
from tests.training.ranks import assert_same_checkpoint, final, losses, spawn

pytestmark = [pytest.mark.usefixtures("rank_server"), pytest.mark.slow]


def assert_same_end(left: Path, right: Path) -> None:
    """Bit-identical weights, optimizer, generators, position, per-step losses and evaluations."""
    assert_same_checkpoint(left, right)
    assert evaluations(left) == evaluations(right)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_stopped_and_resumed_ends_as_if_never_stopped(tmp_path: Path, size: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = spawn(fit_in_world, size, whole, Config())
    assert first == [{"loss": losses(whole)[14], "stopped": False, "failed": []}] * size
    stopped = spawn(fit_in_world, size, parts, Config(stop_at=4))
    assert all(each["stopped"] for each in stopped)
    assert max(losses(parts)) in (4, 5)
    assert spawn(fit_in_world, size, parts, Config()) == first
    assert_same_end(whole, parts)


@pytest.mark.parametrize("microbatch", [None, 1, 3])
@pytest.mark.parametrize("samples", [53, 49, 64])  # the last batch has 5 samples, 1 sample, or is full
def test_gradients_are_the_mean_over_the_global_batch(tmp_path: Path, samples: int, microbatch: int | None) -> None:
    """Also if ranks have fewer samples than others, or none: losses and weights are those of one process."""
    config = Config(size=samples, microbatch=microbatch, dropout=0.0)
    expected, weights = reference(config)
    for size in (1, 2, 3, 4):
        run = tmp_path / str(size)
        spawn(fit_in_world, size, run, config)
        found = losses(run)
        assert found.keys() == expected.keys()
        assert torch.allclose(torch.tensor([*found.values()]), torch.tensor([*expected.values()]), rtol=1e-4, atol=1e-6)
        for name, tensor in final(run)["model.safetensors"].items():
            assert torch.allclose(tensor, weights[name], rtol=1e-3, atol=1e-5), (size, name)
        for ids in ids_of_epochs(run).values():
            assert sorted(ids) == list(range(samples))


@pytest.mark.parametrize("microbatch", [None, 3])
def test_sharded(tmp_path: Path, microbatch: int | None) -> None:
    """As with replicas; and a sharded run goes on with another number of ranks, and not sharded."""
    config = Config(size=49, microbatch=microbatch, dropout=0.0, shard=True)
    expected, weights = reference(config)
    for sizes in ((2,), (3,), (2, 3, 1), (1, 2)):
        run = tmp_path / str(sizes)
        for size in sizes:
            last = size == sizes[-1]
            spawn(fit_in_world, size, run, replace(config, stop_at=0 if last else 4))
        found = losses(run)
        assert found.keys() == expected.keys()
        assert torch.allclose(torch.tensor([*found.values()]), torch.tensor([*expected.values()]), rtol=1e-4, atol=1e-6)
        for name, tensor in final(run)["model.safetensors"].items():
            assert torch.allclose(tensor, weights[name], rtol=1e-3, atol=1e-5), (size, name)


def test_sharded_stopped_and_resumed_ends_as_if_never_stopped(tmp_path: Path) -> None:
    config = Config(shard=True, microbatch=3)
    first = spawn(fit_in_world, 2, tmp_path / "whole", config)
    spawn(fit_in_world, 2, tmp_path / "parts", replace(config, stop_at=4))
    assert spawn(fit_in_world, 2, tmp_path / "parts", config) == first
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert evaluations(tmp_path / "whole") == evaluations(tmp_path / "parts")


@pytest.mark.parametrize(("size", "microbatch"), [(1, 3), (2, 3), (3, None)])
def test_killed_and_resumed_ends_as_if_never_killed(tmp_path: Path, size: int, microbatch: int | None) -> None:
    """SIGKILL at random points, also while a checkpoint is written."""
    config = Config(microbatch=microbatch)
    spawn(fit_in_world, size, tmp_path / "whole", config)
    rng = random.Random(int(os.environ.get("KILL_SEED", "1")) + size)
    kinds = {"backward": 14, "update": 5, "evaluation": 2, "write": 9, "manifest": 3, "rename": 3}
    for schedule in range(int(os.environ.get("KILL_SCHEDULES", "2"))):
        run = tmp_path / f"killed{schedule}"
        for _ in range(4):
            kind = rng.choice(list(kinds))
            victim = 0 if kind in ("write", "manifest", "rename") else rng.randrange(size)
            spawn(fit_and_die, size, run, config, victim, (kind, rng.randint(1, kinds[kind])))
        spawn(fit_in_world, size, run, config)
        assert_same_end(tmp_path / "whole", run)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_each_sample_counts_once_though_ranks_are_killed_and_their_number_changes(
    tmp_path: Path, microbatch: int | None
) -> None:
    run, config = tmp_path / "run", Config(dropout=0.0, microbatch=microbatch, epochs=3)
    expected, weights = reference(config)
    rng = random.Random(int(os.environ.get("KILL_SEED", "1")))
    for size in (2, 4, 1, 3):
        spawn(fit_and_die, size, run, config, rng.randrange(size), ("update", rng.randint(4, 6)))
    spawn(fit_in_world, 2, run, config)
    epochs = ids_of_epochs(run)
    assert epochs.keys() == {0, 1, 2}
    assert all(sorted(ids) == list(range(53)) for ids in epochs.values())
    found = losses(run)
    assert torch.allclose(torch.tensor([*found.values()]), torch.tensor([*expected.values()]), rtol=1e-4, atol=1e-6)
    for name, tensor in final(run)["model.safetensors"].items():
        assert torch.allclose(tensor, weights[name], rtol=1e-3, atol=1e-5), name
