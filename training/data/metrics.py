"""Compute metrics over all ranks exactly: each sample counts once, and the number of samples is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# (predictions, references), float64 arrays of shape (samples,) in the order of the ids -> name -> value
Metric = Callable[["npt.NDArray[np.float64]", "npt.NDArray[np.float64]"], dict[str, float]]


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the batches of an evaluation: samples sorted by length, which reduces padding.

    The batches are independent of the number of ranks; each rank evaluates whole batches in turn. The padding of a
    sample, and so its prediction to the bit, is therefore the same for any number of ranks.
    """
    ordered = sorted(range(len(lengths)), key=lambda sample: (lengths[sample], sample))
    return [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]


def check_each_once(ids: npt.NDArray[np.int64], size: int) -> None:
    """Raise RuntimeError unless the sorted `ids` are those of range(size), each once."""
    import numpy as np

    if not np.array_equal(ids, np.arange(size)):
        seen = np.bincount(ids, minlength=size)
        raise RuntimeError(
            f"the evaluation must see each of {size} samples once: {int((seen[:size] == 0).sum())} are missing, "
            f"{int((seen > 1).sum())} came more than once, {int(seen[size:].sum())} do not exist"
        )


def accuracy_and_f1(predictions: npt.NDArray[np.float64], references: npt.NDArray[np.float64]) -> dict[str, float]:
    """GLUE's metric of mrpc and qqp: accuracy, and F1 of class 1 (0 if no sample has or gets class 1)."""
    right = int((predictions == references).sum())
    positive = int(((predictions == 1) & (references == 1)).sum())
    claimed, true = int((predictions == 1).sum()), int((references == 1).sum())
    return {
        "accuracy": right / len(references),
        "f1": 2 * positive / (claimed + true) if claimed + true else 0.0,
    }


def accuracy(predictions: npt.NDArray[np.float64], references: npt.NDArray[np.float64]) -> dict[str, float]:
    """The share of correct predictions, for any number of classes."""
    return {"accuracy": int((predictions == references).sum()) / len(references)}


def pearson_and_spearman(predictions: npt.NDArray[np.float64], references: npt.NDArray[np.float64]) -> dict[str, float]:
    """GLUE's metric of stsb, a regression: both correlations (0 if one input is constant) and the mean squared error."""
    import numpy as np

    return {
        "pearson": _correlation(predictions, references),
        "spearmanr": _correlation(_ranks(predictions), _ranks(references)),
        "mse": float(np.mean((predictions - references) ** 2)),
    }


def _correlation(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    import numpy as np

    left, right = left - left.mean(), right - right.mean()
    scale = float(np.sqrt((left**2).sum() * (right**2).sum()))
    return float((left * right).sum()) / scale if scale else 0.0


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 1; equal values share their mean rank."""
    import numpy as np

    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts).astype(np.float64)
    shared: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return shared


def metric_for(num_labels: int) -> Metric:
    """Return the metric of a task: accuracy and F1 for 2 classes, accuracy for more, correlations for regression (1)."""
    return {1: pearson_and_spearman, 2: accuracy_and_f1}.get(num_labels, accuracy)
