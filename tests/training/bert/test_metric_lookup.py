from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from training.bert.metric_lookup import GLUE, Loading, find_metric
from training.data.metrics import accuracy_and_f1
from training.errors import ConfigError

PREDICTIONS = np.array([1, 0, 1, 1, 0, 1], dtype=np.float64)
REFERENCES = np.array([1, 0, 0, 1, 1, 1], dtype=np.float64)
EXPECTED = {"accuracy": 4 / 6, "f1": 0.75}


def half(predictions: object, references: object) -> dict[str, float]:
    return {"half": 0.5}


def test_without_a_name_the_task_decides() -> None:
    assert find_metric("", 2, "pairs") is accuracy_and_f1
    assert accuracy_and_f1(PREDICTIONS, REFERENCES) == EXPECTED


def test_a_function_of_the_user() -> None:
    metric = find_metric(f"{__name__}:half", 2, "pairs")
    assert metric(PREDICTIONS, REFERENCES) == {"half": 0.5}
    with pytest.raises(ConfigError, match="cannot be loaded"):
        find_metric(f"{__name__}:third", 2, "pairs")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of evaluate and its imports
def test_evaluate_gives_the_same_numbers(tmp_path: Path) -> None:
    assert Loading(str(GLUE), "mrpc", None)(PREDICTIONS, REFERENCES) == EXPECTED
    with pytest.raises(ConfigError, match=r"cannot be loaded by evaluate .*the task is none of mrpc"):
        Loading(str(GLUE), "nonsense", None)(PREDICTIONS, REFERENCES)
    # Without a network, the definition of this package replaces that of the Hub.
    assert find_metric("", 2, "glue/mrpc")(PREDICTIONS, REFERENCES) == EXPECTED
