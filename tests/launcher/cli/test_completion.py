"""`launch completion` in real shells, and `launch --version`."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from launcher.cli.completion import SHELLS
from launcher.cli.main import parsers
from launcher.cli.parser import COMMANDS
from tests.launcher.engines import COMMAND

ROOT = Path(__file__).parents[3]
HOSTILE = ["$(touch pwned)", "`touch pwned`", "a;touch pwned"]


def script(shell: str) -> str:
    return subprocess.run([*COMMAND, "completion", shell], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two runs, another folder, a profile, and folders with hostile names."""
    for name in ("mrpc-1", "mrpc-2", *HOSTILE):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "plan.json").write_text("{}")
    (tmp_path / "runs/other").mkdir()
    for name in ("big", *HOSTILE):
        (tmp_path / "cluster_configs").mkdir(exist_ok=True)
        (tmp_path / "cluster_configs" / f"{name}.toml").touch()
    return tmp_path


def completed(folder: Path, *line: str) -> list[str]:
    """The completions of bash for the last word of the command line `line`."""
    words = " ".join(f"'{word}'" for word in line)
    program = f"""{script("bash")}
COMP_WORDS=({words}); COMP_CWORD={len(line) - 1}
_launch launch "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
for each in "${{COMPREPLY[@]}}"; do echo "$each"; done
"""
    done = subprocess.run(["bash", "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        (["launch", "st"], ["status", "stacks"]),
        (["launch", "--de"], ["--detach"]),
        (["launch", "--gpus", "2", "--na"], ["--name"]),
        (["launch", "--gpus", "2", "st"], []),  # a command is the first word
        (["launch", "--backend", ""], ["local", "slurm", "ray"]),
        (["launch", "resume", "x", "--backend", "s"], ["slurm"]),
        (["launch", "--cluster", "b"], ["big"]),
        (["launch", "status", "mr"], ["mrpc-1", "mrpc-2"]),
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


def test_bash_runs_nothing_that_a_file_name_contains(folder: Path) -> None:
    assert set(completed(folder, "launch", "status", "")) == {"mrpc-1", "mrpc-2", *HOSTILE}
    assert set(completed(folder, "launch", "--cluster", "")) == {"big", *HOSTILE}
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
