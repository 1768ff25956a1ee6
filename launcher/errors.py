"""The errors of the submitting side.

::

    Exception
    +-- LaunchError
    |   +-- BadRequest (also a ValueError)   what was asked cannot be done; nothing was sent          exit status 2
    |   +-- RunFailed                        the run ended without reaching its goal                  exit status 1
    |   +-- RunStopped                       the run stopped before its end and can be resumed        exit status 3
    +-- ValueError
    |   +-- training.errors.ConfigError      the input of a target is wrong                           exit status 2
    +-- RuntimeError
        +-- training.errors.CheckpointError  a checkpoint cannot be written, found or used            exit status 1

`exit_status` holds this table; the command reports each of them in one line, without a traceback.

A target raises what it likes; what it raised travels as text in ``errors/<attempt>/<rank>.json`` and comes back as
:class:`RunFailed`. A target that finds its *input* wrong raises :class:`training.errors.ConfigError`, which ends the
run as a bad request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from training.errors import CheckpointError, ConfigError, did_you_mean


class LaunchError(Exception):
    """The root of everything that this package raises on purpose."""


class BadRequest(LaunchError, ValueError):
    """What was asked cannot be done. The text says what was wrong, what is allowed and what to type instead."""

    def __init__(self, text: object = "") -> None:
        super().__init__(shortened(str(text)))


def shortened(text: str) -> str:
    """Return `text` with words of 500 characters and more cut in the middle."""
    return re.sub(r"\S{500,}", lambda long: f"{long[0][:100]}...{long[0][-50:]}", text)


class RunFailed(LaunchError):
    """The run failed; the text begins with the exception of the rank that raised first."""


class RunStopped(LaunchError):
    """The run was stopped before its end; ``launch resume`` takes it up again."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of `known`, or an empty string."""
    return did_you_mean(word, known, " (did you mean {!r}?)")


OURS = (LaunchError, ConfigError, CheckpointError)
"""Errors that are raised on purpose: reported in one line, without a traceback."""


def exit_status(error: BaseException) -> int:
    """The exit status of ``launch`` where `error`, which is one of `OURS`, ends it."""
    if isinstance(error, BadRequest | ConfigError):
        return 2
    return 3 if isinstance(error, RunStopped) else 1
