"""Where a metric's definition comes from: this package, a user's function, or `evaluate`."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.metrics import Metric, metric_for
from training.errors import ConfigError
from training.flags import check_function, find_function

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

GLUE = Path(__file__).parents[1] / "corpus" / "glue.py"  # GLUE's definitions as a module for evaluate.load
LOAD_SECONDS = 60.0  # how long an evaluation waits for a definition that is still on its way


def check_metric(name: str) -> None:
    """Raise ConfigError where a metric's name cannot be right; loads nothing."""
    if ":" in name:
        check_function("--metric", name)
    if name.endswith(".py") and not Path(name).expanduser().is_file():
        raise ConfigError(f"--metric {name}: there is no such file")


def find_metric(name: str, num_labels: int, dataset: str) -> Metric:
    """The metric `name`, as --metric gives it.

    "" is GLUE's definition: from the Hub, where the data set comes from there and it can be reached, else this package's,
    which is the same. `package.module:function` is any function of (predictions, references) that returns a dict; a path
    of a .py file or another name is loaded by `evaluate`. That takes seconds, so it happens in a thread while training
    goes on; the first evaluation waits for it.
    """
    if ":" in name:
        found: Metric = find_function("--metric", name)
        return found
    if name:
        return Loading(str(Path(name).expanduser().resolve()) if name.endswith(".py") else name, None, None)
    own = metric_for(num_labels)
    if dataset.startswith(("glue/", "nyu-mll/glue/")):
        return Loading("glue", dataset.rpartition("/")[2], own)
    return own


class Loading:
    """A metric of `evaluate` on its way. Called before it has come, it waits.

    Where it does not come: the `fallback` if there is one, else ConfigError.
    """

    def __init__(self, source: str, config: str | None, fallback: Metric | None) -> None:
        self._source, self._config, self._fallback = source, config, fallback
        self._metric: Any = None
        self._error: Exception | None = None
        # A daemon, because a Hub that does not answer must not keep a finished run from ending.
        self._thread = threading.Thread(target=self._load, name="metric", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            # By name and not by an import statement: it takes seconds, and most runs never need it.
            evaluate = importlib.import_module("evaluate")
            config = {} if self._config is None else {"config_name": self._config}
            self._metric = evaluate.load(self._source, keep_in_memory=True, **config)
        except Exception as error:  # no network, no such metric, a package it needs is missing
            self._error = error

    def __call__(self, predictions: npt.NDArray[np.float64], references: npt.NDArray[np.float64]) -> dict[str, float]:
        self._thread.join(LOAD_SECONDS)
        if self._metric is not None:
            values = self._metric.compute(predictions=predictions, references=references)
            return {name: float(value) for name, value in values.items()}
        if self._fallback is not None:
            return self._fallback(predictions, references)
        raise ConfigError(
            f"--metric {self._source} cannot be loaded by evaluate ({self._error or 'it takes too long'}); "
            "give package.module:function, a path of a metric's .py file, or leave it out"
        ) from self._error
