"""Copy a state to host memory, to write a checkpoint while training changes the state."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from training.checkpoints.host_memory import HostMemory, HostTensor, paired, without_collection

if TYPE_CHECKING:
    import torch

    Pairs = list[tuple[HostTensor, torch.Tensor]]
    """(host memory, the tensor whose bytes it gets)"""


READABLE = 2**16
"""Characters of a JSON file up to which it has lines; to write these takes ten times as long."""

SMALL = 2**14
"""Elements of a tensor up to which torch copies it in the thread that asks for it."""


MANY = 256
"""Tensors that are copied by one call, for the time of which another thread may wait for the interpreter."""

KNOWN = ("cpu", "cuda")
"""Kinds of devices whose copies overlap with training; tensors of others are copied at once."""


class Buffers:
    """What the saves of a run use one after the other: host memory, and a stream of each GPU."""

    def __init__(self) -> None:
        self.pageable = HostMemory(pinned=False)
        self.pinned = HostMemory(pinned=True)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._layout: list[tuple[Any, ...]] | None = None
        self._places: list[HostTensor] = []

    def places(self, tensors: Sequence[torch.Tensor]) -> list[HostTensor]:
        """Return host memory for each of `tensors`, of the host or of a GPU: that of the last save, if it had the same."""
        layout = [(tensor.shape, tensor.dtype, tensor.is_cuda) for tensor in tensors]
        if layout == self._layout:
            self.pageable.reserve_again()
            self.pinned.reserve_again()
        else:
            self._layout = None
            self.pageable.reserve(tensor.nbytes for tensor in tensors if not tensor.is_cuda)
            self.pinned.reserve(tensor.nbytes for tensor in tensors if tensor.is_cuda)
            self._places = [
                HostTensor(
                    tensor.dtype,
                    tuple(tensor.shape),
                    (self.pinned if tensor.is_cuda else self.pageable).take(tensor.nbytes),
                )
                for tensor in tensors
            ]
            self._layout = layout
        return self._places

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of a GPU for copies, beside that on which training computes."""
        import torch

        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


class Copy:
    """A copy of a state, started by the constructor and completed by `finish` in any thread.

    Tensors of a GPU are copied on a stream of their own, after the work that is queued on the GPU's current stream. All
    tensors must stay as they are until `hold_updates`.

    Attributes:
        done: set when no tensor in host memory is read any more.
        stall_seconds: seconds for which this process waited, without `idle_seconds`.
    """

    def __init__(self, parts: Mapping[str, Any], buffers: Buffers) -> None:
        self.done = threading.Event()
        self.stall_seconds = 0.0
        self._contents: dict[str, Any] = {}
        self._on_host: Pairs = []
        # These references keep the memory of tensors that nobody else holds until the copy has read it.
        self._on_gpu: dict[torch.device, Pairs] = {}
        self._ends: dict[torch.device, torch.cuda.Event] = {}
        self._waits: list[tuple[torch.device, torch.cuda.Event, torch.cuda.Event]] = []
        tensors = [
            tensor
            for file, content in parts.items()
            if file.endswith(".safetensors")
            for tensor in content.values()
            if tensor.device.type in KNOWN
        ]
        with without_collection():
            places = iter(buffers.places(tensors))
            for file, content in parts.items():
                if file.endswith(".safetensors"):
                    self._contents[file] = {name: self._place(tensor, places) for name, tensor in content.items()}
                else:
                    self._contents[file] = _spell(content)
        for device, pairs in self._on_gpu.items():
            self._ends[device] = _send(pairs, device, buffers.stream(device))
        if not self._on_host:
            self.done.set()

    def _place(self, tensor: torch.Tensor, places: Iterator[HostTensor]) -> HostTensor:
        """Note the copy of `tensor` to the next of `places`, or copy it."""
        if tensor.device.type not in KNOWN:
            return HostTensor.of(tensor.detach().cpu())
        place = next(places)
        pairs = self._on_gpu.setdefault(tensor.device, []) if tensor.is_cuda else self._on_host
        pairs.append((place, tensor))
        return place

    def hold_updates(self) -> bool:
        """Have what comes next wait until the state is read; returns whether it has been read completely.

        This thread waits for tensors in host memory. For those of a GPU, work that is queued on its current stream from now
        on waits, and this thread goes on.
        """
        import torch

        began, complete = time.monotonic(), True
        self.done.wait()
        for device, end in self._ends.items():
            with torch.cuda.device(device):
                if end.query():  # type: ignore[no-untyped-call]
                    continue
                # A copy of the state on the GPU would need no wait, but as much memory again as the state.
                stream = torch.cuda.current_stream(device)
                before = stream.record_event(_event(timing=True))
                stream.wait_event(end)
                after = stream.record_event(_event(timing=True))
                self._waits.append((device, before, after))
                complete = False
        self.stall_seconds += time.monotonic() - began
        return complete

    def idle_seconds(self) -> float:
        """Seconds for which a GPU waited in `hold_updates`, to call after `finish`.

        A wait that begins after the end of the copy takes no time, so one that is not over by now counts as none.
        """
        import torch

        longest = 0.0
        for device, before, after in list(self._waits):
            with torch.cuda.device(device):
                if after.query():  # type: ignore[no-untyped-call]
                    longest = max(longest, before.elapsed_time(after) / 1000)
        return longest

    def finish(self) -> dict[str, Any]:
        """Complete the copy; returns file name -> bytes of a JSON file, or a `HostTensor` by name."""
        import torch

        try:
            _copy(self._on_host)
        finally:  # also after an error, which the writer reports: training waits for `done`
            self._on_host.clear()
            self.done.set()
        for device, end in self._ends.items():
            with torch.cuda.device(device):  # a new thread is on GPU 0, and would make a context there
                end.synchronize()
        self._on_gpu.clear()
        return self._contents


def _spell(content: Any) -> bytes:
    text = json.dumps(content)
    if len(text) <= READABLE:
        text = json.dumps(content, indent=1)
    return text.encode()


def _send(pairs: Pairs, device: torch.device, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Queue the copies of one GPU on `stream`, after the work of its current stream; returns the event at their end."""
    import torch

    with torch.cuda.device(device):
        stream.wait_event(torch.cuda.current_stream(device).record_event())
        with torch.cuda.stream(stream):  # also for the contiguous copy of a tensor that is not contiguous
            for place, source in pairs:
                for piece, part in paired(place.pieces, source.detach()):
                    piece.copy_(part, non_blocking=True)
        end = _event(blocking=True)  # a thread that waits for it leaves its core free
        stream.record_event(end)
    return end


def _event(*, timing: bool = False, blocking: bool = False) -> torch.cuda.Event:
    import torch

    return torch.cuda.Event(enable_timing=timing, blocking=blocking)  # type: ignore[no-untyped-call]


def _copy(pairs: Pairs) -> None:
    """Copy in this thread alone: torch would use all cores, which training needs.

    Small tensors are copied by one call for many of them: what Python takes for ten thousand, training waits for.
    """
    import numpy as np
    import torch

    places: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for place, source in pairs:
        if len(place.pieces) == 1 and source.numel() <= SMALL:
            places.append(place.tensor)
            sources.append(source)
            continue
        for piece, part in paired(place.pieces, source.detach()):
            np.copyto(piece.numpy(), part.numpy())
    for begin in range(0, len(places), MANY):
        with torch.no_grad():
            torch._foreach_copy_(places[begin : begin + MANY], sources[begin : begin + MANY])
