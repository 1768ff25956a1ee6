"""The scripts of `benchmarks/cards` fit the command line and the files of today; they run only where there is a GPU."""

from __future__ import annotations

import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from launcher.cli.parser import launch_parser
from training.bert.config import TrainConfig

CARDS = Path(__file__).parents[2] / "benchmarks/cards"
SCRIPTS = sorted(CARDS.glob("*.sh"))


def commands(script: Path) -> list[str]:
    """The lines that start a run, with those that continue them."""
    text = script.read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if re.search(r"\b(launch|job|launcher) [^()]*-", line)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_valid_and_its_options_exist(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    ours = {option for action in launch_parser()._actions for option in action.option_strings}
    jobs = {f"--{field.name.replace('_', '-')}" for field in fields(TrainConfig)}
    for line in commands(script):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= ours | jobs, line


def test_the_options_are_found() -> None:
    found = {
        option for script in SCRIPTS for line in commands(script) for option in re.findall(r"--[a-z][a-z-]*", line)
    }
    assert {"--name", "--deterministic", "--precision", "--max-restarts", "--cluster", "--save-every"} <= found


def test_the_programs_exist_and_the_readme_lists_every_script() -> None:
    texts = "".join(script.read_text() for script in SCRIPTS)
    programs = {path.stem for path in (CARDS / "programs").glob("*.py")}
    found = re.search(r"for program in ([\w ]+);", texts)
    assert found is not None
    named = {*found[1].split(), *re.findall(r"\b(\w+):main\b", texts), *re.findall(r"-P (\w+)\.py\b", texts)}
    assert named - {"program"} == programs
    readme = (CARDS / "README.md").read_text()
    assert all(f"## {script.name}:" in readme for script in SCRIPTS if script.stem != "common")
    for variable in re.findall(r"\$\{([A-Z]+(?:_[A-Z]+)?):", texts):
        assert variable in readme or variable == "PYTHONPATH"
