"""Types of the values in ``result.json``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import BadRequest
from training.flags.typed import brief

NUMBER = (int, float)
OPTIONAL_TEXT = (str, type(None))

RESULT: dict[str, tuple[type, ...]] = {
    "state": (str,),
    "metrics": (dict,),
    "seconds": NUMBER,
    "attempts": (int,),
    "failure": (dict, type(None)),
    "failed_saves": (dict, type(None)),
    "newest": (dict, type(None)),
}
FAILURE: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "message": (str,),
    "advice": (str,),
    "rank": (int, type(None)),
    "host": OPTIONAL_TEXT,
    "traceback": OPTIONAL_TEXT,
    "log": (list, type(None)),
    "nccl_warnings": (list, type(None)),
}


def check_result(record: dict[str, Any], states: Collection[str], where: Path) -> dict[str, Any]:
    """Return the content of ``result.json`` if its values have their types and its state is one of `states`.

    Raises:
        BadRequest: one has not; `where` and its key are named.
    """
    _check_types(record, RESULT, ("state",), where)
    if record["state"] not in states:
        raise BadRequest(f"{where}: state is {brief(record['state'], 80)}, which is none of {', '.join(states)}.")
    if failure := record.get("failure"):
        _check_types(failure, FAILURE, ("kind", "message"), where)
        for key in ("log", "nccl_warnings"):
            if not all(isinstance(line, str) for line in failure.get(key) or ()):
                raise BadRequest(f"{where}: {key} has lines that are no texts.")
    if saves := record.get("failed_saves"):
        _check_types(saves, {"count": (int,), "newest": (list,)}, ("count", "newest"), where)
        for each in saves["newest"]:
            if not isinstance(each, dict):
                raise BadRequest(f"{where}: failed_saves is {brief(each, 80)}, which has another type.")
            _check_types(each, {"step": (int,), "error": (str,)}, ("step", "error"), where)
    return record


def _check_types(
    record: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], needed: tuple[str, ...], where: Path
) -> None:
    for key in needed:
        if key not in record:
            raise BadRequest(f"{where}: {key} is missing.")
    for key, kinds in types.items():
        if key in record and not isinstance(record[key], kinds):
            raise BadRequest(f"{where}: {key} is {brief(record[key], 80)}, which has another type.")


def explain(failure: Mapping[str, Any], shown_rank: int | None) -> str:
    """What a failure was and what to do; without the log of `shown_rank`, which the user has seen."""
    number = failure.get("rank")
    rank = "" if number is None else f"rank {number} "
    where = f" [{rank}on {failure['host']}]" if failure.get("host") else ""
    text = f"{failure['message']}{where}\n"
    if shown_rank is not None and number == shown_rank:
        pass
    elif failure.get("traceback"):
        text += "\n" + failure["traceback"].rstrip() + "\n"
    elif failure.get("log"):
        text += "\nThe last lines of its log:\n" + "\n".join(failure["log"]) + "\n"
    warnings = failure.get("nccl_warnings") or []
    if warnings:
        more = [f"... and those of {len(warnings) - 4} more ranks"] if len(warnings) > 4 else []
        text += "\n" + "\n".join([*warnings[:4], *more]) + "\n"
    return f"{text}{failure['kind']}: {failure.get('advice', '')}"
