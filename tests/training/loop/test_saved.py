"""What ctx.state saves and restores, and saves that fail."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.training.loop.jobs import Config, Net, Rows, fit_in_world
from tests.training.ranks import final, losses, spawn
from training.context import Context
from training.distributed.world import World
from training.errors import CheckpointError, ConfigError
from training.files import read_lines
from training.loop import saved as saved_module

ONE = World(threads=1)


class Counter:
    """The state of a loader: any value."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self.value, Exception):
            raise self.value
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def saved(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_lines(run_dir / "events.jsonl") if line["event"] == "saved"]


def failed(run_dir: Path) -> dict[int, str]:
    return {
        line["step"]: line["error"] for line in read_lines(run_dir / "events.jsonl") if line["event"] == "save-failed"
    }


def test_the_generators_and_any_value_come_back(tmp_path: Path) -> None:
    value = {
        "a": [1, (2.5, None)],
        3: torch.arange(3),
        "n": np.float32(0.5),
        "c": torch.ones(2, dtype=torch.complex128),
    }
    with Context(tmp_path, ONE) as ctx:
        state = ctx.state(loader=Counter(value))
        assert state.restore() == 0
        draws()
        state.save(7, wait=True)
        expected = draws()
        assert ctx.failed_saves == []
    with Context(tmp_path, ONE) as ctx:
        loader = Counter()
        state = ctx.state(loader=loader)
        assert (state.restore(), state.step) == (7, 7)
        assert draws() == expected
    assert str(loader.value) == str(value)
    assert type(loader.value["n"]) is np.float32
    assert not list(tmp_path.rglob("*.pkl"))
    assert saved(tmp_path) == [7]


def gan(ctx: Context, stop_at: int = 0) -> list[Any]:
    """Two models, two optimizers, a scheduler, an average of the weights, and a scaler."""
    ctx.seed(0)
    one, other = ctx.setup(Net()), ctx.setup(Net())
    average = torch.optim.swa_utils.AveragedModel(one, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    first = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(other.parameters(), lr=0.01, amsgrad=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(first, 0.1, total_steps=20)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(second)
    steps = ctx.steps(Rows(30), global_batch=4, epochs=2)
    state = ctx.state(
        one=one, other=other, average=average, first=first, second=second, schedule=schedule, plateau=plateau,
        scaler=torch.amp.GradScaler("cpu"), steps=steps,
    )  # fmt: skip
    state.restore()
    for step in steps:
        for x, y in step:
            step.backward((one(x) - y).square().mean() + random.random() * one(x).mean())
            step.backward((other(x) - one(x).detach()).abs().mean() * float(np.random.rand()))
        for each in (first, second):
            each.step()
            each.zero_grad()
        schedule.step()
        plateau.step(step.loss)
        average.update_parameters(one)
        if step.number == stop_at:
            ctx.request_stop("test")
        if ctx.should_stop(step, save=state, every=5):
            break
    return [steps.loss, schedule.get_last_lr(), *(p.tolist() for m in (one, other, average) for p in m.parameters())]


def gan_in_world(world: World, run_dir: Path, stop_at: int = 0) -> list[Any]:
    torch.set_num_threads(1)
    with Context(run_dir, world) as ctx:
        found = gan(ctx, stop_at)
        assert ctx.failed_saves == []
        return found


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize("size", [1, 2, 3])
def test_several_models_optimizers_and_schedulers(tmp_path: Path, size: int) -> None:
    expected = spawn(gan_in_world, size, tmp_path / "whole")
    spawn(gan_in_world, size, tmp_path / "parts", 7)
    assert spawn(gan_in_world, size, tmp_path / "parts") == expected
    names = {path.name.removesuffix(".safetensors") for path in final_folder(tmp_path / "parts").glob("*.safetensors")}
    assert names == {"one", "other", "average", "first", "second", "rng"}
    other = 2 if size == 1 else 1
    assert spawn(gan_in_world, other, tmp_path / "parts")[0][:2] == expected[0][:2], "nothing is left to do"


def final_folder(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def own_state(world: World, run_dir: Path, values: list[Any] | None) -> Any:
    with Context(run_dir, world) as ctx:
        loader = Counter(values[world.rank] if values else None)
        same = Counter("same")
        state = ctx.state(loader=loader, same=same)
        if values is None:
            state.restore()
            return str(loader.value), torch.rand(()).item()
        ctx.seed(world.rank)
        state.save(3, wait=True)
        return None, torch.rand(()).item()


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_each_rank_has_the_state_of_its_loader_and_its_generators(tmp_path: Path) -> None:
    values = [{"at": 5, "buffer": torch.arange(2)}, {"at": 6, "buffer": torch.arange(3)}]
    before = spawn(own_state, 2, tmp_path, values)
    after = spawn(own_state, 2, tmp_path, None)
    assert [value for value, _ in after] == [str(value) for value in values]
    assert [draw for _, draw in after] == [draw for _, draw in before]
    tree = final(tmp_path)["state.json"]["items"]
    assert (len(tree["loader"]), len(tree["same"])) == (2, 1)
    with pytest.raises(AssertionError, match="loader differs from rank to rank, and it was saved by 2 ranks"):
        spawn(own_state, 3, tmp_path, None)


def fresh(world: World, run_dir: Path) -> list[float]:
    with Context(run_dir, world) as ctx:
        ctx.seed(5)
        ctx.state().restore()
        return draws()


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_generators_differ_from_rank_to_rank(tmp_path: Path) -> None:
    one, two, three = spawn(fresh, 3, tmp_path)
    assert len({*one, *two, *three}) == 9
    with Context(tmp_path, ONE) as ctx:
        ctx.seed(5)
        assert draws() == one
    assert spawn(fresh, 3, tmp_path) == [one, two, three]


def test_the_file_of_a_model_is_its_state_dict(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        model = Net()
        ctx.state(model=model).save(1, wait=True)
    found = load_file(final_folder(tmp_path) / "model.safetensors")
    assert found.keys() == model.state_dict().keys()
    Net().load_state_dict(found)


# ---- saves that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), "loader.value is of type object"),
        (lambda: 0, "without pickle"),
        (RuntimeError("not now"), "RuntimeError: not now"),
        (torch.ones(2).to_sparse(), "without pickle"),
        (MemoryError("none left"), "none left"),
    ],
    ids=["object", "function", "raises", "sparse", "memory"],
)
def test_a_state_that_cannot_be_saved_does_not_end_training(
    tmp_path: Path, value: Any, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with Context(tmp_path, ONE) as ctx:
        loader = Counter(1)
        state = ctx.state(loader=loader)
        state.save(1, wait=True)
        loader.value = value
        state.save(2, wait=True)
        (failure,) = ctx.failed_saves
        assert failure["step"] == 2
        assert text in failure["error"]
    assert failed(tmp_path) == {2: failure["error"]}
    assert "the checkpoint of step 2 could not be saved" in capfd.readouterr().err
    with Context(tmp_path, ONE) as ctx:
        assert ctx.state(loader=Counter()).restore() == 1


def fails_on(world: World, run_dir: Path, bad: int) -> tuple[int, list[Any]]:
    with Context(run_dir, world) as ctx:
        state = ctx.state(loader=Counter(RuntimeError("not now") if world.rank == bad else 1))
        for step in range(1, 4):
            state.save(step, wait=True)
        return ctx.group.gather(1).count(1), ctx.failed_saves


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize("bad", [0, 1])
def test_a_save_that_fails_on_one_rank_fails_on_all(tmp_path: Path, bad: int) -> None:
    errors = [{"step": step, "error": f"CheckpointError: rank {bad}: RuntimeError: not now"} for step in (1, 2, 3)]
    assert spawn(fails_on, 2, tmp_path, bad) == [(2, errors), (2, [])]
    assert not list(tmp_path.glob("checkpoints/step-*"))


@pytest.mark.parametrize("obstacle", ["file", "link"])
def test_a_folder_that_cannot_be_written_does_not_end_training(tmp_path: Path, obstacle: str) -> None:
    folder = tmp_path / "checkpoints"
    if obstacle == "file":
        folder.touch()
    else:
        folder.symlink_to(tmp_path / "nowhere" / "at all")
    found = fit_in_world(ONE, tmp_path, Config(epochs=1, every=3))
    assert found["loss"] > 0
    assert [each["step"] for each in found["failed"]] == [3, 6, 7]
    assert failed(tmp_path).keys() == {3, 6, 7}


def test_a_save_that_fails_while_a_later_one_succeeds(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with Context(tmp_path, ONE) as ctx:
        state = ctx.state(loader=Counter(1))
        folder.touch()
        state.save(1, wait=True)
        folder.unlink()
        state.save(2, wait=True)
        assert [each["step"] for each in ctx.failed_saves] == [1]
    assert saved(tmp_path) == [2]


def on_a_full_disk(world: World, run_dir: Path, ballast: Path | None) -> tuple[list[int], list[float]]:
    torch.set_num_threads(1)
    run_dir.mkdir(exist_ok=True)
    with Context(run_dir, world) as ctx:
        ctx.seed(0)
        model = ctx.setup(Net())
        big = Counter(torch.zeros(500_000))
        steps = ctx.steps(Rows(40), global_batch=4)
        state = ctx.state(model=model, big=big, steps=steps)
        found = []
        for step in steps:
            for x, y in step:
                step.backward((model(x) - y).square().mean())
            found.append(step.loss)
            ctx.log(step, loss=step.loss)
            if ballast and world.rank == 0 and step.number == 4:
                with ballast.open("wb") as file, contextlib.suppress(OSError):
                    file.write(b"\0" * (shutil.disk_usage(ballast.parent).free - 4096))
            if ballast and world.rank == 0 and step.number == 8:
                ctx.checkpoints.wait()
                ballast.unlink()
            ctx.should_stop(step, save=state, every=2)
            ctx.checkpoints.wait()
        return [each["step"] for each in ctx.failed_saves], found


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize("size", [1, 2])
def test_a_full_disk_costs_checkpoints_and_nothing_else(tmp_path: Path, disk: Path, size: int) -> None:
    whole = spawn(on_a_full_disk, size, tmp_path / "run", None)
    assert whole[0][0] == []
    results = spawn(on_a_full_disk, size, disk / "run", disk / "ballast")
    assert results[0] == ([4, 6], whole[0][1])
    assert saved(disk / "run") == [2, 8, 10]
    assert all("No space left on device" in error for error in failed(disk / "run").values())
    assert sorted(losses(disk / "run")) == list(range(1, 11))


# ---- when, and which stay -------------------------------------------------------------------------------------------


class Clock:
    """A stand-in for `time` in the module that decides when a save is due."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_saves_are_due_every_so_many_steps_or_seconds_and_once_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_module, "time", clock := Clock())
    with Context(tmp_path, ONE) as ctx:
        state = ctx.state(keep=100, loader=Counter(1))
        for step in range(1, 8):
            if step == 5:
                state.save(step)
            if step == 6:
                clock.now += 10.0
            ctx.should_stop(step, save=state, every=5, seconds=10.0)
        ctx.request_stop("test")
        assert ctx.should_stop(8, save=state)
    assert saved(tmp_path) == [5, 6, 8]


def by_the_clock(world: World, run_dir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, Context(run_dir, world) as ctx:
        patch.setattr(saved_module, "time", clock := Clock())
        state = ctx.state(keep=100, loader=Counter(1))
        for step in range(1, 7):
            if step == 3 or world.rank == 1:  # by the clock of rank 1, a save is due at each step
                clock.now += 10.0
            ctx.should_stop(step, save=state, seconds=10.0)


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_all_ranks_save_by_the_clock_of_rank_0(tmp_path: Path) -> None:
    spawn(by_the_clock, 2, tmp_path)
    assert saved(tmp_path) == [4]


def test_the_best_and_the_newest_stay(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        state = ctx.state(keep=2, loader=Counter(1))
        for step, score in enumerate([0.1, 0.9, 0.5, 0.4, float("nan")], start=1):
            state.save(step, score=score)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
        f"step-{step:09d}" for step in (2, 4, 5)
    ]


# ---- what cannot be restored ----------------------------------------------------------------------------------------


def test_what_ctx_state_does_not_take(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        with pytest.raises(ConfigError, match=r"loader \(list\) has no state_dict and load_state_dict"):
            ctx.state(loader=[])
        with pytest.raises(ConfigError, match="cannot have the name 'rng'"):
            ctx.state(rng=Counter())
        with pytest.raises(ConfigError, match="keep=0 must be 1 or more"):
            ctx.state(keep=0)


def test_a_checkpoint_of_other_items_or_another_model_is_refused(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        ctx.state(model=Net(), loader=Counter(1)).save(4, wait=True)
    with Context(tmp_path, ONE) as ctx:
        with pytest.raises(CheckpointError, match=r"holds loader, model, and ctx\.state was given average, model;"):
            ctx.state(model=Net(), average=Net()).restore()
        with pytest.raises(CheckpointError, match="model does not take the state of step 4"):
            ctx.state(model=torch.nn.Linear(2, 2), loader=Counter()).restore()


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        state = ctx.state(loader=Counter(1))
        state.save(1)
        state.save(2, wait=True)
    file = final_folder(tmp_path) / "rng.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with Context(tmp_path, ONE) as ctx, pytest.warns(UserWarning, match="damaged"):
        assert ctx.state(loader=Counter()).restore() == 1
    shutil.rmtree(tmp_path / "checkpoints" / "step-000000001")
    with (
        Context(tmp_path, ONE) as ctx,
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="every checkpoint"),
    ):
        ctx.state(loader=Counter()).restore()


def restored(world: World, run_dir: Path, own: bool) -> str:
    folder = run_dir / f"node{world.rank}" if own and world.rank else run_dir
    folder.mkdir(exist_ok=True)
    with Context(folder, world) as ctx:
        try:
            return str(ctx.state(loader=Counter()).restore())
        except CheckpointError as error:
            return str(error)


@pytest.mark.slow
@pytest.mark.usefixtures("rank_server")
def test_a_rank_that_does_not_see_the_checkpoint_is_an_error_of_all_ranks(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        ctx.state(loader=Counter(1)).save(4, wait=True)
    assert spawn(restored, 2, tmp_path, False) == ["4", "4"]
    one, two = spawn(restored, 2, tmp_path, True)
    assert one == two
    assert "all nodes must see the run directory on a disk that they share" in one
    file = final_folder(tmp_path) / "state.json"
    file.write_text(file.read_text() + " ")
    one, two = spawn(restored, 2, tmp_path, False)
    assert one == two
    assert "every checkpoint" in one


def test_a_checkpoint_of_the_reference_job_is_refused(tmp_path: Path) -> None:
    with Context(tmp_path, ONE) as ctx:
        ctx.checkpoints.save(3, {"model.safetensors": Net().state_dict(), "state.json": {"step": 3}}, wait=True)
        with pytest.raises(CheckpointError, match=r"was not saved by ctx\.state; use another run directory"):
            ctx.state(model=Net()).restore()
