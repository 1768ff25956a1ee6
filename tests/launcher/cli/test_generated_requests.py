"""Generated wrong requests: always status 2, one message, no traceback, nothing left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launcher
from launcher.cli.main import main
from launcher.errors import BadRequest
from tests.launcher.cli import wrong
from tests.launcher.engines import COMMAND

SLOW = 2.0
"""Seconds of this process's CPU that a refusal may take; a busy machine does not add to them."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "m.py").write_text("def f(ctx, steps: int = 1): ...\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("SLURM_CONF", os.devnull)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fault(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is wrong with the refusal of a command line; empty if nothing is."""
    started = time.process_time()
    try:
        main(argv)
    except SystemExit as exited:
        status = exited.code
    except BaseException as error:
        return f"{type(error).__name__}: {error!s:.200}"
    seconds = time.process_time() - started
    out, err = capsys.readouterr()
    if status != 2 or out:
        return f"status {status}: {out:.200}{err:.200}"
    if not err.startswith("launch: ") or err.count("launch: ") != 1 or "Traceback" in err or len(err) > 2000:
        return f"message: {err:.400}"
    return f"{seconds:.1f} s" if seconds > SLOW else ""


def brief(argv: list[str]) -> str:
    return " ".join(f"{word:.30}" for word in argv)


@pytest.mark.timeout(120)
def test_command_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    cases = list(wrong.requests())
    faults = {brief(argv): found for argv in cases if (found := fault(argv, capsys))}
    assert "\n".join(f"{case}: {found}" for case, found in faults.items()) == ""
    assert len(cases) > 500
    assert sorted(folder.rglob("*")) == before


@pytest.mark.timeout(120)
def test_profiles(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = folder / "p.toml"
    profile.touch()
    before = sorted(folder.rglob("*"))
    cases = list(wrong.profiles())
    faults = {}
    for text in cases:
        profile.write_text(text)
        if found := fault(["--cluster", "p.toml", "--gpus", "2", "--dry-run", "empty.py"], capsys):
            faults[text[-300:]] = found
    assert "\n".join(f"{case}: {found}" for case, found in faults.items()) == ""
    assert len(cases) > 500
    assert sorted(folder.rglob("*")) == before


@pytest.mark.timeout(120)
def test_calls_from_python(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    faults, count = {}, 0
    for count, (name, args, keywords) in enumerate(wrong.calls(), start=1):
        shown = f"{count}: {name} {list(keywords)}"
        try:
            getattr(launcher, name)(*args, **keywords)
            faults[shown] = "accepted"
        except BadRequest as error:
            if len(str(error)) > 2000:
                faults[shown] = f"{len(str(error))} characters"
        except BaseException as error:
            faults[shown] = f"{type(error).__name__}: {error!s:.200}"
    assert "\n".join(f"{case}: {found}" for case, found in faults.items()) == ""
    assert count > 300
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "where", ["foo", "auto:", "host:0", "host:99999", "host:x", ":1", "ray://", "a b:1", "x" * 5000]
)
def test_ray_address(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", where)
    assert fault(["--backend", "ray", "--cpus", "1", "--dry-run", "empty.py"], capsys) == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["--cpus", "9" * 20, "empty.py"],
        ["--time", "9" * 5000, "empty.py"],
        ["--cluster", "p.toml", "--gpus", "2", "empty.py"],
        ["os:getcwd"],
        ["status", "x" * 5000],
    ],
    ids=brief,
)
def test_as_processes(folder: Path, argv: list[str]) -> None:
    (folder / "p.toml").write_text("backend = 'slurm'\nnodes = 2\n[environment]\nRANK = '0'\n")
    before = sorted(folder.rglob("*"))
    done = subprocess.run([*COMMAND, *argv], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("launch: "), done.stderr.count("\n")) == (2, "", 1, 1)
    assert sorted(folder.rglob("*")) == before
