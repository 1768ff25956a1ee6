"""ctx.setup: precision, compilation, frozen models, and weights that are the same on all ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.loop.jobs import Config, Net, Rows, evaluations, fit_in_world, reference
from tests.training.ranks import losses, spawn
from training.context import Context
from training.data.sampler import order
from training.distributed.world import World
from training.errors import ConfigError
from training.loop.setup import GROWTH_STEPS, LossScale

ONE = World(threads=1)


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("shard", [False, True])
def test_lower_precision_learns_the_same_and_resumes_bit_identically(
    tmp_path: Path, precision: str, shard: bool
) -> None:
    config = Config(precision=precision, microbatch=3, shard=shard)
    expected, _ = reference(config)
    first = spawn(fit_in_world, 2, tmp_path / "whole", config)
    spawn(fit_in_world, 2, tmp_path / "parts", replace(config, stop_at=5))
    assert spawn(fit_in_world, 2, tmp_path / "parts", config) == first
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert evaluations(tmp_path / "whole") == evaluations(tmp_path / "parts")
    found = losses(tmp_path / "whole")
    assert found[1] == pytest.approx(expected[1], rel=0.2)
    assert found[1] != expected[1]


def test_outputs_are_float32_and_names_stay(tmp_path: Path) -> None:
    class Many(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            out = self.one(x)
            return {"out": out, "dtype": out.dtype, "more": [out, 3]}

    with Context(tmp_path, ONE) as ctx:
        model = ctx.setup(Many(), precision="bf16")
        found = model(torch.ones(1, 2))
        assert found["dtype"] == torch.bfloat16
        assert found["out"].dtype == found["more"][0].dtype == torch.float32
        assert list(model.state_dict()) == ["one.weight", "one.bias"]
        with pytest.raises(ConfigError, match="--precision int3 is not supported"):
            ctx.setup(Many(), precision="int3")
        with pytest.raises(ConfigError, match=r"takes a torch\.nn\.Module, and not a list"):
            ctx.setup([])  # type: ignore[type-var]


def test_gradients_that_are_not_finite_change_nothing(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        model = ctx.setup(Net(0.0), precision="fp16")
        optimizer = torch.optim.AdamW(model.parameters())
        ctx._models.scale.value = 64.0
        steps = ctx.steps(Rows(12), global_batch=4)
        skipped = []
        for step in steps:
            before = [parameter.clone() for parameter in model.parameters()]
            for x, y in step:
                loss = (model(x) - y).square().mean()
                step.backward(loss * math.inf if step.number == 2 else loss)
            optimizer.step()
            optimizer.zero_grad()
            same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            skipped.append((step.skipped, same))
        assert skipped == [(False, False), (True, True), (False, False)]
        assert steps.state_dict()["loss_scale"] == [32.0, 1]


def test_the_scale_of_losses() -> None:
    scale = LossScale(8.0)
    for _ in range(GROWTH_STEPS):
        assert scale.value == 8.0
        scale.update(True)
    assert scale == LossScale(16.0, 0)
    scale.update(True)
    scale.update(False)
    assert scale == LossScale(8.0, 0)


def weights_of(world: World, run_dir: Path) -> Any:
    torch.set_num_threads(1)
    with Context(run_dir, world) as ctx:
        torch.manual_seed(world.rank)
        trained, frozen = ctx.setup(Net()), Net()
        frozen.requires_grad_(False)
        ctx.setup(frozen)
        sharded = ctx.setup(Net(), shard=True)
        whole = [
            value.full_tensor() if hasattr(value, "full_tensor") else value for value in sharded.state_dict().values()
        ]
        tensors = [*trained.state_dict().values(), *frozen.state_dict().values(), *whole]
        assert all(parameter.grad is None for parameter in trained.parameters())
        return [tensor.tolist() for tensor in tensors]


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_all_ranks_begin_with_the_weights_of_rank_0(tmp_path: Path) -> None:
    one, two, three = spawn(weights_of, 3, tmp_path)
    assert one == two == three


def by_tokens(world: World, run_dir: Path, microbatch: int, precision: str, shard: bool) -> list[Any]:
    """Texts of different lengths, with a loss that is the mean over tokens."""
    torch.set_num_threads(1)
    with Context(run_dir, world) as ctx:
        torch.manual_seed(0)
        model = ctx.setup(Net(0.0), precision=precision, shard=shard)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        data = [
            (x.expand(1 + number % 4, 6), y) for number, (x, y) in enumerate(zip(Rows(13).x, Rows(13).y, strict=True))
        ]
        found: list[Any] = []
        for step in ctx.steps(data, lambda rows: rows, global_batch=5, microbatch=microbatch):
            for rows in step:
                errors = torch.cat([(model(x) - y).square() for x, y in rows])
                step.backward(errors.mean(), weight=len(errors) if step.number > 1 else torch.tensor(len(errors)))
            optimizer.step()
            optimizer.zero_grad()
            found.append(step.loss)
        whole = [
            value.full_tensor() if hasattr(value, "full_tensor") else value for value in model.state_dict().values()
        ]
        return [*found, *(number for tensor in whole for number in tensor.flatten().tolist())]


def reference_by_tokens() -> list[float]:
    torch.manual_seed(0)
    model, found = Net(0.0), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for at in range(0, 13, 5):
        samples = order(13, 0, 0)[at : at + 5]
        errors = torch.cat([(model(Rows(13).x[i].expand(1 + i % 4, 6)) - Rows(13).y[i]).square() for i in samples])
        errors.mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        found.append(errors.mean().item())
    return [*found, *(number for parameter in model.parameters() for number in parameter.flatten().tolist())]


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize(("size", "microbatch", "shard"), [(1, 2, False), (2, 2, False), (3, 1, False), (2, 1, True)])
def test_a_mean_over_tokens_is_exact(tmp_path: Path, size: int, microbatch: int, shard: bool) -> None:
    expected = reference_by_tokens()
    for found in spawn(by_tokens, size, tmp_path, microbatch, "fp32", shard):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def leaves_out(world: World, run_dir: Path) -> int:
    torch.set_num_threads(1)
    with Context(run_dir, world) as ctx:
        model = ctx.setup(Net())
        steps = ctx.steps(Rows(8), global_batch=4, microbatch=1)
        for step in steps:
            for x, y in step:
                if step.number == 2 and world.rank == 1:
                    continue
                step.backward((model(x) - y).square().mean())
        return steps.number


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_a_rank_that_leaves_a_batch_out_is_refused(tmp_path: Path) -> None:
    assert spawn(leaves_out, 1, tmp_path) == [2]
    with pytest.raises(AssertionError, match=r"step 2: step\.backward was not called for its last microbatch"):
        spawn(leaves_out, 2, tmp_path)


class Half(torch.nn.Module):
    """One of its layers is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(6, 1), torch.nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.used(x)[:, 0]
        return found


def unused(world: World, run_dir: Path, find: bool) -> int:
    with Context(run_dir, world) as ctx:
        model = ctx.setup(Half(), find_unused_parameters=find)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = ctx.steps(Rows(9), global_batch=4, microbatch=1)
        for step in steps:
            for x, y in step:
                step.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return steps.number


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_parameters_without_gradients(tmp_path: Path) -> None:
    assert spawn(unused, 2, tmp_path, True) == [3, 3]
    with pytest.raises(AssertionError, match="find_unused_parameters=True"):
        spawn(unused, 2, tmp_path, False)


def compiled(world: World, run_dir: Path) -> list[str]:
    with Context(run_dir, world) as ctx:
        model = ctx.setup(Net(0.0), compile=True)
        calls: list[int] = []
        torch._dynamo.config.suppress_errors = False
        for step in ctx.steps(Rows(8), global_batch=4, microbatch=1):
            for x, y in step:
                step.backward((model(x) - y).square().mean())
            calls.append(step.number)
        state = ctx.state(model=model)
        state.save(1, wait=True)
        assert calls == [1, 2]
        assert ctx.failed_saves == []
        from torch._dynamo.utils import counters

        assert counters["stats"]["unique_graphs"] >= 1
        return [
            name
            for name in next((run_dir / "checkpoints").glob("*/state.json")).read_text().split('"')
            if "layers" in name
        ]


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize("size", [1, 2])
def test_compiled(tmp_path: Path, size: int) -> None:
    found = spawn(compiled, size, tmp_path)
    assert set(found[0]) == {"layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias"}
