"""`make setup` on machines whose GPUs or driver the pinned build of torch cannot use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parents[2] / "scripts/driver"


def examine(folder: Path, nvidia_smi: str | None, torch: str = "") -> subprocess.CompletedProcess[str]:
    """Run the check with an `nvidia-smi` that runs the shell lines `nvidia_smi`; None: without one."""
    tools = folder / "bin"
    tools.mkdir()
    if nvidia_smi is not None:
        (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        (tools / "nvidia-smi").chmod(0o755)
    return subprocess.run(
        [sys.executable, str(DRIVER), torch], env={**os.environ, "PATH": str(tools)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "nvidia_smi",
    [
        None,
        "echo '580.65.06, 9.0'",
        "echo '610.1, 7.5'; echo '610.1, 12.0'",
        "echo '[N/A], [N/A]'",
        "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9",
        "echo 'No devices were found'",
    ],
)
def test_setup_goes_on_where_the_pinned_build_works_or_nothing_is_known(tmp_path: Path, nvidia_smi: str | None) -> None:
    done = examine(tmp_path, nvidia_smi)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("nvidia_smi", "why"),
    [
        ("echo '535.183.01, 8.0'", "the NVIDIA driver is 535.183.01, and CUDA 13 needs 580 or newer."),
        ("echo '580.1, 9.0'; echo '580.1, 7.0'", "a GPU has compute capability 7.0, and CUDA 13 needs 7.5 or newer."),
        ("echo '470.2, 6.1'", "470.2, and CUDA 13 needs 580 or newer and a GPU has compute capability 6.1"),
    ],
)
def test_setup_says_what_to_type_before_it_installs_anything(tmp_path: Path, nvidia_smi: str, why: str) -> None:
    done = examine(tmp_path, nvidia_smi)
    assert done.returncode == 1
    text = " ".join(done.stderr.split())
    assert why in text
    assert "TORCH_INDEX=<that address> make setup" in text


def test_a_build_that_was_chosen_by_hand_stays(tmp_path: Path) -> None:
    assert examine(tmp_path, "echo '535.183.01, 8.0'", "2.13.0+cu126").returncode == 0
