"""The errors of this package.

ValueError
└── ConfigError        wrong input of the user; the message says what to type instead
RuntimeError
├── CheckpointError    a checkpoint cannot be written, found, verified or used
├── DeviceError        the accelerator assigned to the rank is missing or cannot be used
└── ReplicaError       ranks that should hold the same weights do not
"""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """Wrong input of the user. The message names the value, the limit and what to type instead. Not worth a retry."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found, verified or used; the message names the file."""


class DeviceError(RuntimeError):
    """The accelerator of this rank is missing or cannot be used; the message names the cause. Another node may work."""


class ReplicaError(RuntimeError):
    """Ranks that should hold the same weights hold different ones. Not worth a retry."""


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Return up to `most` names of `known` that are spelt like `name`, the nearest first."""
    import difflib

    return difflib.get_close_matches(name[:200], list(known), n=most)  # the comparison is quadratic in the length


def did_you_mean(name: str, known: Iterable[str], text: str = "; did you mean {}?") -> str:
    """Return `text` with the nearest name of `known` in it; an empty string if none is near."""
    return "".join(text.format(near) for near in nearest(name, known))
