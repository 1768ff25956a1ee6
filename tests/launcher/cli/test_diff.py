"""`launch diff`: in what two runs differ, and what is not shown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.client.sent.compare import arguments
from launcher.config.cluster import Cluster, Slurm
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, State, Target
from tests.launcher.engines import Launch, Project
from training.files import append_line

TOKEN = "hf_0123456789"

Change = Callable[[RunDir, Plan], Plan | None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def leave(path: Path, change: Change = lambda _, plan: plan, packages: dict[str, str] | None = None) -> RunDir:
    """Make a run of a script that has ended, with one change."""
    run = RunDir(path)
    run.create()
    run.code.mkdir()
    (run.code / "train.py").write_text("print('hello')\n")
    (run.code / "data").symlink_to("/data")
    site = Cluster("big", "slurm", environment={"NCCL_DEBUG": "INFO"}, slurm=Slurm(partition="gpu"))
    target = Target("script", str(run.code / "train.py"), ("--lr", "3e-5", "--fast"), (str(run.code),))
    plan = Plan(
        *(path.name, path, RunSpec("train.py"), "slurm", site, Placement(1, 8, "cuda", why="8 GPUs"), target),
        *(path.parent, 60, {"NCCL_DEBUG": "INFO", "HF_TOKEN": TOKEN, "OUT": f"{path}/out"}),
        secrets=("HF_TOKEN",),
    )
    run.snapshot_file.write_text(json.dumps({"commit": "0123456789abcdef", "dirty": False}))
    recorded = {
        "host": path.name,
        "python": "3.11.7",
        "packages": packages or {"torch": "2.13.0"},
        "gpus": ["H100"] * 8,
        "variables": {"SLURM_JOB_ID": path.name, "OMP_NUM_THREADS": "4"},
    }
    (path / "environment.json").write_text(json.dumps(recorded))
    append_line(run.metrics_file, {"time": 1.0, "step": 10, "loss": 0.5})
    append_line(run.metrics_file, {"time": 1.0, "step": 10, "eval": {"f1": 0.75}})
    run.write_result(State.SUCCEEDED, metrics={"accuracy": 0.5})
    run.write_plan(change(run, plan) or plan)
    return run


def differences(launch: Launch, *names: str) -> dict[tuple[str, str], tuple[Any, Any]]:
    status, out, err = launch("diff", *names, "--json")
    found = json.loads(out)
    assert (status, err) == (1 if found["differences"] else 0, "")
    assert [found[key]["name"] for key in "ab"] == list(names)
    return {(each["part"], each["name"]): (each["a"], each["b"]) for each in found["differences"]}


def test_runs_of_the_same_request_do_not_differ(folder: Path, launch: Launch) -> None:
    leave(folder / "runs/a")
    leave(folder / "runs/b")
    assert differences(launch, "a", "b") == {}
    assert launch("diff", "a", "b") == (0, "a and b do not differ\n", "")


def code(run: RunDir, _: Plan) -> None:
    (run.code / "train.py").write_text("print('olleh')\n")  # of the same size
    (run.code / "more").mkdir()
    (run.code / "more/new.py").touch()
    (run.code / "__pycache__").mkdir()
    (run.code / "__pycache__/train.pyc").touch()
    (run.code / "data").unlink()
    (run.code / "data").symlink_to("/other")
    run.snapshot_file.write_text(json.dumps({"commit": "fedcba9876543210", "dirty": True}))


def target(_: RunDir, plan: Plan) -> Plan:
    return replace(plan, target=replace(plan.target, args=("data", "--lr=1e-4", "--lr", "2")))


def profile(_: RunDir, plan: Plan) -> Plan:
    site = replace(plan.cluster, slurm=Slurm(partition="cpu", setup=("module load x",)), grace=30.0)
    return replace(plan, cluster=site, time_minutes=90, placement=replace(plan.placement, nodes=2, why="16 GPUs"))


def result(run: RunDir, _: Plan) -> None:
    append_line(run.metrics_file, {"time": 2.0, "step": 20, "eval": {"f1": 0.875}})
    failure = {"kind": "killed", "message": "rank 0 was killed"}
    run.write_result(State.FAILED, metrics={"accuracy": 0.0}, failure=failure)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            code,
            {
                ("code", "commit"): ("0123456789abcdef", "fedcba9876543210"),
                ("code", "uncommitted changes"): (False, True),
                ("code", "data"): ("a link to /data", "a link to /other"),
                ("code", "train.py"): ("sha256 75b96c8b58e3f1d1", "sha256"),
                ("code", "more/new.py"): (None, "sha256"),
            },
        ),
        (
            target,
            {
                ("target", "--lr"): ("3e-5", "1e-4 2"),
                ("target", "--fast"): ("", None),
                ("target", "argument 1"): (None, "data"),
            },
        ),
        (
            profile,
            {
                ("profile", "slurm.partition"): ("gpu", "cpu"),
                ("profile", "slurm.setup"): ([], ["module load x"]),
                ("profile", "grace"): (60.0, 30.0),
                ("placement", "time limit, minutes"): (60, 90),
                ("placement", "nodes"): (1, 2),
            },
        ),
        (
            result,
            {
                ("result", "state"): ("succeeded", "failed"),
                ("result", "failure"): (None, "killed"),
                ("result", "f1"): (0.75, 0.875),
                ("result", "accuracy"): (0.5, 0.0),
            },
        ),
    ],
)
def test_what_differs_is_shown_and_nothing_else(
    folder: Path, launch: Launch, change: Change, expected: dict[tuple[str, str], tuple[Any, Any]]
) -> None:
    leave(folder / "runs/a")
    leave(folder / "runs/b", change)

    def short(value: Any) -> Any:
        return "sha256" if isinstance(value, str) and value.startswith("sha256") else value

    found = differences(launch, "a", "b")
    assert {key: tuple(map(short, pair)) for key, pair in found.items()} == {
        key: tuple(map(short, pair)) for key, pair in expected.items()
    }
    back = differences(launch, "b", "a")
    assert back == {key: pair[::-1] for key, pair in found.items()}
    status, out, _ = launch("diff", "a", "b")
    lines = out.splitlines()
    assert (status, lines[0].split()) == (1, ["a", "b"])
    assert {line for line in lines[1:] if not line.startswith(" ")} == {part for part, _ in expected}
    assert {line[2:] for line in lines[1:] if line.startswith("  ")} == {
        next(line[2:] for line in lines if line.startswith(f"  {name} ")) for _, name in expected
    }


def test_values_of_secrets_are_compared_and_not_shown(folder: Path, launch: Launch) -> None:
    other = "hf_9876543210"

    def change(run: RunDir, plan: Plan) -> Plan:
        variables = {"HF_TOKEN": other, "DATABASE": "postgres://me:word@host/x", "NCCL_DEBUG": "WARN"}
        site = replace(plan.cluster, environment={"API_KEY": other})
        return replace(plan, environment=plan.environment | variables, cluster=site)

    leave(folder / "runs/a")
    leave(folder / "runs/b", change)
    found = differences(launch, "a", "b")
    assert found == {
        ("environment", "HF_TOKEN"): ("(secret)", "(secret)"),
        ("environment", "DATABASE"): (None, "(secret)"),
        ("environment", "NCCL_DEBUG"): ("INFO", "WARN"),
        ("profile", "environment.API_KEY"): (None, "(secret)"),
        ("profile", "environment.NCCL_DEBUG"): ("INFO", None),
    }
    for argv in (["diff", "a", "b"], ["diff", "a", "b", "--json"]):
        out = launch(*argv)[1]
        assert not any(word in out for word in (TOKEN, other, "me:word"))


def test_packages_and_records_that_are_missing(folder: Path, launch: Launch) -> None:
    leave(folder / "runs/a", packages={"torch": "2.13.0", "numpy": "2.0"})
    leave(folder / "runs/b", packages={"torch": "2.12.0", "ray": "2.55"})
    assert differences(launch, "a", "b") == {
        ("packages", "torch"): ("2.13.0", "2.12.0"),
        ("packages", "numpy"): ("2.0", None),
        ("packages", "ray"): (None, "2.55"),
    }
    (folder / "runs/b/environment.json").unlink()
    assert differences(launch, "a", "b") == {
        ("packages", "record"): ("left by the first node", None),
        ("machine", "record"): ("left by the first node", None),
        ("environment", "OMP_NUM_THREADS"): ("4", None),
    }


def test_a_run_that_was_moved_does_not_differ_from_what_it_was(folder: Path, launch: Launch) -> None:
    leave(folder / "runs/a")
    leave(folder / "runs/b")
    (folder / "runs/b").rename(folder / "moved")
    assert launch("diff", "a", "moved")[0] == 0


def test_hostile_runs_are_compared_without_following_a_link(folder: Path, launch: Launch) -> None:
    leave(folder / "runs/a")
    run = leave(folder / "runs/b")
    (folder / "secret").write_text("the secret\n")
    (run.code / "link.py").symlink_to(folder / "secret")
    os.mkfifo(run.code / "pipe.py")
    (run.code / "a\x1b[2Jb.py").touch()
    found = differences(launch, "a", "b")
    assert found.keys() == {("code", name) for name in ("link.py", "pipe.py", "a\x1b[2Jb.py")}
    assert found["code", "link.py"] == (None, f"a link to {folder / 'secret'}")
    assert found["code", "pipe.py"][1].startswith("unreadable: ")
    assert "\x1b" not in launch("diff", "a", "b")[1]
    run.code.rename(folder / "code")
    run.code.symlink_to(folder / "code")
    assert differences(launch, "a", "b")["code", "."] == (None, f"a link to {folder / 'code'}")


def test_wrong_requests_and_python(folder: Path, launch: Launch) -> None:
    run = leave(folder / "runs/a")
    leave(folder / "runs/b", target)
    assert launch("diff", "a", "nosuch")[0] == 2
    assert "two runs are compared, 3 given" in launch("diff", "a", "b", "a")[2]
    found = launcher.diff("a", folder / "runs/b")
    assert [(each.part, each.name) for each in found] == [
        ("target", "--lr"), ("target", "--fast"), ("target", "argument 1"),
    ]  # fmt: skip
    run.plan_file.write_text("{")
    with pytest.raises(launcher.BadRequest, match=r"plan\.json cannot be read"):
        launcher.diff("b", "a")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], {}),
        (["--lr", "3", "-x", "--y=1"], {"--lr": "3", "-x": "", "--y": "1"}),
        (["a", "--lr", "-3", "b", "c"], {"argument 1": "a", "--lr": "-3 b c"}),
        (["--y=", "b", "--x"], {"--y": "", "argument 1": "b", "--x": ""}),
    ],
)
def test_arguments_by_flag(args: list[str], expected: dict[str, str]) -> None:
    assert arguments(args) == expected


@pytest.mark.slow
def test_real_runs(local_project: Project) -> None:
    script = local_project.folder / "script.py"
    script.write_text("print('hello')\n")
    for name in ("a", "b"):
        local_project.call("--cpus", "1", "--name", name, "script.py", "--lr", "1")
    assert local_project.call("diff", "a", "b").stdout == "a and b do not differ\n"
    script.write_text("print('other')\n")
    local_project.call("--cpus", "2", "--name", "c", "--env", "A=1", "script.py", "--lr", "2")
    out = local_project.call("diff", "a", "c", status=1).stdout
    shown = [line.split()[0] for line in out.splitlines() if line.startswith("  ")][1:]
    assert {"script.py", "--lr", "ranks_per_node", "A"} <= set(shown), out
