"""`deterministic`: what it switches on, and that a training under it gives the same weights again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = """
import json, os, sys, torch
from training.context import Context
from training.distributed.world import World

with Context(sys.argv[1], World()) as ctx:
    ctx.seed(1, deterministic=sys.argv[2] == "1")
    print(json.dumps([
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.rand(1).item(),
    ]))
"""


@pytest.mark.parametrize("chosen", [None, ":16:8"])
def test_what_it_switches_on(tmp_path: Path, chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if chosen:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", chosen)

    def settings(deterministic: bool) -> list[object]:
        command = [sys.executable, "-c", SETTINGS, str(tmp_path), str(int(deterministic))]
        found: list[object] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return found

    usual, repeated = settings(False), settings(True)
    assert usual[:4] == [False, chosen, False, True]
    assert repeated[:4] == [True, chosen or ":4096:8", False, False]
    assert usual[4] == repeated[4], "the same seed"


@pytest.mark.slow
def test_the_bundled_job_trains_under_it(tmp_path: Path) -> None:
    weights = []
    for name in ("a", "b"):
        command = [sys.executable, "-m", "training", str(tmp_path / name), "--max-steps", "3", "--deterministic"]
        subprocess.run([*command, "--log-with="], check=True, capture_output=True)
        weights.append((tmp_path / name / "model/model.safetensors").read_bytes())
    assert weights[0] == weights[1]
