"""ctx.evaluate: every sample once, the same result for every number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.loop.jobs import Net, Normed, Rows
from tests.training.ranks import spawn
from training.context import Context
from training.data.metrics import accuracy
from training.distributed.world import World
from training.errors import ConfigError

ONE = World(threads=1)


def collected(world: World, run_dir: Path, size: int, batch_size: int) -> Any:
    torch.set_num_threads(1)
    with Context(run_dir, world) as ctx:
        torch.manual_seed(0)
        model = ctx.setup(Net(0.5))
        seen: list[int] = []

        def predict(batch: Any) -> torch.Tensor:
            assert not model.training
            assert not torch.is_grad_enabled()
            seen.extend(batch["id"].tolist())
            return torch.stack([batch["id"].float(), model(batch["x"])], dim=1)

        def metric(predictions: Any) -> dict[str, Any]:
            return {"ids": predictions[:, 0], "sum": predictions[:, 1].sum(), "shape": predictions.shape}

        data = [{"id": number, "x": x} for number, x in enumerate(Rows(64).x[:size])]
        model.train()
        found = ctx.evaluate(predict, data, metric, batch_size=batch_size)
        assert model.training
        assert torch.is_grad_enabled()
        return found, sorted(seen)


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize(("size", "batch_size"), [(23, 4), (2, 1), (1, 8), (8, 8)])
def test_every_sample_counts_once_on_any_number_of_ranks(tmp_path: Path, size: int, batch_size: int) -> None:
    (expected, seen), *_ = [collected(ONE, tmp_path, size, batch_size)]
    assert expected["ids"] == list(range(size)) == seen
    assert (expected["samples"], expected["shape"]) == (size, (size, 2))
    for ranks in (2, 3):
        results = spawn(collected, ranks, tmp_path, size, batch_size)
        assert [found for found, _ in results] == [expected] * ranks, "to the bit"
        assert sorted(sample for _, seen in results for sample in seen) == list(range(size))


@pytest.mark.parametrize(
    "predict",
    [
        lambda batch: batch * 2,
        lambda batch: (batch * 2).numpy(),
        lambda batch: (batch * 2).tolist(),
        lambda batch: [each * 2 for each in batch],
        lambda batch: (batch * 2).to(torch.bfloat16),
        lambda batch: (batch * 2).tolist() if len(batch) > 1 else batch.item() * 2,
    ],
    ids=["tensor", "array", "list", "list of tensors", "bf16", "number"],
)
def test_what_predict_may_return(tmp_path: Path, predict: Any) -> None:
    with Context(tmp_path, ONE) as ctx:
        assert ctx.evaluate(predict, list(range(7)), lambda p: p.tolist(), batch_size=3) == {
            "<lambda>": [0, 2, 4, 6, 8, 10, 12],
            "samples": 7,
        }


def test_a_tuple_gives_the_metric_an_array_each(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        found = ctx.evaluate(lambda batch: (batch % 2, batch % 4), list(range(8)), accuracy, batch_size=3)
        assert found == {"accuracy": 0.5, "samples": 8}


def test_rows_of_different_lengths_and_texts(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:

        def predict(batch: Any) -> tuple[list[Any], list[str], torch.Tensor]:
            rows = [[1] * int(each) for each in batch]
            return rows, [str(int(each)) for each in batch], torch.ones(len(batch), int(batch.max()) + 1)

        def metric(rows: Any, texts: Any, padded: Any) -> dict[str, Any]:
            lengths = [len(row) for row in rows], list(texts), [len(row) for row in padded]
            return dict(zip("abc", lengths, strict=True))

        assert ctx.evaluate(predict, [1, 2, 2, 0], metric, batch_size=2) == {
            "a": [1, 2, 2, 0], "b": ["1", "2", "2", "0"], "c": [3, 3, 3, 3], "samples": 4,
        }  # fmt: skip
        assert ctx.evaluate(predict, [1, 2, 4, 0], metric, batch_size=2)["c"] == [3, 3, 5, 5]


def test_numbers_of_the_metric_are_numbers_of_python(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        found = ctx.evaluate(lambda b: b, [1.0, 3.0], lambda p: {"m": np.float32(p.mean()), "t": torch.tensor(2)})
        assert found == {"m": 2.0, "t": 2, "samples": 2}
        assert [type(value) for value in found.values()] == [float, int, int]


@pytest.mark.parametrize("predict", [lambda batch: batch[:1], lambda batch: 5, lambda batch: batch.mean()])
def test_another_number_of_rows_is_refused(tmp_path: Path, predict: Any) -> None:
    with (
        Context(tmp_path, ONE) as ctx,
        pytest.raises(ConfigError, match=r"predict was given 2 samples and returned \w+ of shape"),
    ):
        ctx.evaluate(predict, [1.0, 2.0], len)


def bad_metric(world: World, run_dir: Path) -> str:
    with Context(run_dir, world) as ctx:
        try:
            ctx.evaluate(lambda batch: batch, [1.0, 2.0], lambda predictions: 1 / 0)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_a_metric_that_fails_fails_on_every_rank(tmp_path: Path) -> None:
    assert spawn(bad_metric, 2, tmp_path) == [
        "ZeroDivisionError: division by zero",
        "RuntimeError: the metric failed on rank 0: ZeroDivisionError: division by zero",
    ]


def normed(world: World, run_dir: Path, stop_at: int) -> Any:
    torch.set_num_threads(1)
    with Context(run_dir, world) as ctx:
        ctx.seed(0)
        data = Rows(28)
        model = ctx.setup(Normed())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = ctx.steps(data, global_batch=8, epochs=2, microbatch=2)
        state = ctx.state(model=model, optimizer=optimizer, steps=steps)
        state.restore()
        found = {}
        for step in steps:
            for x, y in step:
                step.backward((model(x) - y).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            ctx.evaluate(lambda batch: model(batch[0]), data, len, batch_size=28)  # rank 1 has no batch
            found = ctx.evaluate(lambda batch: model(batch[0]), data, lambda p: p, batch_size=10)
            if world.rank == 0:
                bare = getattr(model, "module", model).eval()
                expected = [value for at in range(0, 28, 10) for value in bare(data.x[at : at + 10]).tolist()]
                assert found["<lambda>"] == expected, "with the weights and buffers of rank 0"
                model.train()
            if step.number == stop_at:
                ctx.request_stop("test")
            if ctx.should_stop(step, save=state):
                break
        return found


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_buffers_are_those_of_rank_0(tmp_path: Path) -> None:
    """Ranks evaluate different numbers of batches with a replica that has buffers, and a resumed run ends the same."""
    whole = spawn(normed, 2, tmp_path / "whole", 0)
    assert whole[0] == whole[1]
    spawn(normed, 2, tmp_path / "parts", 3)
    assert spawn(normed, 2, tmp_path / "parts", 0) == whole
