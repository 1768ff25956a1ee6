"""The reference job on torch_xla's CPU runtime, in its own environment (`scripts/setup-xla`)."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import require
from tests.launcher.engines import Project, make_project, ranks_of, until
from training.files import read_lines

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
LONG = 200  # more steps than a request to stop takes
PATIENCE = 240.0  # seconds; it compiles for each shape
JOB = ("--", "--max-steps", str(STEPS), "--save-every", "4", "--log-every", "1", "--log-with=", "--keep", "100")


def steps(project: Project, run: str) -> dict[int, float]:
    """The loss of each step; for a repeated step, the last one."""
    records = read_lines(project.folder / "runs" / run / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def events(project: Project, run: str) -> list[str]:
    return [event["event"] for event in project.events(run)]


def weights(project: Project, run: str) -> str:
    return hashlib.sha256((project.folder / "runs" / run / "model/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Project:
    """A user's folder, with the command of the Python that has torch_xla."""
    require("torch_xla", [] if PYTHON.exists() else [f"{PYTHON}, which scripts/setup-xla makes"])
    project = replace(make_project(tmp_path, "local"), python=str(PYTHON))
    (project.folder / "cluster_configs").mkdir()
    (project.folder / "cluster_configs/xla.toml").write_text(PROFILE)
    return project


def test_it_trains_and_resumes_to_the_same_bits(folder: Project) -> None:
    """A killed run recovers and ends like an uninterrupted one."""
    folder.call(*ON_XLA, "--name", "peace", *JOB)
    folder.call(*ON_XLA, "--name", "war", "--detach", *JOB)
    until(lambda: max(steps(folder, "war"), default=0) >= 6, "step 6", PATIENCE)
    os.kill(ranks_of(folder.folder / "runs/war/logs/1")[0], signal.SIGKILL)
    until(lambda: "finished" in events(folder, "war"), "the end", PATIENCE)
    assert "restarted" in events(folder, "war")
    assert "resumed" in events(folder, "war")
    assert steps(folder, "war") == steps(folder, "peace")
    assert weights(folder, "war") == weights(folder, "peace")


def test_checkpoints_go_from_xla_to_the_cpu_and_back(folder: Project) -> None:
    """A run switches from the XLA device to the CPU and back; its losses are those of a CPU run."""
    job = [str(LONG) if word == str(STEPS) else word for word in JOB]
    folder.call(*ON_XLA, "--name", "r", "--detach", *job)
    stop_after(folder, 8)
    on_cpu = replace(folder, python=sys.executable)
    on_cpu.call("resume", "r", "--detach", "--cluster", "local", "--cpus", "1")
    stop_after(folder, max(steps(folder, "r")) + 10)
    folder.call("resume", "r", *ON_XLA)
    on_cpu.call("--cpus", "1", "--name", "cpu", *job)
    assert events(folder, "r").count("resumed") == 2
    mixed, plain = steps(folder, "r"), steps(folder, "cpu")
    assert list(mixed) == list(plain) == list(range(1, LONG + 1))
    assert [mixed[step] for step in (1, 2)] == pytest.approx([plain[step] for step in (1, 2)], rel=0.1)
    first = [sum(losses[step] for step in range(1, 21)) for losses in (mixed, plain)]
    assert first[0] == pytest.approx(first[1], rel=0.1), "dropout draws other numbers"


def stop_after(folder: Project, step: int) -> None:
    until(lambda: max(steps(folder, "r"), default=0) >= step, f"step {step}", PATIENCE)
    assert "r: stopped" in folder.call("cancel", "r").stdout
