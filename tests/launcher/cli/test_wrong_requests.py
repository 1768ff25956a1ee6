"""Wrong requests of each command: exit status 2, one message, no traceback, and no files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli.main import main
from launcher.errors import BadRequest, LaunchError, RunFailed, RunStopped, exit_status
from tests.launcher.engines import COMMAND
from training.errors import CheckpointError, ConfigError

LONG, MANY, HUGE = "x" * 5000, "9" * 5000, "9" * 20
TPU = ["--tpus", "4", "--accelerator", "v5e", "--topology"]

FILES = {
    "empty.py": "",
    "latin.py": 'x = "\udcff"',
    "nul.py": "x = 1\0",
    "target.py": "import os\nCONST = 3\nclass K: pass\ndef gen():\n    yield 1\ndef three(a, b, c): ...\n",
    "nested.py": (
        "from dataclasses import dataclass, field\n@dataclass\nclass In:\n    a: int = 1\n@dataclass\nclass C:\n"
        "    inner: In = field(default_factory=In)\n@dataclass\nclass D:\n    table: dict[str, int] = field(default_factory=dict)\n"
        "def main(ctx, config: C): ...\ndef table(ctx, config: D): ...\n"
    ),
    "kind.toml": "backend = 3",
    "nan.toml": "backend = 'local'\ngrace = nan",
    "inf.toml": "backend = 'local'\nhang_after = inf",
    "digits.toml": f"backend = 'local'\nnodes = {MANY}",
    "deep.toml": "x = " + "[" * 5000 + "]" * 5000,
    "deeper.toml": "backend = 'slurm'\n[slurm.sbatch]\nx = " + "[" * 50 + "]" * 50,
    "latin.toml": "backend = '\udcff'",
    "time.toml": "backend = 'local'\ntime = 'soon'",
    "variable.toml": "backend = 'local'\nruns = '$NO_SUCH_VARIABLE_HERE/runs'",
    "extends.toml": "backend = 'local'\nextends = 'nosuch'",
}

WRONG: list[list[str]] = [
    # options
    ["--nosuch"], ["--" + LONG], ["-x"], ["--="], ["-mm"], ["--json=1"], ["--no-json"], ["--max_restart", "1"],
    ["--cpus", ""], ["--cpus", "٣"], ["--cpus", HUGE], ["--cpus", MANY], ["--cpus", "-" + MANY], ["--cpus", "1e3"],
    ["--cpus", "nan"], ["--gpus", HUGE], ["--gpus", "-1"], ["--gpus=" + LONG], ["--nodes", HUGE], ["--nodes", "0"],
    ["--tpus", HUGE, "--accelerator", "v5e"], ["--spare-nodes", HUGE], ["--max-restarts", "9" * 30],
    ["--spare-nodes", "1", "empty.py"], ["--cpus", "3", "--nodes", "100000"],
    ["--time", "", "empty.py"], ["--time", "٣h", "empty.py"], ["--time", MANY, "empty.py"], ["--time", "24:61:61", "empty.py"],
    ["--time", "nan", "empty.py"], ["--name", "", "empty.py"], ["--name", LONG, "empty.py"],
    ["--accelerator", LONG, "--gpus", "1"], ["--accelerator", "", "--gpus", "1"], ["--topology", "2x2"],
    [*TPU, ""], [*TPU, "٢x٢"], [*TPU, MANY + "x2"], [*TPU, "2x"], ["--tpus", "4", "--accelerator", LONG],
    ["--tpus", "1000000", "--accelerator", "v5e", "--topology", "999999x999999"],
    # profiles
    ["--backend", ""], ["--backend", LONG], ["--backend", "lokal"], ["--cluster", ""], ["--cluster", LONG],
    ["--cluster", "~nosuch"], ["--cluster", "~nosuch/x.toml"], ["--cluster", "nosuch.toml"], ["--cluster", "."],
    ["--cluster", "\1.toml"], ["--cluster", LONG + ".toml"], ["--cluster", "folder.toml"],
    *(["--cluster", name, "empty.py"] for name in FILES if name.endswith(".toml")),
    # targets
    ["nosuch.py"], ["~nosuch.py"], ["~nosuch"], ["folder.py"], ["latin.py"], ["nul.py"], [LONG], [LONG + ".py"], [LONG + ":f"],
    ["target:" + LONG], ["os:getcwd:x"], ["a:b:c"], [":"], [":f"], ["target:"], [""], ["..."], ["/dev/null"], ["-"],
    ["os:getcwdd"], ["target:nosuch"], ["no.such.module:f"], ["sys:exit"], ["-m", ""], ["-m", "."], ["-m", "a..b"],
    ["-m", LONG], ["-m", "os:getcwd"], ["-m"],
    ["nested:table", "--help"], ["target:three", "--help"], ["target:CONST", "--help"],
    ["target:gen", "--help"], ["target:K.__init__.x", "--help"], ["a:b:c", "--help"],
    # runs
    *([command, name] for command in ("status", "logs", "cancel", "resume") for name in ("", LONG, "~nosuch", "/dev/null", ".")),
    *([command] for command in ("status", "logs", "cancel", "resume")),
    *([command, "--runs", LONG, "x"] for command in ("status", "logs", "cancel", "resume")),
    ["list", "--runs", LONG], ["list", "x"], ["logs", "x", "--rank", ""], ["logs", "x", "--rank", MANY],
    ["resume", "x", "--cpus", "0"], ["resume", "x", "--name", "y"], ["resume", "x", "--time", ""],
    # clusters and doctor
    ["clusters", LONG], ["clusters", "new", LONG], ["clusters", "new", ""], ["clusters", "new", "a/b"],
    ["clusters", "new", "x", "--backend", "nosuch"], ["doctor", "--cluster", LONG], ["doctor", "--cluster", ""],
    ["doctor", "--wait", "x"], ["doctor", "--wait", "-1"], ["doctor", "--wait", HUGE], ["doctor", "--nodes", MANY],
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, errors="surrogateescape")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "folder.toml").mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    for module in ("nested", "target"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.timeout(30)
@pytest.mark.parametrize("argv", WRONG, ids=lambda argv: " ".join(f"{word:.12}" for word in argv).replace("\1", ""))
def test_a_wrong_request_has_one_message_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as exited:
        main(argv)
    out, err = capsys.readouterr()
    assert exited.value.code == 2, err
    assert out == ""
    assert err.startswith("launch: ")
    assert (err.count("launch: "), "Traceback" in err, len(err) < 2000) == (1, False, True)
    assert sorted(folder.rglob("*")) == before


def test_the_command_itself_shows_no_traceback_and_speaks_json(folder: Path) -> None:
    for argv in (["nested:table", "--help"], ["--cpus", HUGE], ["--cluster", "deep.toml"]):
        done = subprocess.run([*COMMAND, *argv], capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    done = subprocess.run([*COMMAND, "--json", "nested:table", "--help"], capture_output=True, text=True, check=False)
    assert "no flag can have the type" in json.loads(done.stdout)["error"]


def test_every_error_of_ours_has_its_exit_status() -> None:
    table = {BadRequest: 2, ConfigError: 2, CheckpointError: 1, LaunchError: 1, RunFailed: 1, RunStopped: 3}
    assert {kind: exit_status(kind("x")) for kind in table} == table
