"""Durations as people and SLURM write them: the only parser."""

from __future__ import annotations

import re
import time
from datetime import datetime

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
    shown = f"--time {_shown(text)}"
    if not total:
        raise BadRequest(f"{shown}: write a duration such as 90m, 2h, 1d12h or 02:30:00; a number alone is minutes.")
    if total > MAX_DAYS * 24 * 60 * 60:
        raise BadRequest(f"{shown}: at most {MAX_DAYS}d (10 years) is allowed.")
    return -(-total // 60)


def parse_seconds(flag: str, text: str) -> int:
    """Return the seconds of ``90s``, ``30m``, ``1d12h``, ..., which was given for the option `flag`.

    Raises:
        BadRequest: it is none. A number without a unit is seconds to some programs and minutes to others.
    """
    total = seconds(text) if text and _UNITS.fullmatch(text) else None
    if total is None or total > MAX_DAYS * 24 * 60 * 60:
        number = text if _MINUTES.fullmatch(text) and len(text) < 6 else ""
        example = f"{number}s or {number}m" if number else "90s, 30m, 2h or 3d"
        raise BadRequest(f"{flag} {_shown(text)}: write a duration with its unit, such as {example}.")
    return total


def parse_moment(flag: str, text: str) -> float:
    """Return the time that ``2h``, ``3d`` (so long ago), ``2026-11-20`` or ``2026-11-20T18:30`` is, in seconds since 1970.

    Raises:
        BadRequest: it is neither a duration nor a date.
    """
    if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2})?)?", text):
        try:
            return datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError):
            raise BadRequest(f"{flag} {text}: there is no such date.") from None
    try:
        return time.time() - parse_seconds(flag, text)
    except BadRequest as error:
        raise BadRequest(f"{str(error).rstrip('.')}, or a date such as 2026-11-20.") from None


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:20]!r}... ({len(text)} characters)"
