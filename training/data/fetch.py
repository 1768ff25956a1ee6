"""Make the batches of map-style datasets, in this process or in workers, and move them to the device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

from training.data.prefetch import prefetch as in_thread
from training.distributed.random_state import isolated
from training.errors import ConfigError

if TYPE_CHECKING:
    import torch

Key = tuple[int, tuple[int, ...]]
"""The seed of a batch, and the ids of its samples."""


class Fetch:
    """Make the batch of a key: its samples `data[id]`, collated.

    Random numbers that the dataset or `collate` draw from the generators of Python, numpy or torch depend on the seed of
    the key alone, and the generators are afterwards as before. So a batch is the same in a resumed run. If it is not
    `seeded`, the generators are left alone, as a thread beside the training must.
    """

    def __init__(self, data: Any, collate: Callable[[list[Any]], Any] | None, *, seeded: bool = True) -> None:
        self._data, self._collate, self._seeded = data, collate, seeded

    def __getitem__(self, key: Key) -> Any:
        from torch.utils.data import default_collate

        seed, ids = key
        with isolated(seed) if self._seeded else nullcontext():
            many = getattr(self._data, "__getitems__", None)
            samples = list(many(list(ids))) if many is not None else [self._data[each] for each in ids]
            return (self._collate or default_collate)(samples)


def batches(fetch: Fetch, keys: Iterable[Key], workers: int, *, pin: bool, prefetch: bool = False) -> Generator[Any]:
    """The batch of each key, in order: made ahead of its use by `workers` processes or a thread, or else when it is due.

    What is made ahead is in pinned memory with `pin`.
    """
    if not workers:
        made_now = (fetch[key] for key in keys)
        if not prefetch:
            yield from made_now
            return
        with closing(in_thread(mapped(batch, _pinned) if pin else batch for batch in made_now)) as ready:
            yield from ready
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


def _pinned(item: Any) -> Any:
    return item.pin_memory() if callable(getattr(item, "pin_memory", None)) else None


def to_device(batch: Any, device: torch.device) -> Any:
    """`batch` with its tensors on `device`, also those inside of mappings, lists, tuples and things with a method `to`."""
    import torch

    def move(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item.to(device, non_blocking=True)
        return item.to(device) if callable(getattr(item, "to", None)) else None

    return mapped(batch, move)


def mapped(batch: Any, change: Callable[[Any], Any]) -> Any:
    """`batch` with each item that `change` has a result for replaced by it, also inside of mappings, lists and tuples."""
    changed = change(batch)
    if changed is not None:
        return changed
    if isinstance(batch, Mapping):
        items = {key: mapped(value, change) for key, value in batch.items()}
        return items if type(batch) is dict else type(batch)(items)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, change) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(mapped(value, change) for value in batch)
    return batch


def check_map_style(data: Any, where: str, lengths: Sequence[int] | None = None) -> int:
    """Return the number of samples of `data`.

    Raises ConfigError unless it has a length and samples by number, and each sample one of the `lengths`, if they are given.
    """
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
    if lengths is not None and len(lengths) != size:
        raise ConfigError(f"{where}: there are {len(lengths)} lengths, and {size} samples")
    return size
