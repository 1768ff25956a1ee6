"""Evaluate a user's function over all ranks: every sample once, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from training.data.fetch import Fetch, check_map_style, to_device
from training.data.metrics import check_each_once, evaluation_batches
from training.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from training.loop.rank import Rank
    from training.loop.setup import Models

    Columns = list[npt.NDArray[np.generic]]


def evaluate(
    rank: Rank,
    models: Models,
    predict: Callable[[Any], Any],
    data: Any,
    metric: Callable[..., Any],
    *,
    collate: Callable[[list[Any]], Any] | None,
    batch_size: int,
    lengths: Sequence[int] | None,
) -> dict[str, Any]:
    """See `Context.evaluate`."""
    if batch_size < 1:
        raise ConfigError(f"ctx.evaluate: batch_size={batch_size} must be 1 or more")
    size = check_map_style(data, "ctx.evaluate", lengths)
    world = rank.world
    fetch = Fetch(data, collate)
    # Batches do not depend on the number of ranks, and so neither does a prediction that depends on its batch.
    batches = [tuple(batch) for batch in evaluation_batches(lengths or [0] * size, batch_size)]
    local = batches[world.rank :: world.world_size]
    ids: list[int] = []
    made: list[Columns] = []
    with rank.phase("evaluating"):
        with models.evaluating():
            for batch in local:
                made.append(_columns(predict(to_device(fetch[0, batch], rank.device)), len(batch)))
                ids += batch
                rank.runtime.submit()
                rank.heartbeat.beat()
            if models.sharded and len(local) < -(-len(batches) // world.world_size):
                predict(to_device(fetch[0, batches[0]], rank.device))  # takes part in gathering the parameters
        everything = rank.group.collect((ids, made))  # only rank 0 needs the memory
        return measure(metric, size, everything, rank)


def measure(metric: Callable[..., Any], size: int, everything: list[Any], rank: Rank) -> dict[str, Any]:
    """The metric of the predictions of all ranks, computed by rank 0. A collective."""
    import numpy as np

    result: dict[str, Any] = {}
    problem: Exception | None = None
    if rank.world.rank == 0:
        ids = np.array([sample for ids, _ in everything for sample in ids], dtype=np.int64)
        order = np.argsort(ids, kind="stable")
        try:
            check_each_once(ids[order], size)
            value = metric(*_columns_in_order(order, [columns for _, made in everything for columns in made]))
            named = value if isinstance(value, Mapping) else {getattr(metric, "__name__", "metric"): value}
            result = {**{str(name): _number(each) for name, each in named.items()}, "samples": size}
        except Exception as error:
            problem = error
    text = f"{type(problem).__name__}: {problem}" if problem else ""
    result, text = rank.group.broadcast((result, text))
    if problem is not None:
        raise problem
    if text:
        raise RuntimeError(f"the metric failed on rank 0: {text}")
    return result


def _columns(predictions: Any, count: int) -> Columns:
    """What `predict` has returned for `count` samples as arrays of shape (count, ...), one for each item of a tuple."""
    import numpy as np
    import torch

    columns = []
    for each in predictions if isinstance(predictions, tuple) else (predictions,):
        if isinstance(each, torch.Tensor):
            wide = each.detach().float() if each.dtype == torch.bfloat16 else each.detach()
            column = wide.cpu().numpy()
        elif isinstance(each, list):
            column = _array(each)
        else:
            column = np.asarray(each)
        if column.ndim == 0 and count == 1:
            column = column.reshape(1)
        if column.ndim == 0 or len(column) != count:
            raise ConfigError(
                f"predict was given {count} samples and returned {type(each).__name__} of shape {column.shape}; it must"
                " return a row for each sample: a tensor, an array or a list, or a tuple of these"
            )
        columns.append(column)
    return columns


def _array(items: list[Any]) -> npt.NDArray[Any]:
    """A list as an array; of objects, if its items differ in shape or are no numbers."""
    import numpy as np

    try:
        plain = np.array([each.tolist() if hasattr(each, "tolist") else each for each in items])
    except ValueError:  # items of different lengths
        plain = None
    if plain is not None and plain.dtype.kind in "biufc":
        return plain
    return _objects(items)


def _objects(items: list[Any]) -> npt.NDArray[Any]:
    import numpy as np

    objects = np.empty(len(items), dtype=object)
    for number, item in enumerate(items):  # a slice would take items of the same length apart
        objects[number] = item
    return objects


def _columns_in_order(order: npt.NDArray[np.int64], made: list[Columns]) -> Columns:
    """The arrays of all batches together, in the order of the samples; of objects, if their rows differ in shape."""
    import numpy as np

    together = []
    for pieces in zip(*made, strict=True):
        same = len({piece.shape[1:] for piece in pieces}) == 1
        column = np.concatenate(pieces) if same else _objects([row for piece in pieces for row in piece])
        together.append(column[order])
    return together


def _number(value: Any) -> Any:
    return value.tolist() if callable(getattr(value, "tolist", None)) else value
