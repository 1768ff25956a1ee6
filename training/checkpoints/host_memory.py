"""Host memory for the copies of states, in chunks that every save of a run uses again."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK = 2**26
"""Bytes of a chunk, a power of two."""

LEAST_CHUNK = 2**12
KEPT = 4
"""States whose memory is kept."""

ALIGNMENT = 64  # bytes, a cache line


@dataclass(frozen=True)
class HostTensor:
    """A tensor in host memory, as `pieces` of its bytes in order, each 1-D and uint8."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[torch.Tensor]

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The tensor itself, if it is one piece."""
        return self.pieces[0].view(self.dtype).view(self.shape)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> HostTensor:
        """Wrap a tensor of the host; one piece."""
        return cls(tensor.dtype, tuple(tensor.shape), [bytes_of(tensor)])


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of `tensor` in row-major order, 1-D and uint8; a view if it is contiguous."""
    import torch

    flat = tensor.reshape(-1)
    if not flat.is_contiguous():  # a tensor of one dimension with a stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def paired(pieces: Iterable[torch.Tensor], tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return each of `pieces` with the bytes of `tensor` that belong there."""
    flat, offset = bytes_of(tensor), 0
    for piece in pieces:
        yield piece, flat.narrow(0, offset, piece.numel())
        offset += piece.numel()


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage in the block: with thousands of new objects, a collection of all would take longer than the rest."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class HostMemory:
    """Host memory of one kind: page-locked (`pinned`), or not.

    torch takes a power of two from the driver for each page-locked tensor, up to twice its size, and keeps it. Chunks have
    such sizes and are filled one after the other, so that at most one chunk more than the largest state is taken. They
    are kept, because new pages take longer than the copy itself; those that the last `KEPT` states did not need are given back.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._chunks: list[torch.Tensor] = []
        self._chunk = self._offset = 0
        self._needed: deque[int] = deque(maxlen=KEPT)

    def reserve(self, sizes: Iterable[int]) -> None:
        """Have memory for tensors of so many bytes, taken from the beginning: what was taken before is used again."""
        import torch

        self._chunk = self._offset = 0
        self._needed.append(sum(map(_aligned, sizes)))
        self._give_back()
        missing = self._needed[-1] - self.nbytes
        while missing > 0:
            size = min(CHUNK, max(LEAST_CHUNK, 1 << (missing - 1).bit_length()))
            self._chunks.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))
            missing -= size

    def reserve_again(self) -> None:
        """Note that another save has the sizes of the last one, and so the same memory."""
        self._needed.append(self._needed[-1])
        self._give_back()

    def _give_back(self) -> None:
        while self._chunks and self.nbytes - self._chunks[-1].numel() >= max(self._needed):
            self._chunks.pop()

    @property
    def nbytes(self) -> int:
        """The memory that is taken, in bytes."""
        return sum(chunk.numel() for chunk in self._chunks)

    def take(self, size: int) -> list[torch.Tensor]:
        """Return the next `size` bytes, 1-D and uint8, out of what was reserved; several pieces at the end of a chunk."""
        pieces = []
        left, padding = size, _aligned(size) - size
        while left:
            chunk = self._chunks[self._chunk]
            if self._offset == chunk.numel():
                self._chunk, self._offset = self._chunk + 1, 0
                continue
            length = min(left, chunk.numel() - self._offset)
            pieces.append(chunk.narrow(0, self._offset, length))
            self._offset += length
            left -= length
        self._offset += padding  # chunks are aligned, so it lies in the same one
        return pieces


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
