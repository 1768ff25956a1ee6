"""Compare two runs: their code, request, profile, environment and results."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.client.run import Run, find
from launcher.config import variables
from launcher.config.codec import to_data
from launcher.lifecycle.run_dir import DEFAULT_FOLDER, reading
from launcher.request.spec import Plan
from training.files import open_plain, read_json

PARTS = ("code", "target", "placement", "profile", "environment", "packages", "machine", "result")

Facts = dict[str, dict[str, Any]]
"""Part -> name -> value."""

SECRET = "(secret)"
"""Shown in place of a secret value."""

RECORD: dict[str, Any] = {"record": "left by the first node"}
"""Stands for the packages of a run in a comparison with one that has no record of them."""

OF_A_JOB = re.compile(r"SLURM|HOSTNAME$|TMPDIR$|TPU_WORKER_ID$")
"""Variables that differ between any two jobs."""


@dataclass(frozen=True)
class Difference:
    """One thing in which two runs differ; a run that has nothing of this name has None."""

    part: str
    name: str
    a: Any
    b: Any


def diff(a: Run | str | Path, b: Run | str | Path, *, runs_folder: str | Path = DEFAULT_FOLDER) -> list[Difference]:
    """Return in what two runs differ: code, arguments, placement, profile, variables, packages, machine and result.

    Times, job ids and hosts are not compared, and values of secret variables are not shown.

    Args:
        a: a run, or its name or directory.
        b: as `a`.
        runs_folder: the folder in which a name is looked up.

    Raises:
        BadRequest: there is no such run, or it cannot be read.
    """
    first, second = (run if isinstance(run, Run) else find(run, runs_folder) for run in (a, b))
    facts, others = _facts(first), _facts(second)
    for part in ("packages", "machine"):  # which the first node writes
        if bool(facts[part]) != bool(others[part]):
            facts[part], others[part] = (RECORD if each[part] else {} for each in (facts, others))
    return [
        Difference(part, name, _shown(facts[part].get(name)), _shown(others[part].get(name)))
        for part in PARTS
        for name in dict.fromkeys((*facts[part], *others[part]))
        if facts[part].get(name) != others[part].get(name)
    ]


@dataclass(frozen=True)
class _Secret:
    """The value of a secret variable: it is compared, and not shown."""

    value: str


def _shown(value: Any) -> Any:
    return SECRET if isinstance(value, _Secret) or variables.PASSWORD.search(str(value)) else value


def _facts(run: Run) -> Facts:
    with reading(run.path):
        plan, overview = run.dir.plan(), run.overview()
        recorded = read_json(run.path / "environment.json", run.path)
        recorded = recorded if isinstance(recorded, dict) else {}
        facts = {
            "code": _code(run, overview["code"]),
            "target": _target(plan),
            "placement": _placement(plan),
            "profile": _profile(plan),
            "environment": _variables(plan, _table(recorded, "variables")),
            "packages": _table(recorded, "packages"),
            "machine": _machine(recorded),
            "result": _result(overview),
        }
    # A copy of a run, or another one, has its own directory in these places.
    return {part: {name: _placed(value, plan, run) for name, value in each.items()} for part, each in facts.items()}


def _placed(value: Any, plan: Plan, run: Run) -> Any:
    if isinstance(value, list):
        return [_placed(each, plan, run) for each in value]
    for place in (plan.run_dir, run.path):
        if isinstance(value, str):
            value = re.sub(rf"{re.escape(str(place))}(?=/|$)", "RUN_DIR", value)
    return value


def _table(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = record.get(key)
    return dict(found) if isinstance(found, dict) else {}


def _code(run: Run, snapshot: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: snapshot.get(key) for name, key in (("commit", "commit"), ("uncommitted changes", "dirty"))}
    found = {name: value for name, value in found.items() if value is not None}
    for folder in (run.dir.code, run.dir.packages):
        prefix = "" if folder == run.dir.code else "packages/"
        found |= {prefix + name: what for name, what in contents(folder, run.path)}
    for file in (run.dir.target_pickle, run.dir.arguments_pickle):
        if os.path.lexists(file):
            found[file.name] = _digest(file, run.path)
    return found


def contents(folder: Path, top: Path) -> Iterator[tuple[str, str]]:
    """Yield the names of the files below a folder of a run, each with a digest, or with the target of a link."""
    if folder.is_symlink():
        yield ".", f"a link to {os.readlink(folder)}"
        return
    for above, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted((*files, *(name for name in folders if os.path.islink(f"{above}/{name}")))):
            path = Path(above, name)
            link = f"a link to {os.readlink(path)}" if path.is_symlink() else ""
            yield str(path.relative_to(folder)), link or _digest(path, top)


def _digest(path: Path, top: Path) -> str:
    try:
        with os.fdopen(open_plain(path, top=top), "rb") as file:
            return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    except OSError as error:
        return f"unreadable: {error.strerror}"


def _target(plan: Plan) -> dict[str, Any]:
    values = {"values": plan.target.values.shown} if plan.target.values.shown else {}
    return {"kind": plan.target.kind, "name": plan.target.name, **values, **arguments(plan.target.args)}


def arguments(args: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a program by flag; those without one by their number.

    ``--lr 3e-5 --fast data`` is ``--lr``: ``3e-5``, ``--fast``: ``data``: what a flag takes is not known here. A flag that
    is given again has a list of values.
    """
    found: dict[str, Any] = {}
    flag, number = "", 0
    for word in args:
        if re.match(r"--?[A-Za-z]", word):
            flag, equals, value = word.partition("=")
            found[flag] = [*found.get(flag, []), *([value] if equals else [])]
            flag = "" if equals else flag
        elif flag:
            found[flag].append(word)
        else:
            number += 1
            found[f"argument {number}"] = [word]
    return {name: " ".join(values) for name, values in found.items()}


def _placement(plan: Plan) -> dict[str, Any]:
    placement = to_data(plan.placement)
    placement.pop("why", None)
    fields = {"backend": plan.backend, "time limit, minutes": plan.time_minutes, "restarts": plan.spec.max_restarts}
    return fields | dict(_flat(placement))


def _profile(plan: Plan) -> dict[str, Any]:
    site = to_data(plan.cluster)
    return {
        name: _Secret(value) if isinstance(value, str) and _is_secret(name, value) else value
        for name, value in _flat(site)
    }


def _is_secret(key: str, value: str) -> bool:
    return key.startswith("environment.") and variables.is_secret(key.removeprefix("environment."), value)


def _variables(plan: Plan, recorded: Mapping[str, Any]) -> dict[str, Any]:
    given = {
        name: _Secret(value) if name in plan.secrets or variables.is_secret(name, value) else value
        for name, value in plan.environment.items()
    }
    # A record has no secrets: it is made by a list of allowed names.
    return {name: value for name, value in sorted({**recorded, **given}.items()) if not OF_A_JOB.match(name)}


def _machine(recorded: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"python": "python", "platform": "platform", "driver": "NVIDIA driver", "gpus": "GPUs", "cores": "cores"}
    found = {title: recorded[key] for key, title in keys.items() if key in recorded}
    for title in ("GPUs", "cores"):
        if isinstance(found.get(title), list):
            found[title] = len(found[title])
    return found


def _result(overview: Mapping[str, Any]) -> dict[str, Any]:
    metrics = dict(_flat(overview["metrics"]))
    evaluation = {name: value for name, value in _flat(overview["evaluation"]) if name not in metrics}
    failure = {"failure": overview["failure"]["kind"]} if overview["failure"] else {}
    step = {"step": overview["progress"]["step"]} if "step" in overview["progress"] else {}
    return {"state": overview["state"], **failure, **step, **evaluation, **metrics}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
