"""Find the definition of a metric: in this package, a user's function, or `evaluate`."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.metrics import Metric, metric_for
from training.errors import ConfigError
from training.flags.fields import check_function, find_function

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

GLUE = Path(__file__).parents[1] / "corpus" / "glue.py"  # GLUE's definitions as a module for evaluate.load
LOAD_SECONDS = 60.0  # how long an evaluation waits for a definition that is being loaded


def check_metric(name: str) -> None:
    """Check the name of a metric without loading it.

    Raises:
        ConfigError: there is no such function or file.
    """
    if ":" in name:
        check_function("--metric", name)
    if name.endswith(".py") and not Path(name).expanduser().is_file():
        raise ConfigError(f"--metric {name}: there is no such file")


def find_metric(name: str, num_labels: int, dataset: str) -> Metric:
    """Return the metric `name` of --metric.

    "" is the metric of GLUE: from the Hub if the dataset is on the Hub and the Hub can be reached, else the equal one of this
    package. `package.module:function` is a function of (predictions, references) that returns a dict. The path of a .py
    file or another name is loaded by `evaluate`; this takes seconds, so a thread does it during training, and the first
    evaluation waits for it.
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
    """A metric of `evaluate` that a thread loads; a call waits for it up to LOAD_SECONDS.

    If it cannot be loaded, a call uses the `fallback`, or raises ConfigError without one.
    """

    def __init__(self, source: str, config: str | None, fallback: Metric | None) -> None:
        self._source, self._config, self._fallback = source, config, fallback
        self._metric: Any = None
        self._error: Exception | None = None
        # A daemon, so that a Hub that does not answer does not delay the exit of a finished run.
        self._thread = threading.Thread(target=self._load, name="metric", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            # Imported late, because the import takes seconds and most runs do not need it.
            evaluate = importlib.import_module("evaluate")
            config = {} if self._config is None else {"config_name": self._config}
            self._metric = evaluate.load(self._source, keep_in_memory=True, **config)
        except Exception as error:  # such as no network, no such metric, or a missing package
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
