"""One file under plain Python, torchrun and launch: the function of the how-to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, blocks
from tests.launcher.engines import COMMAND
from training.context import Context
from training.distributed.world import World
from training.files import read_lines

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    page = ROOT / "docs/how-to/bring-your-function.md"
    (program,) = [block.text for block in blocks(page) if block.file == "fit.py"]
    (tmp_path / "fit.py").write_text(program)
    return tmp_path


def run(project: Path, *argv: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=project, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line}


@pytest.mark.slow
def test_the_same_file_under_plain_python_torchrun_and_launch(project: Path) -> None:
    run(project, sys.executable, "fit.py")
    plain = losses(project / "runs/fit")
    assert sorted(plain) == list(range(1, 161))
    assert plain[160] < 0.2 < plain[1]
    assert "continuing after step 160 of runs/fit" in run(project, sys.executable, "fit.py")
    (project / "runs/fit").rename(project / "runs/plain")
    run(project, *TORCHRUN, "fit.py")
    (project / "runs/fit").rename(project / "runs/torchrun")
    run(project, *COMMAND, "--cpus", "2", "--name", "function", "fit:main")
    run(project, *COMMAND, "--cpus", "2", "--name", "script", "fit.py")
    for name in ("torchrun", "function", "script"):
        found = losses(project / "runs" / name)
        assert found == pytest.approx(plain, rel=1e-3), name
        evaluations = [line["eval"] for line in read_lines(project / "runs" / name / "metrics.jsonl") if "eval" in line]
        assert len(evaluations) == 5
        assert evaluations[-1]["samples"] == 200
        assert evaluations[-1]["accuracy"] > 0.9
    value = json.loads((project / "runs/function/value.json").read_text())
    assert value == {"loss": losses(project / "runs/function")[160], "steps": 160}


@pytest.mark.slow
@pytest.mark.parametrize("argv", [[sys.executable], TORCHRUN], ids=["python", "torchrun"])
def test_sigterm_saves_and_the_same_command_continues(project: Path, argv: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = (project / "fit.py").read_text().replace("epochs: int = 5", "epochs: int = 100000")
    (project / "fit.py").write_text(program)
    process = subprocess.Popen([*argv, "fit.py"], cwd=project, env=env, stderr=subprocess.DEVNULL)
    metrics = project / "runs/fit/metrics.jsonl"
    while not metrics.exists() or len(read_lines(metrics)) < 20:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    newest = max(path.name for path in (project / "runs/fit/checkpoints").glob("step-*"))
    last = max(losses(project / "runs/fit"))
    assert int(newest.removeprefix("step-")) == last
    (project / "fit.py").write_text(program.replace("epochs: int = 100000", f"epochs: int = {last // 32 + 1}"))
    assert f"continuing after step {last} of runs/fit" in run(project, *argv, "fit.py")
    assert sorted(losses(project / "runs/fit")) == list(range(1, 32 * (last // 32 + 1) + 1))


def test_the_context_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    try:
        with Context(tmp_path, World()) as given:
            assert Context.current() is given
            assert Context.current("elsewhere") is given
        with Context.current("there") as made:
            assert made is not given
            assert Context.current() is made
            assert (made.run_dir, made.world.run_id, made.world.world_size) == (Path("there"), "there", 1)
            assert Path("there").is_dir()
            os.kill(os.getpid(), signal.SIGTERM)
            assert made.should_stop(1)
        monkeypatch.setenv("LAUNCH_FINISHED", str(tmp_path / "run" / "logs" / "2" / "0.finished"))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "name")
        with Context.current() as made:
            assert (made.run_dir, made.world.run_id) == (tmp_path / "run", "name")
    finally:
        signal.signal(signal.SIGTERM, before)
