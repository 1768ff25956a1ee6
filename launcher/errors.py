"""The errors of the submitting side.

::

    LaunchError
    +-- BadRequest (also a ValueError)   what was asked cannot be done; nothing was sent          exit status 2
    +-- RunFailed                        the run ended without reaching its goal                  exit status 1
    +-- RunStopped                       the run stopped before its end and can be resumed        exit status 3

A target raises what it likes; what it raised travels as text in ``errors/<attempt>/<rank>.json`` and comes back as
:class:`RunFailed`. A target that finds its *input* wrong raises :class:`training.errors.ConfigError`, which ends the
run as a bad request.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LaunchError(Exception):
    """The root of everything that this package raises on purpose."""


class BadRequest(LaunchError, ValueError):
    """What was asked cannot be done. The text says what was wrong, what is allowed and what to type instead."""


class RunFailed(LaunchError):
    """The run failed; the text begins with the exception of the rank that raised first."""


class RunStopped(LaunchError):
    """The run was stopped before its end; ``launch resume`` takes it up again."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
