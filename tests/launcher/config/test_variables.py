"""Variables for one run: how they are read, and which of them are secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.client.plan import make_plan
from launcher.config.variables import is_secret, read
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import RunSpec
from tests.launcher.engines import make_project


def test_the_command_line_counts_before_files_and_the_last_one_before_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.env").write_text(
        "# a comment\n\nA=1\nexport B = two words # not this\nC='x # y'\nD=\nE=\"a b\" # c\nF=a=b\r\n"
    )
    (tmp_path / "b.env").write_text("A=2\n")
    shell = {"HOME": "/home/me", "EMPTY": ""}
    assert read([], ["a.env"], tmp_path, shell) == {
        "A": "1",
        "B": "two words",
        "C": "x # y",
        "D": "",
        "E": "a b",
        "F": "a=b",
    }
    found = read(["HOME", "EMPTY", "A=3", "A=4=5", "X="], ["a.env", "b.env"], tmp_path, shell)
    assert (found["A"], found["HOME"], found["EMPTY"], found["X"], found["B"]) == (
        "4=5",
        "/home/me",
        "",
        "",
        "two words",
    )


@pytest.mark.parametrize(
    ("given", "text", "words"),
    [
        (["NOSUCH"], "", "--env NOSUCH: this shell has no such variable. Write --env NOSUCH=VALUE"),
        (["=1"], "", "--env '': '' cannot be the name"),
        (["RANK=0"], "", "RANK is set by launch for each rank"),
        ([], "A\n", "a.env, line 1: write NAME=VALUE."),
        ([], "\nA='open\n", "a.env, line 2: No closing quotation"),
        ([], "LOCAL_RANK=1", "a.env, line 1: LOCAL_RANK is set by launch"),
        ([], "=1", "a.env, line 1: '' cannot be the name"),
        ([], "x" * (1 << 20) + "=1", "more than 1 MiB"),
    ],
)
def test_what_cannot_be_a_variable_is_refused(tmp_path: Path, given: list[str], text: str, words: str) -> None:
    (tmp_path / "a.env").write_text(text)
    with pytest.raises(BadRequest) as refused:
        read(given, ["a.env"], tmp_path, {})
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        *((name, "x", True) for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "PGPASS", "MY_PW")),
        *((name, "x", True) for name in ("openai_api_key", "SLURM_JWT", "GITHUB_PAT", "SENTRY_DSN", "KEY", "BASIC_AUTH")),
        *((name, "x", False) for name in ("HF_HOME", "NCCL_DEBUG", "KEYS_PER_BATCH", "AUTHOR", "OMP_WAIT_PASSIVE", "PATH", "MONKEY")),
        *((name, "x", False) for name in ("TOKENIZERS_PARALLELISM", "MAX_TOKENS", "NUM_TOKENS_PER_STEP")),
        ("URL", "https://me:word@host/x", True),
        ("URL", "https://host/x", False),
        ("URL", "https://me@host/x", False),
    ],
)  # fmt: skip
def test_a_secret_is_known_by_its_name_or_a_password_in_an_address(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) == secret


def test_a_secret_is_in_one_file_and_comes_back_with_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "show.py").write_text("")
    plan = make_plan(RunSpec("show.py", cpus=1, name="r", env=("HF_TOKEN=hf_123456", "MODE=fast")), tmp_path)
    assert (plan.variables, plan.secrets, plan.spec.env) == (("HF_TOKEN", "MODE"), ("HF_TOKEN",), ())
    run_dir = RunDir(plan.run_dir)
    run_dir.create()
    run_dir.write_plan(plan)
    assert run_dir.plan() == plan
    with_it = [path for path in plan.run_dir.rglob("*") if path.is_file() and "hf_123456" in path.read_text()]
    assert [(path.name, path.stat().st_mode & 0o777) for path in with_it] == [("secrets.json", 0o600)]


@pytest.mark.slow
def test_ranks_have_it_also_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path, "local")
    script = "import json, os, sys\nopen('seen', 'w').write(json.dumps([os.environ.get(n) for n in ('HF_TOKEN', 'MODE', 'MORE')]))\n"
    (tmp_path / "show.py").write_text(script + "sys.exit(len(sys.argv) > 1 and not os.environ.get('MORE'))\n")
    monkeypatch.setenv("HF_TOKEN", "hf_123456")
    project.call(
        "--cpus",
        "1",
        "--name",
        "r",
        "--max-restarts",
        "0",
        "--env",
        "HF_TOKEN",
        "--env",
        "MODE=fast",
        "show.py",
        "x",
        status=1,
    )
    assert json.loads((tmp_path / "seen").read_text()) == ["hf_123456", "fast", None]
    monkeypatch.delenv("HF_TOKEN")
    project.call("resume", "r", "--env", "MORE=1")
    assert json.loads((tmp_path / "seen").read_text()) == ["hf_123456", "fast", "1"]
    shown = (
        project.call("status", "r", "--json").stdout
        + project.call("--dry-run", "--json", "--env", "A_TOKEN=t0psecret", "show.py").stdout
    )
    assert "hf_123456" not in shown
    assert "t0psecret" not in shown
