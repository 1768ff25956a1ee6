"""Compute the order of samples: which sample goes to which rank at which step.

The order of an epoch is a function of (seed, epoch), so a checkpoint holds only `Position(seed, epoch, position)`, with the
number of samples of the epoch already used. One optimizer step takes the next `global_batch` samples of the order; rank r
takes the r-th share of them, in microbatches of at most `batch_size`. The number of ranks therefore changes neither the
order nor the samples of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WINDOW = 50  # global batches that are sorted by length together


@dataclass(frozen=True)
class Position:
    """Position in the data: `position` samples of epoch `epoch` are used."""

    seed: int
    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Step:
    """The microbatches of one rank in one optimizer step.

    All ranks have the same number of `microbatches`. An empty one (the last step of an epoch may have fewer samples than
    ranks) is run on `padding_sample` with weight 0, because all ranks must take part in the collectives.
    """

    microbatches: tuple[tuple[int, ...], ...]
    samples: int  # of the step, over all ranks
    padding_sample: int
    after: Position

    def weight(self, microbatch: Sequence[int], world_size: int) -> float:
        """Factor of a microbatch's mean loss, so that averaging over ranks gives the mean over samples."""
        return len(microbatch) * world_size / self.samples


def shuffle(size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A reproducible permutation of range(size): indices sorted by a hash of (seed, epoch, index).

    The hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014), independent of a library's random generator.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed % 2**64)) + np.uint64(epoch % 2**64))
        hashes = _mix(np.arange(size, dtype=np.uint64) ^ key)
    return np.argsort(hashes, kind="stable")


def _mix(value: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    import numpy as np

    state = np.asarray(value, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def order(
    size: int, seed: int, epoch: int, *, global_batch: int = 1, lengths: Sequence[int] | None = None
) -> npt.NDArray[np.int64]:
    """The order of the samples of one epoch, a permutation of range(size).

    With `lengths` (tokens of each sample), samples of similar length share a batch: the shuffled order is cut into
    windows of WINDOW global batches, each window is sorted by length, cut into batches, and these are shuffled again.
    """
    import numpy as np

    shuffled = shuffle(size, seed, epoch)
    if lengths is None:
        return shuffled
    sizes = np.asarray(lengths)
    batches: list[npt.NDArray[np.int64]] = []
    for start in range(0, size, WINDOW * global_batch):
        window = shuffled[start : start + WINDOW * global_batch]
        window = window[np.argsort(sizes[window], kind="stable")]
        batches += [window[at : at + global_batch] for at in range(0, len(window), global_batch)]
    full = [batch for batch in batches if len(batch) == global_batch]
    rest = [batch for batch in batches if len(batch) < global_batch]  # at most one; it remains last, as without lengths
    mixed = [full[at] for at in shuffle(len(full), seed ^ 0x5EED, epoch)]
    return np.concatenate(mixed + rest) if batches else shuffled


def steps(
    size: int,
    start: Position,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    global_batch: int,
    lengths: Sequence[int] | None = None,
) -> Iterator[Step]:
    """The steps of `rank` from `start` to the end of the epoch; the last step may be smaller.

    Raises:
        ConfigError: a batch size is less than 1, or `start` is past the end of the epoch.
    """
    if batch_size < 1 or global_batch < 1:
        raise ConfigError(f"batch size {batch_size} and global batch {global_batch} must be 1 or more")
    if not 0 <= start.position <= size:
        raise ConfigError(
            f"position {start.position} lies outside an epoch of {size} samples: the data set has changed"
        )
    samples = order(size, start.seed, start.epoch, global_batch=global_batch, lengths=lengths)
    for at in range(start.position, size, global_batch):
        batch = samples[at : at + global_batch].tolist()
        share = -(-len(batch) // world_size)  # samples of the rank with the most
        # Strided, so that shares differ by one sample at most and long samples of a sorted batch are spread.
        local = batch[rank::world_size]
        microbatches = tuple(tuple(local[cut : cut + batch_size]) for cut in range(0, share, batch_size))
        used = at + len(batch)
        after = Position(start.seed, start.epoch, used) if used < size else Position(start.seed, start.epoch + 1)
        yield Step(microbatches, len(batch), batch[0], after)


def steps_per_epoch(size: int, global_batch: int) -> int:
    """The number of optimizer steps in an epoch of `size` samples."""
    return -(-size // global_batch)
