"""The errors of this package.

ValueError
└── ConfigError        the user asked for something that cannot be; the message says what to type instead
RuntimeError
└── CheckpointError    a checkpoint cannot be written, found, verified or used
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """What the user got wrong: what it was, what is allowed, and what to type instead. Never worth a retry."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found, verified or used; the message names the file."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean X?"` for the nearest of `known`, or nothing when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
