"""The metrics of GLUE as a module for `evaluate.load(path, task)`, without the Hub.

The numbers are those of https://github.com/huggingface/evaluate/blob/main/metrics/glue/glue.py.
"""

import datasets
import evaluate
import numpy as np

from training.data.metrics import accuracy, accuracy_and_f1, pearson_and_spearman

TASKS = {
    "mrpc": accuracy_and_f1,
    "qqp": accuracy_and_f1,
    "stsb": lambda predictions, references: {
        name: value for name, value in pearson_and_spearman(predictions, references).items() if name != "mse"
    },
    **dict.fromkeys(["sst2", "mnli", "mnli_mismatched", "mnli_matched", "qnli", "rte", "wnli", "hans"], accuracy),
}


class Glue(evaluate.Metric):  # type: ignore[misc]
    """`compute(predictions=..., references=...)` -> name -> value; configuration: a task of GLUE."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in TASKS:
            raise KeyError(f"the task is none of {', '.join(TASKS)}")
        kind = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description="GLUE",
            citation="",
            inputs_description="predictions and references, one number for each sample",
            features=datasets.Features({"predictions": kind, "references": kind}),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return TASKS[self.config_name](np.asarray(predictions, float), np.asarray(references, float))
