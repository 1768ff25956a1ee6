"""TensorBoard and the other trackers of accelerate, started at the first record."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.distributed.group import environment
from training.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.context import Context


def check_trackers(names: tuple[str, ...]) -> None:
    """Check that accelerate supports each tracker and that its package is installed.

    Raises:
        ConfigError: one is unknown, or its package is missing.
    """
    if set(names) <= {"tensorboard"} and importlib.util.find_spec("tensorboard"):
        return  # the default; importing accelerate takes seconds
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = list(LOGGER_TYPE_TO_CLASS), [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--log-with {name}: no such tracker{did_you_mean(name, known)}; known are {', '.join(known)}"
            )
        if name not in installed:
            raise ConfigError(f"--log-with {name} needs a package: pip install {name}, or give --log-with=")


def make_accelerator(ctx: Context) -> Accelerator:
    """Create an Accelerator that uses the device and the process group of `ctx`."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # for a second run in one process, as in a notebook
    GradientState._reset_state()
    _ = ctx.group  # created first, so that accelerate uses this process group
    facts: dict[str, str | None] = dict(ctx.world.environment())
    if ctx.world.world_size == 1:
        facts = dict.fromkeys(facts)
    facts["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # if unset, accelerate changes the number of threads
    facts["ACCELERATE_TORCH_DEVICE"] = str(ctx.device)
    facts["ACCELERATE_USE_CPU"] = str(ctx.world.device == "cpu").lower()
    with environment(facts):
        return Accelerator(cpu=ctx.world.device == "cpu", mixed_precision="no")


class Trackers:
    """The trackers of a run, on rank 0; without `names` nothing is recorded."""

    def __init__(self, accelerator: Accelerator, names: tuple[str, ...], run_dir: Path, settings: Mapping[str, Any]):
        self._accelerator = accelerator
        self._names = names
        self._run_dir = run_dir
        self._settings = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in settings.items()
        }
        self._started = False
        self._failed = False

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the numbers in `values`; a nested mapping is recorded as `name/key`."""
        if not self._names or self._failed:
            return
        flat = {
            (f"{name}/{key}" if key else name): number
            for name, value in values.items()
            for key, number in (value.items() if isinstance(value, Mapping) else [("", value)])
        }
        with self._outlived():
            if not self._started:
                self._started = True
                self._start(step)
            self._accelerator.log(flat, step=step)

    def close(self) -> None:
        """Flush and close the trackers."""
        if self._started:
            for tracker in self._accelerator.trackers:
                with self._outlived():
                    tracker.finish()
            self._accelerator.trackers = []
            self._started = False

    @contextmanager
    def _outlived(self) -> Iterator[None]:
        """Warn about an OSError and stop recording; `metrics.jsonl` also has the metrics."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                warnings.warn(f"the trackers record nothing more in this attempt: {error}", stacklevel=3)
            self._failed = True

    def _start(self, step: int) -> None:
        from accelerate.tracking import TensorBoardTracker

        self._accelerator.log_with = [name for name in self._names if name != "tensorboard"]
        self._accelerator.init_trackers(self._run_dir.name, config=self._settings)
        if "tensorboard" in self._names:
            # The steps that a resumed run repeats replace those recorded before.
            tracker = TensorBoardTracker("tensorboard", logging_dir=str(self._run_dir), purge_step=step)
            tracker.start()
            self._accelerator.trackers.append(tracker)
