"""Durations as people and SLURM write them: the only parser."""

from __future__ import annotations

import re

from launcher.errors import BadRequest

MAX_DAYS = 3650

_DAYS = re.compile(r"([0-9]{1,9})-([0-9]{1,9})(?::([0-5]?[0-9])(?::([0-5]?[0-9]))?)?")
_CLOCK = re.compile(r"(?:([0-9]{1,9}):)?([0-9]{1,9}):([0-5]?[0-9])")
_UNITS = re.compile(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?")
_MINUTES = re.compile(r"[0-9]{1,12}")


def seconds(text: str) -> int | None:
    """The seconds of ``90m``, ``2h``, ``1d12h``, ``45s``, or of what sbatch's ``--time`` takes; None for anything else.

    Those are ``minutes``, ``minutes:seconds``, ``hours:minutes:seconds``, ``days-hours``, ``days-hours:minutes`` and
    ``days-hours:minutes:seconds``. Source: sbatch(1).
    """
    if _MINUTES.fullmatch(text):
        return int(text) * 60
    if match := _DAYS.fullmatch(text) or (_UNITS.fullmatch(text) if text else None):
        days, hours, minutes, rest = (int(group or 0) for group in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if match := _CLOCK.fullmatch(text):
        hours, minutes, rest = (int(group or 0) for group in match.groups())
        return None if match[1] and minutes > 59 else (hours * 60 + minutes) * 60 + rest
    return None


def in_words(minutes: int) -> str:
    """``90 min (1h30m)``: whole minutes, and for more than an hour in larger units."""
    days, hours, rest = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = "".join(f"{number}{unit}" for number, unit in ((days, "d"), (hours, "h"), (rest, "m")) if number)
    return f"{minutes} min" + (f" ({parts})" if minutes >= 60 else "")


def parse_minutes(text: str) -> int:
    """Return the whole minutes (rounded up) of the duration `text`; see `seconds`.

    Raises:
        BadRequest: no duration, 0, or more than 10 years.
    """
    total = seconds(text)
    shown = f"--time {text!r}" if len(text) <= 40 else f"--time {text[:20]!r}... ({len(text)} characters)"
    if not total:
        raise BadRequest(f"{shown}: write a duration such as 90m, 2h, 1d12h or 02:30:00; a number alone is minutes.")
    if total > MAX_DAYS * 24 * 60 * 60:
        raise BadRequest(f"{shown}: at most {MAX_DAYS}d (10 years) is allowed.")
    return -(-total // 60)
