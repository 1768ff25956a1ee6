"""The reference job on a real XLA device: torch_xla on its CPU runtime, in an environment of its own (`scripts/setup-xla`)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import require
from tests.launcher.engines import until

pytestmark = [pytest.mark.slow, pytest.mark.xla, pytest.mark.timeout(600)]

PYTHON = Path(sys.prefix) / "xla" / "bin" / "python"
PROFILE = """
backend = "local"
tpu_runtime = "torch_xla"
[environment]
PJRT_DEVICE = "CPU"
"""
ON_XLA = ("--cluster", "xla", "--tpus", "1", "--accelerator", "v5e")
STEPS = 24
LONG = 200  # steps that outlast the time that a request to stop takes
PATIENCE = 240.0  # seconds; it compiles for each shape
JOB = ("--", "--max-steps", str(STEPS), "--save-every", "4", "--log-every", "1", "--log-with=", "--keep", "100")


class Folder:
    """Where the runs are, and the command: with torch_xla's Python, or with this one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "cluster_configs").mkdir()
        (path / "cluster_configs/xla.toml").write_text(PROFILE)

    def call(self, *argv: str, python: Path | str = PYTHON, status: int = 0) -> str:
        command = [str(python), "-P", "-m", "launcher", *argv]
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, check=False, timeout=300)
        logs = "".join(log.read_text()[-2000:] for log in self.path.glob("runs/*/logs/*/*.log"))
        assert done.returncode == status, f"{done.stdout}\n{done.stderr}\n{logs}"
        return done.stdout

    def steps(self, run: str) -> dict[int, float]:
        """The loss of each step; of one that was done again, the last."""
        file = self.path / "runs" / run / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return {record["step"]: record["loss"] for record in records if "loss" in record}

    def events(self, run: str) -> list[str]:
        lines = (self.path / "runs" / run / "events.jsonl").read_text().splitlines()
        return [json.loads(line)["event"] for line in lines]

    def weights(self, run: str) -> str:
        return hashlib.sha256((self.path / "runs" / run / "model/model.safetensors").read_bytes()).hexdigest()

    def rank(self, run: str) -> int:
        """The pid of the rank: the process whose output is its log."""
        for name in filter(str.isdigit, os.listdir("/proc")):
            with suppress(OSError):
                if os.readlink(f"/proc/{name}/fd/1") == str(self.path / "runs" / run / "logs/1/0.log"):
                    return int(name)
        raise LookupError(run)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    require("torch_xla", [] if PYTHON.exists() else [f"{PYTHON}, which scripts/setup-xla makes"])
    return Folder(tmp_path)


def test_it_trains_and_resumes_to_the_same_bits(folder: Folder) -> None:
    """Killed and healed, it ends as a run that was never killed."""
    folder.call(*ON_XLA, "--name", "peace", *JOB)
    folder.call(*ON_XLA, "--name", "war", "--detach", *JOB)
    until(lambda: max(folder.steps("war"), default=0) >= 6, "step 6", PATIENCE)
    os.kill(folder.rank("war"), signal.SIGKILL)
    until(lambda: "finished" in folder.events("war"), "the end", PATIENCE)
    assert "restarted" in folder.events("war")
    assert "resumed" in folder.events("war")
    assert folder.steps("war") == folder.steps("peace")
    assert folder.weights("war") == folder.weights("peace")


def test_checkpoints_go_from_xla_to_the_cpu_and_back(folder: Folder) -> None:
    """A run begins on the XLA device, goes on on the CPU, and ends on the XLA device; its losses are those of the CPU."""
    job = [str(LONG) if word == str(STEPS) else word for word in JOB]
    folder.call(*ON_XLA, "--name", "r", "--detach", *job)
    stop_after(folder, 8)
    folder.call("resume", "r", "--detach", "--cluster", "local", "--cpus", "1", python=sys.executable)
    stop_after(folder, max(folder.steps("r")) + 10)
    folder.call("resume", "r", *ON_XLA)
    folder.call("--cpus", "1", "--name", "cpu", *job, python=sys.executable)
    assert folder.events("r").count("resumed") == 2
    mixed, plain = folder.steps("r"), folder.steps("cpu")
    assert list(mixed) == list(plain) == list(range(1, LONG + 1))
    assert [mixed[step] for step in (1, 2)] == pytest.approx([plain[step] for step in (1, 2)], rel=0.1)
    first = [sum(losses[step] for step in range(1, 21)) for losses in (mixed, plain)]
    assert first[0] == pytest.approx(first[1], rel=0.1), "dropout draws other numbers"


def stop_after(folder: Folder, step: int) -> None:
    until(lambda: max(folder.steps("r"), default=0) >= step, f"step {step}", PATIENCE)
    assert "r: stopped" in folder.call("cancel", "r")
