"""Make the batches of map-style datasets, in this process or in workers, and move them to the device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from training.distributed.random_state import isolated
from training.errors import ConfigError

if TYPE_CHECKING:
    import torch

Key = tuple[int, tuple[int, ...]]
"""The seed of a batch, and the ids of its samples."""


class Fetch:
    """Make the batch of a key: its samples `data[id]`, collated.

    Random numbers that the dataset or `collate` draw from the generators of Python, numpy or torch depend on the seed of
    the key alone, and the generators are afterwards as before. So a batch is the same in a resumed run.
    """

    def __init__(self, data: Any, collate: Callable[[list[Any]], Any] | None) -> None:
        self._data, self._collate = data, collate

    def __getitem__(self, key: Key) -> Any:
        from torch.utils.data import default_collate

        seed, ids = key
        with isolated(seed):
            many = getattr(self._data, "__getitems__", None)
            samples = list(many(list(ids))) if many is not None else [self._data[each] for each in ids]
            return (self._collate or default_collate)(samples)


def batches(fetch: Fetch, keys: Iterable[Key], workers: int, *, pin: bool) -> Generator[Any]:
    """The batch of each key, in order; made by `workers` processes ahead of their use, or here if there are none."""
    if not workers:
        for key in keys:
            yield fetch[key]
        return
    import torch
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(
        fetch,  # type: ignore[arg-type]  # it needs no length: the sampler gives its keys
        batch_size=None,
        sampler=keys,
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # its own: the default would draw from the generator of the training
    )
    with closing(_Closing(iter(loader))) as made:
        yield from made.items


class _Closing:
    """The iterator of a loader; `close` ends its workers."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def close(self) -> None:
        shut = getattr(self.items, "_shutdown_workers", None)
        if shut is not None:
            shut()


def _as_it_is(batch: Any) -> Any:
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors on `device`, also those inside of mappings, lists, tuples and things with a method `to`."""
    import torch

    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def check_map_style(data: Any, where: str) -> int:
    """Return the number of samples of `data`. Raises ConfigError unless it has a length and samples by number."""
    try:
        size = len(data)
    except TypeError:
        size = -1
    if size < 0 or not hasattr(data, "__getitem__") or isinstance(data, Mapping | str):
        raise ConfigError(
            f"{where} needs a dataset with len(data) and data[number], and {type(data).__name__} is none. A stream has no"
            " order that could be continued at a sample: put its samples into a list, or iterate over a loader that keeps"
            " its own position (torchdata.stateful_dataloader.StatefulDataLoader), give it to ctx.state(loader=loader, ...)"
            " and count the steps from state.restore()"
        )
    if size == 0:
        raise ConfigError(f"{where}: the dataset is empty")
    return size
