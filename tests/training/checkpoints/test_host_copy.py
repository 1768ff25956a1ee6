"""Copies of GPU tensors beside training, on GPUs that run in an order that the test chooses; host memory in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.gpus import Choose, Gpus, OnGpu, by_chance, computing_first, copying_first
from training.checkpoints import host_memory
from training.checkpoints.host_copy import Buffers, Copy
from training.checkpoints.host_memory import HostMemory, HostTensor
from training.checkpoints.manifest import load
from training.checkpoints.store import Checkpoint, Checkpoints
from training.context import Context

SCHEDULES = [computing_first, copying_first, *map(by_chance, range(6))]
every_schedule = pytest.mark.parametrize("choose", SCHEDULES, ids=["compute", "copy", *map(str, range(6))])


class State:
    """A model on two GPUs and in host memory, all elements of which are the number of updates."""

    def __init__(self, gpus: Gpus) -> None:
        def on(index: int, tensor: torch.Tensor) -> OnGpu:
            return OnGpu(tensor, gpus, torch.device("cuda", index))

        self.tensors: dict[str, torch.Tensor] = {
            "first": on(1, torch.zeros(3, 5)),
            "turned": on(1, torch.zeros(4, 6, dtype=torch.float64)).t(),
            "stride": on(1, torch.zeros(10)[::2]),
            "second": on(2, torch.zeros(7, dtype=torch.bfloat16)),
            "scalar": on(2, torch.zeros((), dtype=torch.int64)),
            "empty": on(2, torch.zeros(0, 4)),
            "host": torch.zeros(9),
        }

    def update(self) -> None:
        for tensor in self.tensors.values():
            tensor.add_(1)

    @property
    def parts(self) -> dict[str, Any]:
        """What a save gets; tensors that nobody else holds are among it."""
        return {"a.safetensors": dict(self.tensors), "b.safetensors": {k: v.clone() for k, v in self.tensors.items()}}


def updates(path: Path) -> set[float]:
    """The elements of all tensors of a checkpoint."""
    parts = load(path)
    assert parts["a.safetensors"]["turned"].shape == (6, 4)
    return {float(each) for content in parts.values() for tensor in content.values() for each in tensor.reshape(-1)}


def train(gpus: Gpus, folder: Path, *, wait: bool = True) -> list[Checkpoint]:
    """Save after the second and the fourth update; the GPUs begin only when the third and the fifth are queued."""
    saved: list[Checkpoint] = []
    store = Checkpoints(folder)
    store.on_saved = saved.append
    failed: list[Exception] = []
    store.on_failed = lambda step, error: failed.append(error)
    state = State(gpus)
    for step in range(1, 6):
        if wait:
            store.wait_for_copy()
        state.update()
        if step % 2 == 0:
            store.save(step, state.parts, later=True)
        else:
            gpus.go.set()
            store.wait()
            gpus.go.clear()
    gpus.go.set()
    store.close()
    gpus.run()
    assert failed == []
    assert [float(tensor.sum() / max(1, tensor.numel())) for tensor in state.tensors.values() if not isinstance(tensor, OnGpu)] == [5]  # fmt: skip
    return saved


@every_schedule
def test_a_save_holds_the_state_of_its_step_whatever_the_order_of_the_streams(
    choose: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus(choose)
    gpus.patch(monkeypatch)
    saved = train(gpus, tmp_path)
    assert [checkpoint.step for checkpoint in saved] == [2, 4]
    assert [updates(checkpoint.path) for checkpoint in saved] == [{2}, {4}]
    assert gpus.contexts == {1, 2}, "the GPUs of the tensors, in whatever thread"


@pytest.mark.parametrize(("deaf", "choose"), [("side", copying_first), ("default", computing_first)])
def test_without_one_of_the_two_waits_a_save_would_be_torn(
    deaf: str, choose: Choose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus(choose, deaf)
    gpus.patch(monkeypatch)
    assert [updates(checkpoint.path) for checkpoint in train(gpus, tmp_path)] != [{2}, {4}]


def test_memory_that_only_the_save_holds_is_kept_until_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in notices memory that was given back; see `OnGpu`."""
    gpus = Gpus()
    gpus.patch(monkeypatch)
    copy = Copy(State(gpus).parts, Buffers())
    copy._on_gpu.clear()
    gpus.go.set()
    with pytest.raises(AssertionError, match="may belong to others"):
        copy.finish()


@pytest.mark.parametrize(("microbatches", "idle"), [(0, 1.0), (2, 0.5), (4, 0.0), (9, 0.0)])
def test_the_time_that_a_gpu_waits_is_part_of_the_stall(
    microbatches: int, idle: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus()
    gpus.patch(monkeypatch)
    weight = OnGpu(torch.zeros(3), gpus, torch.device("cuda", 1))
    work = OnGpu(torch.zeros(3), gpus, torch.device("cuda", 1))
    copy = Copy({"a.safetensors": {"weight": weight}}, Buffers())
    for _ in range(microbatches):
        work.add_(1)
    assert not copy.hold_updates(), "it has not been read, and this thread goes on"
    weight.add_(1)
    assert copy.idle_seconds() == 0
    gpus.go.set()
    copy.finish()
    gpus.run()
    assert copy.idle_seconds() == pytest.approx(idle)
    assert copy.hold_updates()


def test_without_overlap_a_save_returns_when_everything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus()
    gpus.patch(monkeypatch)
    gpus.go.set()
    state = State(gpus)
    store = Checkpoints(tmp_path)
    store.save(1, state.parts)
    state.update()  # without `wait_for_copy`
    gpus.run()
    store.close()
    assert updates(store.committed()[0].path) == {0}


def test_the_step_of_an_optimizer_waits_on_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(computing_first)
    gpus.patch(monkeypatch)
    model = torch.nn.Module()
    content = torch.ones(4)
    model.weight = torch.nn.Parameter(OnGpu(content, gpus, torch.device("cuda", 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with Context.single_process(tmp_path) as ctx:
        state = ctx.state(model=model, optimizer=optimizer, overlap=True)
        state.save(1)
        model.weight.grad = OnGpu(torch.ones(4), gpus, torch.device("cuda", 1))
        optimizer.step()
        gpus.go.set()
    gpus.run()
    assert content.tolist() == [0.0] * 4
    assert load(tmp_path / "checkpoints/step-000000001")["model.safetensors"]["weight"].tolist() == [1.0] * 4


# ---- host memory ------------------------------------------------------------------------------------------------


def test_page_locked_memory_is_bounded_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "CHUNK", 2**14)
    gpus = Gpus()
    gpus.patch(monkeypatch)
    gpus.go.set()
    sizes = [2**12 + 1] * 20 + [2**15 + 1, 1, 0, 3]
    tensors = {
        str(number): OnGpu(torch.full((size,), number, dtype=torch.uint8), gpus, torch.device("cuda", 1))
        for number, size in enumerate(sizes)
    }
    buffers = Buffers()
    for _ in range(3):
        content = Copy({"a.safetensors": tensors}, buffers).finish()["a.safetensors"]
        for number, (name, size) in enumerate(zip(tensors, sizes, strict=True)):
            found = torch.cat(content[name].pieces) if size else torch.zeros(0)
            assert found.tolist() == [number] * size
    assert all(size & (size - 1) == 0 for size in gpus.pinned), "torch would take more than what is asked for"
    assert sum(gpus.pinned) <= sum(sizes) + 64 * len(sizes) + 2**14
    assert max(gpus.pinned) == 2**14


def test_pieces_neither_overlap_nor_leave_their_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "CHUNK", 2**13)
    memory = HostMemory(pinned=False)
    for seed in range(20):  # smaller and larger states take turns
        sizes = torch.randint(0, 2**14, (1 + seed * 7 % 11,), generator=torch.Generator().manual_seed(seed)).tolist()
        memory.reserve(sizes)
        taken = [memory.take(size) for size in sizes]
        assert [sum(piece.numel() for piece in pieces) for pieces in taken] == sizes
        for number, pieces in enumerate(taken):
            for piece in pieces:
                piece.fill_(number)
        assert all(bool((piece == number).all()) for number, pieces in enumerate(taken) for piece in pieces)


def test_memory_that_one_large_save_took_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at once: the best checkpoint may be larger than the others, and come back every few saves."""
    monkeypatch.setattr(host_memory, "CHUNK", 2**14)
    buffers = Buffers()
    small = {"a.safetensors": {"weight": torch.arange(1000)}}
    large = {"a.safetensors": {f"weight {n}": torch.full((4096,), n) for n in range(16)}}
    Copy(small, buffers).finish()
    first = buffers.pageable.nbytes
    for _ in range(2):
        Copy(large, buffers).finish()
        assert buffers.pageable.nbytes >= 16 * 4096 * 8
        for number in range(2 * host_memory.KEPT):
            found = Copy(small, buffers).finish()["a.safetensors"]["weight"]
            assert found.tensor.equal(torch.arange(1000))
            assert (buffers.pageable.nbytes <= first + host_memory.CHUNK) == (number >= host_memory.KEPT - 1)


def test_ten_thousand_tensors_are_copied_as_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8)
    tensors = {
        str(n): torch.randint(0, 2, (n % 7, 3) if n % 3 else (), generator=generator).to(kinds[n % len(kinds)])
        for n in range(10_000)
    }
    tensors["turned"] = torch.randn(40, 50, generator=generator).t()
    tensors["parameter"] = torch.nn.Parameter(torch.randn(5, generator=generator))
    tensors["large"] = torch.randn(300, 300, generator=generator)
    buffers = Buffers()
    for step in range(3):
        kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        found = Copy({"a.safetensors": tensors}, buffers).finish()["a.safetensors"]
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_() if step else tensor.copy_(tensor.flip(0) if tensor.dim() else tensor)
        assert all(not each.pieces or each.tensor.equal(kept[name]) for name, each in found.items())


def test_a_tensor_of_the_host_is_wrapped_as_it_is() -> None:
    base = torch.arange(6.0)
    for tensor in (base, base.reshape(2, 3).t(), base[::2], base[:1].expand(3), base[4]):
        host = HostTensor.of(tensor)
        assert (host.dtype, host.shape) == (torch.float32, tuple(tensor.shape))
        assert torch.cat(host.pieces).view(torch.float32).tolist() == tensor.reshape(-1).tolist()
