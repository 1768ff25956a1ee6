"""A process that saves checkpoints, and is killed or gets an error at a chosen file operation."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from training.checkpoints.store import PATIENCE, Checkpoint, Checkpoints, Part

CHANGING = ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink")


def parts(step: int, size: int = 40) -> dict[str, Any]:
    """The parts of a checkpoint, which depend on the step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model.safetensors": {
            "weight": torch.randn(size, 3, generator=generator),
            "half": torch.randn(5, generator=generator).to(torch.bfloat16),
            "count": torch.tensor(step),
            "none": torch.zeros(0, 4),
        },
        "state.json": {"step": step, "text": "ünïcode", "list": [1, None, 2.5]},
    }


def shards(step: int, rank: int) -> dict[str, Any]:
    """The part of `rank`, one of two, of a checkpoint."""
    weight = torch.arange(6.0).reshape(3, 2) + 100 * step + 10 * rank
    mine: dict[str, Any] = {f"model.rank{rank:05d}.safetensors": {"weight": weight}}
    return mine if rank else {**mine, "state.json": {"step": step}}


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        all(torch.equal(left[name][key], right[name][key]) for key in right[name])
        if name.endswith(".safetensors")
        else left[name] == right[name]
        for name in right
    )


def save_with_a_fault(
    folder: Path,
    when: int,
    *,
    kill: bool,
    part: Part = (0, 1),
    steps: tuple[int, ...] = (1, 2, 3),
    patience: float = PATIENCE,
) -> tuple[int, list[int]]:
    """Save `steps`, keeping one; at the `when`-th change of a file this process is killed, or gets an error.

    Returns the number of changes and the committed steps. The first commit also creates a file beside `folder`, to be
    checked after a kill.
    """
    count = 0

    def fault() -> None:
        nonlocal count
        count += 1
        if count == when:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")

    def guarded(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            fault()
            return function(*args, **kwargs)

        return call

    class Guarded:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> None:
            self.file.write(data[: len(data) // 2])  # so that a kill leaves an incomplete file
            self.file.flush()
            fault()
            self.file.write(data[len(data) // 2 :])

        def __enter__(self) -> Guarded:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    opened = Path.open
    replaced = {name: getattr(os, name) for name in CHANGING}
    saved: list[int] = []
    store = Checkpoints(folder, keep=1)
    store.patience = patience

    def note(checkpoint: Checkpoint) -> None:
        saved.append(checkpoint.step)
        os.close(os.open(folder.with_suffix(".committed"), os.O_CREAT))

    store.on_saved = note
    try:
        for name, function in replaced.items():
            setattr(os, name, guarded(function))
        Path.open = lambda self, mode="r", *args, **kwargs: (  # type: ignore[method-assign,assignment]
            Guarded(opened(self, mode, *args, **kwargs)) if "w" in mode else opened(self, mode, *args, **kwargs)
        )
        for step in steps:
            store.save(step, shards(step, part[0]) if part[1] > 1 else parts(step), wait=True, part=part)
    finally:
        Path.open = opened  # type: ignore[method-assign]
        for name, function in replaced.items():
            setattr(os, name, function)
    store.close()
    return count, saved
