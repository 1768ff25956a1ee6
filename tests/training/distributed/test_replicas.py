"""All ranks train the same model, also on devices unknown to accelerate; a rank that differs is detected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.ranks import assert_same_end, spawn, train_in, train_in_world
from training.bert.model import load_model
from training.context import Context
from training.distributed.devices import RUNTIMES, Runtime
from training.distributed.group import Group
from training.distributed.replicas import _prints, check_replicas, replicate
from training.distributed.world import World
from training.errors import ReplicaError
from training.reporting.trackers import make_accelerator

pytestmark = pytest.mark.usefixtures("rank_server")
Options = dict[str, Any]


class Unreplicated(Runtime):
    """A device without averaging of gradients, as with torch_tpu in accelerate."""

    ddp = False


def on_an_unknown_device(world: World, runtime: Runtime) -> World:
    """Use `runtime` in this process, on a device unknown to accelerate."""
    torch.set_num_threads(1)
    RUNTIMES["tpu"] = runtime
    return replace(world, device="tpu")


def train_on_unknown(world: World, run: Path, options: Options) -> tuple[int, dict[str, torch.Tensor]]:
    """Train; returns the world size of accelerate, and this rank's weights."""
    seen: list[Any] = []

    def noted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(function(*args, **kwargs))
            return seen[-1]

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.train.load_model", noted(load_model))
        patch.setattr("training.reporting.report.make_accelerator", noted(make_accelerator))
        train_in(on_an_unknown_device(world, Runtime()), run, **options)
    model, accelerator = seen
    return accelerator.num_processes, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_ranks_on_a_device_that_accelerate_does_not_know_exchange_gradients(tmp_path: Path, options: Options) -> None:
    """Bit-identical to the CPU; one rank logs."""
    options |= {"batch_size": 2, "global_batch": 8, "max_grad_norm": 1.0, "log_with": ("tensorboard",)}
    ranks = spawn(train_on_unknown, 2, tmp_path / "unknown", options)
    assert [seen for seen, _ in ranks] == [1, 1], "accelerate takes each rank for the only one"
    for name, values in ranks[0][1].items():
        assert (values == ranks[1][1][name]).all(), name
    spawn(train_in_world, 2, tmp_path / "cpu", options)
    assert_same_end(tmp_path / "unknown", tmp_path / "cpu")
    for run in ("unknown", "cpu"):
        assert len(list((tmp_path / run).rglob("events.out.tfevents.*"))) == 1


def failing(world: World, run: Path, fault: str, options: Options) -> str:
    """Train with a fault on one rank, or on all; returns the error."""
    world = on_an_unknown_device(world, Unreplicated() if fault == "no DDP" else Runtime())
    step = torch.optim.AdamW.step

    def broken(self: Any, closure: Any = None) -> Any:
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        result = step(self, closure)
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            if fault == "frozen":
                for old, parameter in zip(before, parameters, strict=True):
                    parameter.copy_(old)
            else:  # the lowest bit of one number
                parameters[-1].view(torch.int32).view(-1)[0] ^= 1
        return result

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1 and fault in ("frozen", "perturbed"):
            patch.setattr(torch.optim.AdamW, "step", broken)
        if world.rank == 1 and fault == "order":
            options = {**options, "seed": 7}
        with pytest.raises(ReplicaError) as raised:
            train_in(world, run, **options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no DDP", "rank 1 of 2 ranks hold other weights than the rest"),
        ("frozen", "rank 1 of 2 ranks hold other weights than the rest"),
        ("perturbed", "(1 of "),
        ("order", "Position(seed=42, epoch=0, position=16) and Position(seed=7, epoch=0, position=16)"),
    ],
)
def test_a_rank_that_trains_another_model_is_found_at_the_first_step(
    tmp_path: Path, options: Options, fault: str, words: str
) -> None:
    told = spawn(failing, 2, tmp_path / "run", fault, options)
    assert told[0] == told[1]
    assert words in told[0]
    assert not list((tmp_path / "run").glob("checkpoints/step-*")), "nothing of it is saved"


class Others(Group):
    """A group in which the other ranks contribute the given values."""

    def __init__(self, *others: torch.nn.Module) -> None:
        self.others, self.size = others, len(others) + 1

    def gather(self, value: Any) -> list[Any]:
        return [value, *((_prints(other), value[1]) for other in self.others)]


def net(*dtypes: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ParameterDict(
        {str(n): torch.nn.Parameter(torch.randn(4, 3).to(dtype).t(), False) for n, dtype in enumerate(dtypes)}
        | {"scalar": torch.nn.Parameter(torch.tensor(1.0)), "empty": torch.nn.Parameter(torch.empty(0))}
    )


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


def test_weights_are_compared_to_the_bit_in_every_dtype() -> None:
    check_replicas(Others(net(*DTYPES), net(*DTYPES)), net(*DTYPES))
    for n in range(len(DTYPES)):
        other = net(*DTYPES)
        with torch.no_grad():
            other[str(n)][0, 0].neg_()  # type: ignore[index]
        with pytest.raises(ReplicaError, match=rf"rank 2 of 3 ranks .*\(1 of 7 parameters differ, such as {n}\)"):
            check_replicas(Others(net(*DTYPES), other), net(*DTYPES))
    zero, minus = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with torch.no_grad():
        for layer, value in ((zero, 0.0), (minus, -0.0)):
            for parameter in layer.parameters():
                parameter.fill_(value)
    with pytest.raises(ReplicaError, match="2 of 2 parameters differ"):
        check_replicas(Others(minus), zero)


def test_one_process_compares_nothing() -> None:
    check_replicas(Group(), net(torch.float32))


def ids_of(world: World, run: Path) -> Any:
    with Context(run, world) as ctx:
        _ = ctx.group
        return replicate(torch.nn.Linear(1, 1), torch.device("cpu")).device_ids


def test_device_ids_are_those_of_the_ranks_own_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With MIG, or with one visible GPU per rank, the device is 0 for all local ranks."""
    assert spawn(ids_of, 2, tmp_path) == [None, None]
    given = []
    monkeypatch.setattr(
        torch.nn.parallel, "DistributedDataParallel", lambda model, device_ids: given.append(device_ids)
    )
    for device in ("cuda:0", "cuda:3", "cuda", "xpu:1", "privateuseone", "cpu"):
        replicate(torch.nn.Linear(1, 1), torch.device(device))
    assert given == [[0], [3], None, [1], None, None]
