"""What a checkpoint of the reference job holds besides the state of the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.errors import ConfigError

if TYPE_CHECKING:
    from training.bert.config import TrainConfig
    from training.bert.tokens import Encoded
    from training.loop.steps import Step, Steps


class Record:
    """The evaluations of a run, and the options and data that must not change within it.

    Args:
        config: as it was asked for; its global batch is 0 for any.

    Attributes:
        evaluations: all of them, oldest first.
        best: step, score and values of the best one; None before the first.
    """

    def __init__(self, config: TrainConfig, data: Encoded, steps: Steps) -> None:
        self._config, self._data, self._steps = config, data, steps
        self.evaluations: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    def add(self, step: Step, evaluation: dict[str, Any]) -> float:
        """Add the evaluation after `step` and return its score, the first value of the metric."""
        score: float = next(iter(evaluation.values()))
        self.evaluations.append(evaluation)
        if self.best is None or score >= self.best["score"]:
            self.best = {"step": step.number, "score": score, **evaluation}
        return score

    def result(self) -> dict[str, Any]:
        """The last evaluation, with the number of steps and epochs and the best one."""
        steps = self._steps
        last = self.evaluations[-1] if self.evaluations else {}
        return {**last, "steps": steps.number, "epochs": steps.number / steps.per_epoch, "best": self.best}

    def state_dict(self) -> dict[str, Any]:
        """Return the state, the same on all ranks."""
        return {
            "data": self._data.fingerprint, "samples": len(self._data), "length_buckets": self._config.length_buckets,
            "seed": self._config.seed, "global_batch": self._steps.global_batch,
            "evaluations": self.evaluations, "best": self.best,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the evaluations. Raises ConfigError if data, order, seed or global batch (0: any) differ."""
        config = self._config
        if state["length_buckets"] != config.length_buckets:
            raise ConfigError(
                "--length-buckets cannot be changed within a run, because it changes the order of the data; "
                "give it as before, or start a new run with another name"
            )
        if (state["data"], state["samples"]) != (self._data.fingerprint, len(self._data)):
            raise ConfigError(
                f"the training data have changed since this run began ({state['samples']} samples then, "
                f"{len(self._data)} now); put the old data back, or start a new run with another name"
            )
        if state["seed"] != config.seed:
            raise ConfigError(
                f"--seed is {config.seed}, but this run began with --seed {state['seed']}; "
                "give that one, or start a new run with another name"
            )
        if config.global_batch not in (0, state["global_batch"]):
            raise ConfigError(
                f"--global-batch is {config.global_batch}, but this run began with {state['global_batch']}, on which the "
                "position in its data and its learning rate rest; give that one, or start a new run with another name"
            )
        self.evaluations, self.best = state["evaluations"], state["best"]
