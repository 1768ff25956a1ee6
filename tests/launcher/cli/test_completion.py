"""`launch completion` in real shells, and `launch --version`."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from launcher.cli.completion import SHELLS, shipped
from launcher.cli.main import parsers
from launcher.cli.parser import COMMANDS
from launcher.lifecycle.records import registry
from tests.launcher.engines import COMMAND

ROOT = Path(__file__).parents[3]
HOSTILE = ["$(touch pwned)", "`touch pwned`", "a;touch pwned"]


def script(shell: str) -> str:
    return subprocess.run([*COMMAND, "completion", shell], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two runs, another folder, profiles, and files with hostile names; two of the user's runs elsewhere."""
    for name in ("mrpc-1", "mrpc-2", *HOSTILE):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "plan.json").write_text("{}")
    (tmp_path / "runs/mrpc-2/result.json").write_text("{}")
    (tmp_path / "runs/other").mkdir()
    for name in ("far-1", "far-2", "far-3", "mrpc-1"):
        run = tmp_path / "else where" / name
        run.mkdir(parents=True)
        (run / "plan.json").write_text("{}")
        registry.register(run)
    (tmp_path / "else where/far-2/result.json").write_text("{}")
    shutil.rmtree(tmp_path / "else where/far-3")
    (tmp_path / "cluster_configs/examples").mkdir(parents=True)
    for name in ("big", "examples/small", *HOSTILE):
        (tmp_path / "cluster_configs" / f"{name}.toml").touch()
    (tmp_path / "cluster_configs/big.toml").write_text('backend = "slurm"\n[slurm]\npartition = "gpu,gpu-long"\n')
    return tmp_path


def completed(folder: Path, *line: str, times: int = 1) -> list[str]:
    """What bash offers for the last word of the command line `line`, tried `times` times; the last offer counts."""
    words = " ".join(f"'{word}'" for word in line)
    once = '_launch launch "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"'
    program = f"""set -u
{script("bash")}
COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}
{"; ".join([once] * times)}
for each in "${{COMPREPLY[@]}}"; do echo "$each"; done
"""
    done = subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (["launch", "st"], ["status", "stacks"]),
        (["launch", "--det"], ["--detach"]),
        (["launch", "--gpus", "2", "--na"], ["--name"]),
        (["launch", "--gpus", "2", "st"], []),  # a command is the first word
        (["launch", "--backend", ""], ["local", "slurm", "ray"]),
        (["launch", "resume", "x", "--backend", "s"], ["slurm"]),
        (["launch", "--backend", "=", "s"], ["slurm"]),
        (["launch", "--backend", "="], ["local", "slurm", "ray"]),
        (["launch", "--gpus", "=", "8", "--na"], ["--name"]),
        (["launch", "-N", "2", "--mem", "=", "8G", "--na"], ["--name"]),
        (["launch", "--cluster", "b"], ["big"]),
        (["launch", "doctor", "--cluster", "lo"], ["local"]),
        (["launch", "--cluster", "examples/s"], ["examples/small", "examples/slurm-apptainer", "examples/slurm-h100"]),
        (["launch", "--backend", "slurm", "-p", "g"], ["gpu", "gpu-long"]),
        (["launch", "--partition", "=", "gpu-"], ["gpu-long"]),
        (["launch", "--set", "slurm.partition", "=", "gpu-"], ["gpu-long"]),
        (["launch", "list", "--state", "s"], ["succeeded", "stopped"]),
        (["launch", "list", "--state", "failed,st"], ["failed,stopped"]),
        (["launch", "status", "mr"], ["mrpc-1", "mrpc-2"]),
        (["launch", "status", "far"], ["far-1", "far-2"]),
        (["launch", "cancel", "mr"], ["mrpc-1"]),
        (["launch", "cancel", "far"], ["far-1"]),
        (["launch", "wait", "mrpc-1", "f"], ["far-1"]),
        (["launch", "diff", "mrpc-1", "far-2"], ["far-2"]),
        (["launch", "prune", "--ol"], ["--older"]),
        (["launch", "status", "o"], []),
        (["launch", "status", "--gpus"], []),
        (["launch", "logs", "--fo"], ["--follow"]),
        (["launch", "list", "m"], []),
        (["launch", "completion", ""], ["bash", "zsh", "fish", "-h", "--help", "--json"]),
        (["launch", "train.py", "--na"], []),  # options of the target
        (["launch", "--name", "status", "--dr"], ["--dry-run"]),
    ],
)
def test_bash_completes(folder: Path, line: list[str], offered: list[str]) -> None:
    assert completed(folder, *line) == offered


def test_bash_runs_nothing_that_a_file_name_contains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin").mkdir()
    (folder / "bin/sinfo").write_text("#!/bin/sh\necho '$(touch pwned)'\necho '`touch pwned`'\n")
    (folder / "bin/sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    assert set(completed(folder, "launch", "status", "")) == {"mrpc-1", "mrpc-2", "far-1", "far-2", *HOSTILE}
    assert set(completed(folder, "launch", "--cluster", "")) == {"big", "examples/small", *HOSTILE, *shipped()}
    assert set(completed(folder, "launch", "-p", "")) == {"gpu", "gpu-long", *HOSTILE[:2]}
    assert not list(folder.rglob("pwned"))


def test_nothing_is_offered_where_nothing_is(tmp_path: Path) -> None:
    assert completed(tmp_path, "launch", "status", "") == []
    assert completed(tmp_path, "launch", "--cluster", "") == shipped()
    assert completed(tmp_path, "launch", "-p", "") == []


def test_sinfo_is_asked_once_and_not_for_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "bin").mkdir()
    sinfo = folder / "bin/sinfo"
    sinfo.write_text("#!/bin/sh\necho called >> calls\necho debug\nexec sleep 60\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    os.mkfifo(folder / "cluster_configs/a.toml")  # which nobody writes
    assert completed(folder, "launch", "-p", "", times=3) == []
    assert not (folder / "calls").exists()
    (folder / "cluster_configs/a.toml").unlink()
    assert completed(folder, "launch", "-p", "", times=3) == ["debug", "gpu", "gpu-long"]
    assert (folder / "calls").read_text() == "called\n"


def test_profiles_of_the_user_are_offered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "con fig"))
    (tmp_path / "con fig/launch/cluster_configs").mkdir(parents=True)
    (tmp_path / "con fig/launch/cluster_configs/home.toml").write_text("partition = 'night'\n")
    assert completed(folder, "launch", "--cluster", "h") == ["home"]
    assert completed(folder, "launch", "-p", "n") == ["night"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("status f", ["far-1", "far-2"]),
        ("rm far-1 m", ["mrpc-1", "mrpc-2"]),
        ("--cluster b", ["big"]),
        ("--cluster examples/slurm-h", ["examples/slurm-h100"]),
        ("list --state s", ["stopped", "succeeded"]),
        ("--partition g", ["gpu", "gpu-long"]),
        ("pru", ["prune"]),
    ],
)
def test_fish_completes(folder: Path, line: str, offered: list[str]) -> None:
    program = f"{script('fish')}\ncomplete -C 'launch {line}'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    assert [text.split("\t")[0] for text in done.stdout.splitlines()] == offered


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
@pytest.mark.parametrize(
    ("function", "offered"),
    [
        ("_launch_runs", {"mrpc-1", "mrpc-2", "far-1", "far-2", *HOSTILE}),
        ("_launch_clusters", {"big", "examples/small", *HOSTILE, *shipped()}),
        ("_launch_partitions", {"gpu", "gpu-long"}),
    ],
)
def test_zsh_offers(folder: Path, function: str, offered: set[str]) -> None:
    stubs = "functions() { }; compadd() { print -rl -- ${(P)2} }; _files() { }"
    text = script("zsh").rpartition("(( $+functions[compdef] ))")[0]
    done = subprocess.run(
        ["zsh", "-f", "-c", f"{stubs}\n{text}\n{function}"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert (set(done.stdout.splitlines()), done.stderr) == (offered, "")
    assert not list(folder.rglob("pwned"))


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_command_and_option(shell: str) -> None:
    text = script(shell)
    assert all(name in text for name in COMMANDS)
    for parser in parsers().values():
        for action in parser._actions:
            for flag in action.option_strings:
                spelled = f"-l {flag[2:]}" if shell == "fish" and flag.startswith("--") else flag
                assert spelled in text or f"-s {flag[1:]}" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_every_command_shows_its_parser() -> None:
    assert list(parsers()) == ["", *COMMANDS]


def test_completion_names_the_shells_it_knows() -> None:
    done = subprocess.run([*COMMAND, "completion", "csh"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "invalid choice: 'csh' (choose from" in done.stderr
    shown = subprocess.run([*COMMAND, "completion", "--json", "bash"], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == {"shell": "bash", "script": script("bash")}


def test_the_version_is_printed_without_importing_an_engine() -> None:
    engines = ("torch", "ray", "submitit")
    program = f"""
import sys
import launcher.cli.main
try:
    launcher.cli.main.main(["--version"])
except SystemExit as end:
    print(end.code, sorted(set({engines!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    found = ", ".join(f"{name} {metadata.version(name)}" for name in engines)
    first, second = done.stdout.splitlines()
    assert first == f"launch {metadata.version('launch')} (Python {platform.python_version()}, {found})"
    assert second == "0 []"


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    release, _, development = version.partition(".dev")
    assert headings[0].startswith(f"## [Unreleased] {release}" if development else f"## [{version}] - 20")
