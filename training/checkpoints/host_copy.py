"""The copy of a state in host memory, from which a checkpoint is written while training changes the state."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Buffers = dict[tuple[str, str], torch.Tensor]
    """By file and name; kept from save to save, since fresh pages would cost more than the copy itself."""


class Copy:
    """One copy: begun by its maker, finished by the same thread at once, or later by the writer's.

    Tensors of a GPU are copied in the order of its stream, so what training does there afterwards cannot disturb them,
    and nobody waits but the writer. Those in host memory must not change until `done`.

    Attributes:
        done: set when no tensor of the state is needed any more.
        stall_seconds: seconds for which training waited.
    """

    def __init__(self, parts: Mapping[str, Any], buffers: Buffers) -> None:
        import torch

        self.done = threading.Event()
        self.stall_seconds = 0.0
        self._contents: dict[str, Any] = {}
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._sent: torch.cuda.Event | None = None
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
                self._contents[file][name] = buffer
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()

    def finish(self) -> dict[str, Any]:
        """Copy what is not yet; returns bytes of each JSON file, and tensors by name of the others."""
        try:
            for buffer, source in self._waiting:
                _copy(buffer, source)
            if self._sent is not None:
                self._sent.synchronize()
        finally:  # the writer reports an error; training must not wait for it
            self._waiting.clear()
            self.done.set()
        return self._contents


def _copy(buffer: torch.Tensor, source: torch.Tensor) -> None:
    """In this thread alone: torch would take all cores, which at this moment belong to training."""
    import numpy as np
    import torch

    if source.is_contiguous():
        np.copyto(buffer.reshape(-1).view(torch.uint8).numpy(), source.reshape(-1).view(torch.uint8).numpy())
    else:
        buffer.copy_(source)
