"""The program of the how-to that keeps an average and exports the best checkpoint."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.docs.pages import ROOT, blocks
from tests.launcher.engines import COMMAND
from training.checkpoints.store import Checkpoints


@pytest.mark.slow
def test_the_best_average_is_exported(tmp_path: Path) -> None:
    for block in blocks(ROOT / "docs/how-to/bring-your-function.md"):
        if block.file in ("fit.py", "best.py"):
            (tmp_path / block.file).write_text(block.text)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, "--cpus", "2", "--name", "best", "best:main"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "runs/best"
    committed = Checkpoints(run_dir / "checkpoints").committed()
    assert committed[-1].step == 160, "the last one"
    best = max(committed, key=lambda checkpoint: checkpoint.score or 0.0)
    assert best.score is not None
    assert len(committed) == len({best.step, 160})
    found, expected = load_file(run_dir / "best.safetensors"), load_file(best.path / "average.safetensors")
    assert found.keys() == {"module.weight", "module.bias", "n_averaged"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert found["n_averaged"].item() == best.step
    assert not torch.equal(found["module.weight"], load_file(best.path / "model.safetensors")["weight"])
