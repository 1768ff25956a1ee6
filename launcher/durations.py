"""Durations as people and SLURM write them: the only parser."""

from __future__ import annotations

import re

from launcher.errors import BadRequest

MAX_DAYS = 3650

_SLURM = re.compile(r"(?:([0-9]{1,9})-)?([0-9]{1,9}):([0-5][0-9]):([0-5][0-9])")
_UNITS = re.compile(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?")


def seconds(text: str) -> int | None:
    """The seconds of ``90m``, ``2h``, ``1d12h``, ``45s`` or SLURM's ``[D-]HH:MM:SS``; None for anything else."""
    match = _SLURM.fullmatch(text) or _UNITS.fullmatch(text)
    if match is None or not text:
        return None
    days, hours, minutes, rest = (int(group or 0) for group in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def parse_minutes(text: str) -> int:
    """Return the whole minutes (rounded up) of the duration `text`; see `seconds`.

    Raises:
        BadRequest: no duration, 0, or more than 10 years.
    """
    total = seconds(text)
    shown = f"--time {text!r}" if len(text) <= 40 else f"--time {text[:20]!r}... ({len(text)} characters)"
    if not total:
        raise BadRequest(f"{shown}: write a duration such as 90m, 2h, 1d12h or 02:30:00.")
    if total > MAX_DAYS * 24 * 60 * 60:
        raise BadRequest(f"{shown}: at most {MAX_DAYS}d (10 years) is allowed.")
    return -(-total // 60)
