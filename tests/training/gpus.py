"""GPUs at the edge of the driver: streams and events that run in an order that a test chooses, and tensors that lie there.

`Gpus.patch` puts them in the place of those of `torch.cuda`. Tensors are real ones in host memory that report the device of a
GPU; what is done with them is queued on the current stream of that device, as CUDA does it.
"""

from __future__ import annotations

import contextlib
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

Choose = Callable[[list["Stream"]], "Stream"]
COPY_SECONDS, COMPUTE_SECONDS = 1.0, 0.25


def computing_first(streams: list[Stream]) -> Stream:
    return min(streams, key=lambda stream: stream.side)


def copying_first(streams: list[Stream]) -> Stream:
    return max(streams, key=lambda stream: stream.side)


def by_chance(seed: int) -> Choose:
    return random.Random(seed).choice


class Gpus:
    """The GPUs of one process.

    Attributes:
        go: the GPUs do not begin before it is set.
        contexts: the GPUs on which the driver has made a context.
        pinned: bytes of each request for page-locked memory.
        deaf: streams whose waits are left out: "side" or "default".
    """

    def __init__(self, choose: Choose = computing_first, deaf: str = "") -> None:
        self.choose, self.deaf = choose, deaf
        self.go = threading.Event()
        self.contexts: set[int] = set()
        self.pinned: list[int] = []
        self.streams: list[Stream] = []
        self.defaults: dict[int, Stream] = {}
        self.current = threading.local()
        self.lock = threading.Lock()

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put these GPUs in the place of torch's."""
        empty = torch.empty

        def allocate(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
            made = empty(*size, **options)
            if pin_memory:
                self.pinned.append(made.nbytes)
            return made

        monkeypatch.setattr(torch, "empty", allocate)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, torch.device(device).index, side=True))
        monkeypatch.setattr(torch.cuda, "Event", lambda **options: Event(self, **options))
        for name in ("current_stream", "stream", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def here(self) -> int:
        """The current device of this thread; a new thread is on GPU 0."""
        return int(getattr(self.current, "device", 0))

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self.here()
        self.current.device = device.index
        yield
        self.current.device = before

    def current_stream(self, device: torch.device) -> Stream:
        chosen: Stream | None = getattr(self.current, f"stream{device.index}", None)
        if device.index not in self.defaults:
            self.defaults[device.index] = Stream(self, device.index, side=False)
        return chosen or self.defaults[device.index]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        name = f"stream{stream.index}"
        before = getattr(self.current, name, None)
        with self.device(torch.device("cuda", stream.index)):
            setattr(self.current, name, stream)
            yield
            setattr(self.current, name, before)

    def run(self, until: Event | None = None) -> None:
        """Do what is queued, in an order that the streams allow, until `until` has happened, or all of it."""
        assert self.go.wait(60)
        with self.lock:
            while until is None or until.time is None:
                ready = [stream for stream in self.streams if stream.queue and stream.queue[0][0]()]
                if not ready:
                    assert until is None, "the event can never happen"
                    assert not any(stream.queue for stream in self.streams), "the streams wait for each other"
                    return
                self.choose(ready).queue.popleft()[1]()


class Stream:
    """A queue of work: (whether it can begin, the work)."""

    def __init__(self, gpus: Gpus, index: int, *, side: bool) -> None:
        self.gpus, self.index, self.side = gpus, index, side
        self.time = 0.0
        self.queue: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()
        gpus.streams.append(self)
        gpus.contexts.add(index)

    def add(self, work: Callable[[], object], seconds: float) -> None:
        def timed() -> None:
            work()
            self.time += seconds

        self.queue.append((lambda: True, timed))

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.gpus)
        assert event.index in (None, self.index), "an event belongs to one GPU"
        event.index, event.time = self.index, None

        def happen() -> None:
            event.time = self.time

        self.queue.append((lambda: True, happen))
        return event

    def wait_event(self, event: Event) -> None:
        if event.index is None or self.gpus.deaf == ("side" if self.side else "default"):
            return

        def late() -> None:
            assert event.time is not None
            self.time = max(self.time, event.time)

        self.queue.append((lambda: event.time is not None, late))


class Event:
    """An event; `time` is that of its stream, None before it happens."""

    def __init__(self, gpus: Gpus, *, enable_timing: bool = False, blocking: bool = False) -> None:
        self.gpus, self.enable_timing = gpus, enable_timing
        self.index: int | None = None
        self.time: float | None = None

    def query(self) -> bool:
        self.gpus.contexts.add(self.gpus.here())
        return self.time is not None

    def synchronize(self) -> None:
        self.gpus.contexts.add(self.gpus.here())
        self.gpus.run(self)

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing
        assert end.enable_timing
        assert self.time is not None
        assert end.time is not None
        return (end.time - self.time) * 1000


class Memory:
    """Memory of a tensor; once nobody refers to it, later work of `stream` may get it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream


class OnGpu(torch.Tensor):
    """A tensor `content` of the host that reports the device `cuda:index`."""

    content: torch.Tensor
    gpus: Gpus
    memory: Memory

    @staticmethod
    def __new__(
        cls, content: torch.Tensor, gpus: Gpus, device: torch.device, memory: Memory | None = None
    ) -> OnGpu:  # fmt: skip
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls,
            content.size(),
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            device=device,
        )
        made.content, made.gpus = content, gpus
        made.memory = memory or Memory(gpus.current_stream(device))
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        owner = next(each for each in args if isinstance(each, OnGpu))
        stream = owner.gpus.current_stream(owner.device)
        plain = [each.content if isinstance(each, OnGpu) else each for each in args]
        memories = [weakref.ref(each.memory) for each in args if isinstance(each, OnGpu)]
        kept = {id(each): each.memory.stream for each in args if isinstance(each, OnGpu)}.values()
        to_host = not isinstance(args[0], OnGpu)

        def work(then: Callable[[], object]) -> None:
            for memory, home in zip(memories, kept, strict=True):
                assert memory() is not None or home is stream, "memory that may belong to others is read"
            then()

        if func._schema.is_mutable:
            if to_host:
                assert args[2:3] == (True,) or kwargs.get("non_blocking"), "the host waits for the GPU"
            seconds = COPY_SECONDS if to_host else COMPUTE_SECONDS
            stream.add(lambda: work(lambda: func(*plain, **kwargs)), seconds)
            return args[0]
        result = func(*plain, **kwargs)
        results = result if isinstance(result, list) else [result]
        if func.is_view or func is torch.ops.aten._unsafe_view.default:
            views = [OnGpu(each, owner.gpus, owner.device, owner.memory) for each in results]
            return views if isinstance(result, list) else views[0]
        stream.add(lambda: work(lambda: result.copy_(func(*plain, **kwargs))), COMPUTE_SECONDS)
        return OnGpu(result, owner.gpus, owner.device)
