"""The errors of this package.

ValueError
└── ConfigError        the user asked for something that cannot be; the message says what to type instead
RuntimeError
├── CheckpointError    a checkpoint cannot be written, found, verified or used
├── DeviceError        the accelerator that the rank was promised is not there, or cannot be used
└── ReplicaError       ranks that should hold the same weights do not
"""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """What the user got wrong: what it was, what is allowed, and what to type instead. Never worth a retry."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found, verified or used; the message names the file."""


class DeviceError(RuntimeError):
    """The accelerator of this rank is not there or cannot be used; the message says why. Another node may have one."""


class ReplicaError(RuntimeError):
    """Ranks that should hold the same weights hold different ones. Never worth a retry."""


def nearest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The names in `known` that are spelt most like `name`, at most `most`, the nearest first."""
    import difflib

    return difflib.get_close_matches(name[:200], list(known), n=most)  # the comparison is quadratic in the length


def did_you_mean(name: str, known: Iterable[str], text: str = "; did you mean {}?") -> str:
    """`text` with the nearest of `known` in it, or nothing when none is near."""
    return "".join(text.format(near) for near in nearest(name, known))
