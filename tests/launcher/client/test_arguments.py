"""Arguments of functions from Python: refused before anything is sent, displayed, and the same after `resume`."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import launcher
from launcher import backends
from launcher.backends import Capabilities
from launcher.backends.fake import FakeBackend
from launcher.cli.describe import describe
from launcher.cli.main import main
from launcher.client.api import drop_refused
from launcher.client.plan import make_plan
from launcher.client.run import Run
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import RunSpec, State
from tests.launcher.engines import Project

MODULE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from training.context import Context

@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-3  # learning rate

@dataclass(frozen=True)
class Config:
    steps: int = 3
    optimizer: Optimizer = Optimizer()

def main(c: Context, lr: float, epochs: int = 3, *, config: Config | None = None):
    return {"lr": lr, "epochs": epochs, "steps": config.steps if config else None}

def bare(lr, epochs):
    return lr * epochs

def picky(config: Config):
    return config.steps

def check(config):
    raise RuntimeError("of the user's own check")
picky.check = check
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A user's module, imported, in the current folder."""
    (tmp_path / "arguments_target.py").write_text(MODULE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("arguments_target")
    del sys.modules["arguments_target"]


@pytest.fixture
def fake() -> Iterator[FakeBackend]:
    backend = FakeBackend()
    backends.register(backend)
    yield backend
    backends.unregister(backend)


WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("main", (3,), {}, r"launch\(target, 3\).*args=\(3,\)"),
    ("main", (), {"args": (1, 2, 3)}, "main: too many positional arguments"),
    ("main", (), {"args": ("x",)}, "main: lr: 'x' is not a number"),
    ("main", (), {"kwargs": {"lrr": 1}}, r"unexpected keyword argument 'lrr' \(did you mean 'lr'\?\)"),
    ("main", (), {"kwargs": {"epochs": 1}}, "--lr must be given"),
    ("main", (), {}, "--lr must be given"),
    ("main", ("--lr", "1", "--optimizer.rl", "3"), {}, r"unknown option --optimizer.rl; did you mean --optimizer.lr\?"),
    ("main", ("--lr", "1"), {"args": (1,)}, "given twice"),
    ("bare", (), {"args": (1,)}, "the parameter 'epochs' is no flag"),
]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(("function", "words", "given", "message"), WRONG)
def test_wrong_arguments_are_refused_before_anything_is_sent(
    module: ModuleType, fake: FakeBackend, named: bool, function: str, words: Any, given: dict[str, Any], message: str
) -> None:
    target = f"arguments_target:{function}" if named else getattr(module, function)
    # A target that is named is imported elsewhere, to check values also on engines without such a check.
    fake.capabilities = Capabilities(precheck=named and not given)
    with pytest.raises(BadRequest, match=message):
        launcher.launch(target, *words, backend="fake", cpus=1, name="r", **given)
    assert (fake.jobs, list(Path().glob("runs/*/*"))) == ({}, [])


def test_a_script_takes_strings_alone(module: ModuleType, fake: FakeBackend) -> None:
    with pytest.raises(BadRequest, match=r"args and kwargs are for functions; arguments_target\.py takes strings"):
        launcher.launch("arguments_target.py", backend="fake", cpus=1, args=(1,))


def test_an_error_of_the_users_own_check_is_shown_from_its_frame_on(
    module: ModuleType, fake: FakeBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--backend", "fake", "--cpus", "1", "arguments_target:picky"])
    err = capsys.readouterr().err
    assert exited.value.code == 2
    assert "the arguments of arguments_target:picky cannot be checked:\nTraceback" in err
    assert "RuntimeError: of the user's own check" in err
    assert "launcher/" not in err.split("Traceback")[1]


def test_values_are_displayed_and_stay_with_the_run(module: ModuleType, fake: FakeBackend) -> None:
    plan = make_plan(
        RunSpec("arguments_target:main", ("--epochs", "4"), backend="fake", cpus=1), Path.cwd(), module.main, ((2,), {})
    )
    assert describe(plan).startswith("launch: arguments_target:main(2) --epochs 4\n")
    assert '["--epochs", "4"] (2)' in backends.of(plan.cluster).render(plan)
    config = module.Config(steps=8)
    run = launcher.launch(
        module.main, backend="fake", cpus=1, name="r", wait=False, args=(2,), kwargs={"config": config}
    )
    assert "arguments_target:main(2, config=Config(steps=8" in run.status()["target"]
    values = json.loads((run.path / "plan.json").read_text())["target"]["values"]
    assert (values["args"], values["kwargs"]["config"]["steps"], values["pickled"]) == ([2.0], 8, False)


def test_a_flag_that_the_rank_refuses_leaves_nothing(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--cpus", "1", "--name", "r", "arguments_target:main", "--lr", "x"])
    out, err = capsys.readouterr()
    assert exited.value.code == 2
    assert "--lr: 'x' is not a number" in err
    assert "Traceback" not in out + err
    assert not Path("runs/r").exists()
    with pytest.raises(BadRequest, match="--lr: 'x' is not a number"):
        launcher.launch("arguments_target:main", "--lr", "x", cpus=1, name="r")
    assert not Path("runs/r").exists()


def test_help_of_a_function_with_nested_flags(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["arguments_target:main", "--help"])
    out, err = capsys.readouterr()
    assert (exited.value.code, err) == (0, "")
    assert "\n\noptimizer (Optimizer)\n  --optimizer.lr NUMBER  learning rate (default: 0.001)" in out


SEND = """
import launcher
from dataclasses import dataclass, field

@dataclass
class Mine:
    steps: int = 1
    table: dict = field(default_factory=dict)

def main(ctx, mine: Mine, *, factor: int = 1):
    if ctx.world.attempt == 1:
        raise RuntimeError("the first attempt fails")
    return {"steps": mine.steps * factor, "table": mine.table}

if __name__ == "__main__":
    try:
        launcher.launch(main, args=(Mine(3, {1: 2}),), kwargs={"factor": 5}, cpus=1, name="r", max_restarts=0)
    except launcher.RunFailed:
        print(launcher.resume("r").result())
"""


def test_resume_uses_the_same_values(local_project: Project) -> None:
    (local_project.folder / "send.py").write_text(SEND)
    done = subprocess.run(
        [sys.executable, "send.py"], cwd=local_project.folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert "{'steps': 15, 'table': {1: 2}}" in done.stdout, done.stdout + done.stderr
    assert local_project.status("r")["target"] == "__main__:main(Mine(steps=3, table={1: 2}), factor=5)"


def test_a_refused_run_is_removed_though_its_supervisor_still_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "r")
    run.create()
    run.write_result(State.FAILED, failure={"kind": "bad request", "message": "no"})
    remove, removed = shutil.rmtree, []

    def and_written_again(path: Path, ignore_errors: bool) -> None:
        remove(path, ignore_errors=ignore_errors)
        removed.append(path)
        if len(removed) == 1:
            path.mkdir()
            run.beat()

    monkeypatch.setattr("launcher.client.api.shutil.rmtree", and_written_again)
    with pytest.raises(BadRequest, match=r"^no$"):
        drop_refused(Run(run))
    assert len(removed) == 2
    assert not run.path.exists()
