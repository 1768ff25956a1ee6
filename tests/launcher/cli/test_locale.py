"""Locales and terminals that are not UTF-8: nothing of a run fails for its text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.launcher.engines import COMMAND, Project

PROGRAM = """
import os, sys
sys.stdout.buffer.write("größe 1 €\\n".encode() + b"\\xff\\xfe latin gr\\xf6\\xdfe\\n")
sys.stdout.flush()
assert os.environb.get(b"ORT") in (None, "Köln".encode()), os.environb[b"ORT"]
if "fail" in sys.argv:
    raise RuntimeError("größe: 100 € \\udcff")
"""
FUNCTION = """
def check(größe: int = 3):
    pass

def main(ort: str = "Köln") -> dict:
    print(ascii(ort))
    return {"ort": ort}
"""
PROFILE = "backend = 'local'\ndescription = 'Größe, 100 €'\n[environment]\nORT = 'Köln'\n"


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A locale of ISO 8859-1, which most machines do not have."""
    folder = tmp_path_factory.mktemp("locale")
    command = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")]
    if shutil.which("localedef") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("localedef cannot make a locale here (Debian package locales)")
    return {"LC_ALL": "de_DE.ISO-8859-1", "LOCPATH": str(folder)}


@pytest.fixture(params=["C", "ASCII", "ISO-8859-1", "ascii terminal"])
def locale(request: pytest.FixtureRequest) -> dict[str, str]:
    """The variables of a locale."""
    if request.param == "ISO-8859-1":
        found: dict[str, str] = request.getfixturevalue("german")
        return found
    return {
        "C": {"LANG": "C"},
        "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        "ascii terminal": {"PYTHONIOENCODING": "ascii"},
    }[request.param]


def call(project: Project, variables: Mapping[str, str], *argv: str) -> tuple[int, str]:
    """Run the command under a locale; returns its exit status and output."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LC_") and k not in ("LANG", "PYTHONUTF8")}
    done = subprocess.run(
        [*COMMAND, *argv],
        cwd=project.folder,
        env={**kept, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=120,
    )
    text = done.stdout.decode("latin-1")
    assert "UnicodeError" not in text
    assert "codec can't" not in text
    return done.returncode, text


def test_a_run_in_any_locale(local_project: Project, locale: dict[str, str]) -> None:
    (local_project.folder / "says.py").write_text(PROGRAM, encoding="utf-8")
    (local_project.folder / "cluster_configs").mkdir()
    (local_project.folder / "cluster_configs/site.toml").write_text(PROFILE, encoding="utf-8")
    assert call(local_project, locale, "--cluster", "site", "--cpus", "1", "--name", "good", "says.py")[0] == 0
    status, said = call(local_project, locale, "--cpus", "2", "--name", "bad", "says.py", "fail")
    assert (status, "RuntimeError: gr" in said) == (1, True)
    for words in (
        ["clusters"],
        ["list"],
        ["status", "good"],
        ["status", "bad"],
        ["logs", "good"],
        ["logs", "-f", "bad"],
    ):
        status, said = call(local_project, locale, *words)
        assert (status, "Traceback" in said.replace("Traceback (most recent call last):\n  File", "", 1)) == (0, False)
    status, said = call(local_project, locale, "status", "bad", "--json")
    assert json.loads(said)["failure"]["message"] == "RuntimeError: größe: 100 € \udcff"


def test_a_function_in_any_locale(local_project: Project, locale: dict[str, str]) -> None:
    (local_project.folder / "place.py").write_text(FUNCTION, encoding="utf-8")
    assert call(local_project, locale, "--cpus", "1", "--name", "place", "place:main")[0] == 0
    result = json.loads((local_project.folder / "runs/place/result.json").read_bytes())
    assert result["metrics"] == {"ort": "Köln"}
    status, said = call(local_project, locale, "--cpus", "1", "place:main", "--größe", "3")
    assert (status, "Traceback" in said) == (2, False)


def test_a_process_with_a_name_that_is_no_text_is_watched() -> None:
    """The kernel cuts the name of a process after 15 bytes, which may be within a character."""
    from launcher.agent.processes import process_state

    name = b"gr\xc3"
    program = f"import ctypes, sys; ctypes.CDLL(None).prctl(15, {name!r}); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(UnicodeDecodeError):
            Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
        assert process_state(process.pid) in ("S", "R")
        process.communicate()
