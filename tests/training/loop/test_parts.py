"""Parts of the loop that the reference job uses: length buckets, prefetching, overlapped saves, mirrors, compared ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.loop.jobs import Net, Normed, Rows
from tests.training.ranks import final, spawn
from training.checkpoints import host_copy
from training.context import Context
from training.data.sampler import order
from training.distributed.world import World
from training.errors import CheckpointError, ConfigError
from training.files import read_lines

ONE = World(threads=1)
LENGTHS = [1 + 7 * sample % 31 for sample in range(40)]


# ---- order -----------------------------------------------------------------------------------------------------------


def test_length_buckets(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        steps = ctx.steps(range(40), global_batch=4, epochs=2, lengths=LENGTHS)
        ids = [step.ids for step in used(steps)]
        expected = [order(40, 0, epoch, global_batch=4, lengths=LENGTHS).tolist() for epoch in (0, 1)]
        assert [sample for each in ids for sample in each] == expected[0] + expected[1]
        spread = max(max(LENGTHS[sample] for sample in each) - min(LENGTHS[sample] for sample in each) for each in ids)
        assert spread <= 4
        with pytest.raises(ConfigError, match="lengths is None, but this run began with"):
            ctx.steps(range(40), global_batch=4).load_state_dict(steps.state_dict())
        with pytest.raises(ConfigError, match=r"ctx\.steps: there are 40 lengths, and 39 samples"):
            ctx.steps(range(39), global_batch=4, lengths=LENGTHS)


def used(steps: Any) -> Iterator[Any]:
    for step in steps:
        for _ in step:
            pass
        yield step


def test_the_global_batch_of_a_checkpoint_is_adopted(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        first = ctx.steps(range(40), global_batch=8, epochs=2)
        next(used(first))
        second = ctx.steps(range(40), global_batch=5, microbatch=5, epochs=2, adopt=True)
        assert (second.global_batch, second.total) == (5, 16)
        second.load_state_dict(first.state_dict())
        assert (second.global_batch, second.per_epoch, second.total, second.number) == (8, 5, 10, 1)
        assert [len(step.ids) for step in used(second)] == [8] * 9
        assert second._microbatch == 5


class InThread:
    """Records the threads in which its samples are read."""

    def __init__(self, fails_at: int = -1) -> None:
        self.threads: set[str] = set()
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 12

    def __getitem__(self, sample: int) -> tuple[int, dict[str, list[int]]]:
        if sample == self.fails_at:
            raise ValueError("sample is damaged")
        self.threads.add(threading.current_thread().name)
        return sample, {"more": [sample]}


def test_prefetching_changes_no_batch_and_no_generator(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        found, data = [], InThread()
        for prefetch in (False, True):
            ctx.seed(1)
            before = torch.get_rng_state()
            batches = []
            for step in ctx.steps(data, global_batch=4, microbatch=3, epochs=2, prefetch=prefetch):
                batches += [str(batch) for batch in step]
            assert torch.equal(before, torch.get_rng_state())
            found.append(batches)
        assert found[0] == found[1]
        assert data.threads == {"MainThread", "batches-ahead"}
        with pytest.raises(ValueError, match="sample is damaged"):
            list(used(ctx.steps(InThread(5), global_batch=4, prefetch=True)))
        for step in used(ctx.steps(data, global_batch=4, prefetch=True)):
            assert step.number == 1
            break
    assert "batches-ahead" not in {thread.name for thread in threading.enumerate()}


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_the_mean_of_losses_goes_on_after_a_restart(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        weight = torch.ones((), requires_grad=True)

        def train(steps: Any, until: int) -> list[float]:
            found = []
            for step in steps:
                for batch in step:
                    step.backward(weight * batch.double().mean())
                found.append(step.loss)
                if step.number == until:
                    break
            return found

        steps = ctx.steps(range(500), global_batch=2)
        assert math.isnan(steps.mean_loss())
        assert steps.mean_loss() != sum(train(steps, 3)) / 3
        losses = train(steps, 5)
        again = ctx.steps(range(500), global_batch=2)
        again.load_state_dict(steps.state_dict())
        losses += train(again, 230)
        assert len(again._losses._waiting) <= 101, "losses that nobody asks for are added up"
        assert again.mean_loss() == pytest.approx(
            sum([*train(ctx.steps(range(500), global_batch=2), 3), *losses]) / 230
        )
        assert math.isnan(again.mean_loss())


# ---- saves -----------------------------------------------------------------------------------------------------------


def test_an_overlapped_save_holds_the_state_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy begins only when the next forward and backward pass are done, and the update waits for it."""
    began, copied = threading.Event(), host_copy._copy

    def late(pairs: Any) -> None:
        assert began.wait(60)
        copied(pairs)

    monkeypatch.setattr(host_copy, "_copy", late)
    with Context(tmp_path, ONE) as ctx:
        model = ctx.setup(Normed())
        average = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        items: dict[str, Any] = {"model": model, "optimizer": optimizer, "average": average}
        state = ctx.state(keep=100, overlap=True, files={"config.json": {"a": 1}}, **items)
        expected: dict[int, Any] = {}
        for step in ctx.steps(Rows(12), global_batch=4):
            for x, y in step:
                step.backward((model(x) - y).square().mean())
            began.set()  # the buffers have changed by now
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            began.clear() if step.number < 3 else began.set()
            expected[step.number] = {
                name: {key: value.clone() for key, value in item.state_dict().items()}
                for name, item in items.items()
                if isinstance(item, torch.nn.Module)
            }
            state.save(step)
        assert ctx.failed_saves == []
    for number, models in expected.items():
        from training.checkpoints.manifest import load

        parts = load(tmp_path / "checkpoints" / f"step-{number:09d}")
        assert parts["config.json"] == {"a": 1}
        for name, tensors in models.items():
            assert parts[f"{name}.safetensors"].keys() == tensors.keys()
            for key, tensor in tensors.items():
                assert torch.equal(parts[f"{name}.safetensors"][key], tensor), f"{number} {name} {key}"


def test_options_that_ctx_state_does_not_take(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        with pytest.raises(ConfigError, match="overlap=True needs an optimizer among the items"):
            ctx.state(model=Net(), overlap=True)
        for name in ("state.json", "manifest.json", "../x.json", "weights.bin"):
            with pytest.raises(ConfigError, match="cannot be one of `files`"):
                ctx.state(model=Net(), files={name: {}})
        with pytest.raises(ConfigError, match="write it as s3://"):
            ctx.state(model=Net(), mirror="nonsense://bucket")


def apart(world: World, folder: Path, step: int, mirror: str, shard: bool) -> tuple[int, str, list[Any]]:
    """A node with its own disk saves `step`; returns the restored step or the error, and the weights."""
    torch.set_num_threads(1)
    node = replace(world, local_rank=0, node_rank=world.rank, local_world_size=1, num_nodes=world.world_size)
    run = folder / f"node{world.rank}" / "run"
    run.mkdir(parents=True, exist_ok=True)
    with Context(run, node) as ctx:
        torch.manual_seed(step)
        model = ctx.setup(Net(), shard=shard)
        optimizer = torch.optim.AdamW(model.parameters())
        state = ctx.state(model=model, optimizer=optimizer, mirror=mirror)
        try:
            found, error = state.restore(), ""
        except CheckpointError as problem:
            return -1, str(problem), []
        tensors = [
            value.full_tensor() if hasattr(value, "full_tensor") else value for value in model.state_dict().values()
        ]
        if step:
            state.save(step, wait=True)
        return found, error, [tensor.tolist() for tensor in tensors]


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize("shard", [False, True])
def test_nodes_without_a_common_disk_continue_from_the_mirror(tmp_path: Path, shard: bool) -> None:
    mirror = f"file://{tmp_path}/store"
    (_, _, first), _ = spawn(apart, 2, tmp_path / "one", 4, mirror, shard)
    assert "mirrored" in {line["event"] for line in read_lines(tmp_path / "one/node0/run/events.jsonl")}
    names = {path.name for path in (tmp_path / "one/node0/run/checkpoints/step-000000004").iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if ".rank" in name], "no other node can add its part"
    for found, error, weights in spawn(apart, 2, tmp_path / "two", 0, mirror, shard):
        assert (found, error, weights) == (4, "", first)
    for _, error, _ in spawn(apart, 2, tmp_path / "one", 0, "", shard):
        assert "nodes that share no disk need --mirror, or ctx.state(mirror=...)" in error


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        ctx.state(model=Net()).save(1, wait=True)
        parts = final(tmp_path)
        ctx.checkpoints.save(2, parts | {"state.json": parts["state.json"] | {"format": 9}}, wait=True)
        with pytest.raises(
            CheckpointError, match="has format 9, and this version reads 1; use the version that saved it"
        ):
            ctx.state(model=Net()).restore()


# ---- ranks and evaluation ---------------------------------------------------------------------------------------------


def differing(world: World, run_dir: Path, at: int) -> str:
    """Rank 1 changes its weights after the update of a step, and saves every one."""
    torch.set_num_threads(1)
    with Context(run_dir, world) as ctx:
        model = ctx.setup(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = ctx.steps(Rows(12), global_batch=4)
        state = ctx.state(model=model, steps=steps)
        try:
            for step in steps:
                for x, y in step:
                    step.backward((model(x) - y).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                if world.rank == 1 and step.number == at:
                    with torch.no_grad():
                        next(iter(model.parameters())).add_(1)
                ctx.should_stop(step, save=state, every=1)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_ranks_that_differ_after_the_first_update_are_found_before_a_save(tmp_path: Path) -> None:
    one, two = spawn(differing, 2, tmp_path / "bad", 1)
    assert one == two
    assert "ReplicaError: rank 1 of 2 ranks hold other weights than the rest (1 of 4 parameters" in one
    assert not list((tmp_path / "bad").glob("checkpoints/step-*"))
    assert spawn(differing, 2, tmp_path / "good", 0) == ["", ""]


def test_an_evaluation_of_samples_of_similar_length(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        seen: list[list[int]] = []

        def predict(batch: torch.Tensor) -> torch.Tensor:
            seen.append(batch.tolist())
            return batch * 2

        found = ctx.evaluate(predict, range(40), lambda p: p.tolist(), batch_size=7, lengths=LENGTHS)
        assert found == {"<lambda>": [2 * sample for sample in range(40)], "samples": 40}
        in_order = [LENGTHS[sample] for batch in seen for sample in batch]
        assert in_order == sorted(LENGTHS)
        with pytest.raises(ConfigError, match=r"ctx\.evaluate: there are 2 lengths, and 3 samples"):
            ctx.evaluate(predict, range(3), len, lengths=[1, 2])
