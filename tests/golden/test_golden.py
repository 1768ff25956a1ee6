"""Golden files of submissions; no value of a profile can add a line to an sbatch script."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.backends.slurm.backend import SlurmBackend
from launcher.backends.slurm.batch import script as batch_script
from launcher.config.cluster import Cluster
from launcher.config.profiles import parse
from launcher.errors import BadRequest
from launcher.request.placement.place import Devices, place
from launcher.request.spec import Plan, RunSpec, Target
from tests.golden import CASES, FOLDER, Case, render

SHIPPED = Path(__file__).parents[2] / "cluster_configs"


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_it_was(tmp_path: Path, name: str) -> None:
    golden = (FOLDER / f"{name}.txt").read_text().splitlines()
    found = render(CASES[name], tmp_path).splitlines()
    changed = "\n".join(difflib.unified_diff(golden, found, f"{name}.txt", "now", lineterm=""))
    assert not changed, f"where that is meant, `python -m tests.golden` writes it anew\n{changed}"


def test_every_shipped_profile_has_its_golden_file() -> None:
    shipped = {path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.toml")}
    assert {case.base for case in CASES.values()} == shipped
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)


def test_a_plan_is_the_same_twice(tmp_path: Path) -> None:
    case = Case("slurm", "nodes = 4\nnode = {gpus = 8, cpus = 96}", ("--gpus", "16"))
    assert render(case, tmp_path / "a") == render(case, tmp_path / "b")


def make_plan(site: Cluster, folder: Path) -> Plan:
    spec, target = RunSpec("script.py"), Target("script", "script.py")
    return Plan("name", folder, spec, "slurm", site, place(Devices("gpu", 16), site), target, folder, 60)


def script(plan: Plan) -> list[str]:
    rendered = SlurmBackend().render(plan)
    return rendered[rendered.index("#!/bin/bash") :].split("\n")


anything = st.text(st.characters(), max_size=20) | st.sampled_from(
    ["a\n#SBATCH --x", "a\rb", "\0", "$(id)", "'", "\\\n"]
)
options = ("partition", "account", "qos", "reservation", "constraint", "exclude", "nodelist")
profiles = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(options, anything),
        "srun_args": st.lists(anything, max_size=3),
        "setup": st.lists(anything, max_size=2),
        "sbatch": st.dictionaries(anything | st.from_regex("[a-z-]{3,9}"), anything | st.integers(), max_size=2),
    },
)


def python_words(command: str | None) -> str:
    return shlex.join(os.path.expanduser(os.path.expandvars(word)) for word in shlex.split(command or sys.executable))


@settings(deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(profiles, st.none() | anything, anything)
def test_no_value_of_a_profile_adds_a_line_to_the_script(values: dict[str, Any], python: str | None, text: str) -> None:
    folder = Path("/runs/it's a $(folder)")
    base = {"backend": "slurm", "nodes": 4, "node": {"gpus": 8, "cpus": 96}}
    more = {"slurm": values, "environment": {"A": text}, "description": text} | ({"python": python} if python else {})
    plain = make_plan(parse(base, Path("x.toml"), Path.cwd()), folder)
    without = batch_script.before(plain)
    try:
        site = parse(base | more, Path("x.toml"), Path.cwd())
        lines = script(replace(plain, cluster=site))
    except BadRequest:
        return
    end = lines.index("# command")
    setup = batch_script.before(replace(plain, cluster=site))
    own = [*batch_script.TRAPS, *site.slurm.setup, batch_script.NO_TRAPS] if site.slurm.setup else []
    assert setup == [*without[:-1], *own, without[-1]]
    head = lines[: end - len(setup) - 3]
    assert lines[len(head) :] == ["", "# setup", *setup, "", *lines[end:]]
    assert head[:3] == ["#!/bin/bash", "", "# Parameters"]
    assert all(line.startswith("#SBATCH --") for line in head[3:])
    assert len(head) <= len(script(plain)) + len(values) + len(values.get("sbatch", {}))
    assert lines[end : end + 2] == ["# command", "export SUBMITIT_EXECUTOR=slurm"]
    after = script(plain)
    after = after[after.index("# command") + 3 :]
    assert lines[end + 3 :] == [line.replace(sys.executable, python_words(python)) for line in after]
    words = shlex.split(lines[end + 2])
    assert words[:6:2] == ["srun", "--output", "--error"]
    ours = ["--gpu-bind=none", "--cpus-per-task=96", "--kill-on-bad-exit=0", "--wait=120"]
    assert words[6 : 10 + len(site.slurm.srun_args)] == [*ours, *site.slurm.srun_args]
    assert words[-4:] == ["-u", "-m", "submitit.core._submit", f"{folder}/submitit"]
