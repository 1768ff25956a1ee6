"""NVLinks and the answers of dcgmi, from stand-ins for the two programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.agent.health.links import dcgm_faults, nvlink_faults


def stand_in(folder: Path, name: str, output: str, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
    """Put a program first on PATH that prints `output`."""
    (folder / "output").write_text(output)
    (folder / name).write_text(f"#!/bin/sh\ncat '{folder}/output'\nexit {status}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def status(*counts: int, links: int = 4) -> str:
    text = ""
    for gpu, active in enumerate(counts):
        text += f"GPU {gpu}: NVIDIA H100 80GB HBM3 (UUID: GPU-{gpu})\n"
        text += "".join(f"\t Link {n}: {'26.562 GB/s' if n < active else '<inactive>'}\n" for n in range(links))
    return text


@pytest.mark.parametrize(
    ("counts", "faults"),
    [
        ((4, 4, 4, 4), []),
        ((0, 0), []),
        ((4,), []),
        ((4, 4, 3, 4), ["GPU 2 has 3 active NVLinks, and most GPUs of its node have 4"]),
        ((4, 0), ["GPU 1 has 0 active NVLinks, and most GPUs of its node have 4"]),
        ((0, 4), ["GPU 0 has 0 active NVLinks, and most GPUs of its node have 4"]),
    ],
)
def test_a_gpu_that_lost_links_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Sequence[int], faults: list[str]
) -> None:
    stand_in(tmp_path, "nvidia-smi", status(*counts), monkeypatch)
    assert nvlink_faults() == faults


@pytest.mark.parametrize("said", ["", "Link 0: 26.562 GB/s\n", "GPU 0: no NVLink support\n", "\x1b[31mGPU\n"])
def test_other_answers_of_nvidia_smi_name_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    stand_in(tmp_path, "nvidia-smi", said, monkeypatch)
    assert nvlink_faults() == []


def test_a_driver_that_fails_names_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "nvidia-smi", status(4, 3), monkeypatch, 15)
    assert nvlink_faults() == []


TABLE = """\
Successfully ran diagnostic for group.
+---------------------------+------------------------------------------------+
| Diagnostic                | Result                                         |
+===========================+================================================+
|-----  Deployment  --------+------------------------------------------------|
| Denylist                  | Pass                                           |
| Persistence Mode          | {mode:<46} |
| Page Retirement/Row Remap | {pages:<46} |
+---------------------------+------------------------------------------------+
"""


@pytest.mark.parametrize(
    ("mode", "pages", "faults"),
    [
        ("Pass", "Pass", []),
        ("Warn", "Skip", []),
        ("Pass", "Fail - GPU: 3", ["dcgmi: Page Retirement/Row Remap fails: GPU: 3"]),
        ("Fail", "Fail", ["dcgmi: Persistence Mode fails", "dcgmi: Page Retirement/Row Remap fails"]),
    ],
)
def test_a_failed_test_of_dcgmi_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, pages: str, faults: list[str]
) -> None:
    stand_in(tmp_path, "dcgmi", TABLE.format(mode=mode, pages=pages), monkeypatch, int(bool(faults)))
    assert dcgm_faults() == faults


def test_without_dcgmi_its_service_or_an_answer_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dcgm_faults() == []
    stand_in(
        tmp_path, "dcgmi", "Error: unable to establish a connection to the specified host: localhost", monkeypatch, 1
    )
    assert dcgm_faults() == []
    (tmp_path / "dcgmi").write_text("#!/bin/sh\nexec sleep 600\n")
    assert dcgm_faults(limit=0.5) == []
