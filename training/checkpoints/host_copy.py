"""Copy a state to host memory, to write a checkpoint while training changes the state."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Buffers = dict[tuple[str, str], torch.Tensor]
    """(file, name) -> buffer, reused by the next save: new pages would take longer than the copy itself."""


class Copy:
    """A copy of a state, started by the constructor and completed by `finish` in any thread.

    GPU tensors are copied in stream order, so later kernels cannot change the copy; only `finish` waits. Tensors in host
    memory must not change until `done`.

    Attributes:
        done: set when the copy no longer reads the state.
        stall_seconds: seconds for which training waited.
    """

    def __init__(self, parts: Mapping[str, Any], buffers: Buffers) -> None:
        import torch

        self.done = threading.Event()
        self.stall_seconds = 0.0
        self._contents: dict[str, Any] = {}
        devices: set[torch.device] = set()
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._sent: dict[torch.device, torch.cuda.Event] = {}
        for file, content in parts.items():
            if not file.endswith(".safetensors"):
                self._contents[file] = json.dumps(content, indent=1).encode()
                continue
            self._contents[file] = {}
            for name, tensor in content.items():
                source = tensor.detach()
                buffer = buffers.get((file, name))
                if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                    buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                    buffers[file, name] = buffer
                if source.device.type == "cpu":
                    self._waiting.append((buffer, source))
                else:
                    buffer.copy_(source, non_blocking=source.is_cuda)
                    if source.is_cuda:
                        devices.add(source.device)
                self._contents[file][name] = buffer
        for device in devices:  # a model may lie on several; an event covers the stream of its own
            with torch.cuda.device(device):
                self._sent[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._sent[device].record()
        if not self._waiting:  # later work on a device comes after the copies in its stream
            self.done.set()

    def finish(self) -> dict[str, Any]:
        """Complete the copy; returns file name -> bytes of a JSON file, or tensors by name."""
        import torch

        try:
            for buffer, source in self._waiting:
                _copy(buffer, source)
            for device, event in self._sent.items():
                with torch.cuda.device(device):  # a new thread is on GPU 0, and would make a context there
                    event.synchronize()
        finally:  # also after an error, which the writer reports: training waits for `done`
            self._waiting.clear()
            self.done.set()
        return self._contents


def _copy(buffer: torch.Tensor, source: torch.Tensor) -> None:
    """Copy in this thread alone: torch would use all cores, which training needs."""
    import numpy as np
    import torch

    if source.is_contiguous():
        np.copyto(buffer.reshape(-1).view(torch.uint8).numpy(), source.reshape(-1).view(torch.uint8).numpy())
    else:
        buffer.copy_(source)
