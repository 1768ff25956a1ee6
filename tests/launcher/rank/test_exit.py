"""What a script that exits leaves: the words and the status that it has under plain Python."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.launcher.engines import Project

TYPER = """
import typer
def main() -> None:
    print("in the command")
    raise typer.Exit(3)
typer.run(main)
"""
CLICK = """
import click
@click.command()
def main():
    raise click.exceptions.Exit(7)
main()
"""
ARGPARSE = "import argparse\nargparse.ArgumentParser(prog='p').parse_args(['--unknown'])\n"
SUBCLASS = "class Quit(SystemExit):\n    pass\nraise Quit(4)\n"
NESTED = "import sys\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    sys.exit('words at the end')\n"
OBJECT = "import sys\nsys.exit(['a', 'list'])\n"


@pytest.mark.parametrize("source", [TYPER, CLICK, ARGPARSE, SUBCLASS, NESTED, OBJECT])
def test_the_words_and_the_status_of_an_exit(local_project: Project, source: str) -> None:
    (local_project.folder / "program.py").write_text(source)
    plain = subprocess.run(
        [local_project.python, "program.py"], cwd=local_project.folder, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    done = local_project.launch("--cpus", "1", "--name", "run", "program.py", status=1)
    assert local_project.logs("run") == sorted(plain.stdout.splitlines())
    assert "Traceback" not in done.stdout + done.stderr
    [error] = (local_project.folder / "runs" / "run" / "errors" / "1").glob("*.json")
    record = json.loads(error.read_text())
    assert record["type"] == "SystemExit"
    code = plain.stdout.rstrip("\n") if source in (NESTED, OBJECT) else str(plain.returncode)
    assert record["message"] == f"the script ended with exit status {code}"


@pytest.mark.parametrize("code", ["0", "None", "False", "256"])
def test_statuses_that_mean_success(local_project: Project, code: str) -> None:
    (local_project.folder / "program.py").write_text(f"import sys\nprint('done', end='')\nsys.exit({code})\n")
    done = local_project.launch("--cpus", "1", "--name", "run", "program.py")
    assert "done" in done.stdout.splitlines()
    result = json.loads((local_project.folder / "runs" / "run" / "result.json").read_text())
    assert (result["state"], result["steps"]) == ("succeeded", None)
