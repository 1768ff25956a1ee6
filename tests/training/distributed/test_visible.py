"""Parse CUDA_VISIBLE_DEVICES as CUDA does, in one module for both packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from training.distributed.visible import visible_devices

ROOT = Path(__file__).parents[3]
TABLE: list[tuple[str | None, list[str] | None]] = [
    (None, None),
    ("", []),
    (" ", []),
    ("0", ["0"]),
    ("0,1,2,3", ["0", "1", "2", "3"]),
    ("3, 1", ["3", "1"]),
    ("00,01", ["0", "1"]),
    ("+1", ["1"]),
    ("0,-1,1", ["0"]),
    ("-1", []),
    ("-1,0", []),
    ("0,,1", ["0"]),
    (",0", []),
    ("0,", ["0"]),
    ("1gpu2,2ampere", ["1", "2"]),
    ("0,x,1", ["0"]),
    ("NoDevFiles", []),  # set by SLURM for a step without GPUs
    ("none", []),
    ("all", []),
    ("0,0", []),
    ("0,1,0", []),
    ("1,01", []),
    ("GPU-8932f937-d72c,GPU-11", ["GPU-8932f937-d72c", "GPU-11"]),
    ("GPU-11,GPU-11", []),
    ("MIG-0c75,MIG-5af9", ["MIG-0c75", "MIG-5af9"]),
    ("MIG-GPU-8a/1/0,MIG-GPU-8a/2/0", ["MIG-GPU-8a/1/0", "MIG-GPU-8a/2/0"]),
    ("MIG-0c75,MIG-0c75", []),
    ("MIG-0c75,nothing,MIG-5af9", ["MIG-0c75"]),
    ("GPU-11,-1,GPU-22", ["GPU-11"]),
]


@pytest.mark.parametrize(("text", "devices"), TABLE)
def test_what_is_visible(text: str | None, devices: list[str] | None) -> None:
    assert visible_devices(text) == devices


@pytest.mark.parametrize(("text", "devices"), TABLE)
def test_torch_reads_it_so_too(text: str | None, devices: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    theirs = [str(each) for each in torch.cuda._parse_visible_devices()]
    assert theirs == ([str(n) for n in range(64)] if devices is None else devices)


@pytest.mark.parametrize(
    ("text", "count", "devices"),
    [
        ("0,1", 2, ["0", "1"]),
        ("0,2,1", 2, ["0"]),
        ("5", 2, []),
        ("0", 0, []),
        (None, 2, None),
        ("GPU-11,7", 2, ["GPU-11"]),
        ("MIG-11", 1, ["MIG-11"]),
    ],
)
def test_a_number_that_the_machine_does_not_have_ends_the_list(
    text: str | None, count: int, devices: list[str] | None
) -> None:
    assert visible_devices(text, count) == devices


def test_nobody_else_takes_the_variable_apart() -> None:
    """Code that reads the variable passes it on unchanged, or to `visible_devices`."""
    splits = re.compile(r"""(visible|CUDA_VISIBLE_DEVICES)\w*["')\]]*\.(split|count|strip)\b""")
    files = [path for package in ("launcher", "training") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 80
    assert [path.name for path in files if splits.search(path.read_text())] == []
