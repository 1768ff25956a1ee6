"""One finding of ``launch doctor``, as the doctor and the backends report it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One thing that was examined: whether it is in order, what was found, and what to do if it is not.

    Attributes:
        name: what was examined, in one or two words.
        ok: whether it is in order.
        found: the finding, one line.
        remedy: what to do where it is not `ok`, or where it is a `note`.
        note: in order, but worth a remark.
        table: the single measurements behind `found`, for ``--json``.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""
    note: bool = False
    table: tuple[Mapping[str, Any], ...] = ()
