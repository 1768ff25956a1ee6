"""Reports of nvidia-smi in its CSV format; nvidia-smi that fails, is missing or does not answer."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.agent.health import gpus
from launcher.backends.local import LocalBackend
from launcher.backends.ray.worker_group import WorkerGroup
from launcher.config.cluster import Cluster
from launcher.errors import BadRequest
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, Target
from tests.launcher.engines import until

HEALTHY = "0, GPU-aa, 0, [N/A]\n1, GPU-ab, 0, [N/A]\n2, GPU-c, [N/A], No\n"
ROWS = "GPU-aa, 0, 0\nGPU-ab, No, No\n"


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 3), ("0,1,2", 3), ("1", 1), ("GPU-a", 2), ("GPU-c,0", 2), ("0,-1,2", 1), ("7", 0), ("", 0), ("MIG-x,MIG-y", 2)],
)  # fmt: skip
def test_the_gpus_that_can_be_used_are_counted(visible: str | None, count: int) -> None:
    assert gpus.read(HEALTHY, ROWS, visible) == {"count": count, "faults": []}


@pytest.mark.parametrize(
    ("listed", "rows", "fault"),
    [
        ("1, GPU-b, 2, [N/A]", "", "GPU 1 (GPU-b) has 2 uncorrected ECC errors"),
        ("1, GPU-b, 0, Yes", "", "GPU 1 (GPU-b) has pages to retire at its next reset"),
        ("1, GPU-b, 0, [N/A]", "GPU-b, 1, 0", "GPU 1 (GPU-b) has rows to remap at its next reset"),
        ("1, GPU-b, 0, [N/A]", "GPU-b, Yes, No", "GPU 1 (GPU-b) has rows to remap at its next reset"),
        ("1, GPU-b, 0, [N/A]", "GPU-b, 0, 1", "GPU 1 (GPU-b) could not remap a row"),
    ],
)
def test_a_sick_gpu_is_named_unless_it_is_somebody_elses(listed: str, rows: str, fault: str) -> None:
    assert gpus.read(f"0, GPU-a, 0, No\n{listed}\n", f"{rows}\n", "0,1")["faults"] == [fault]
    assert gpus.read(f"0, GPU-a, 0, No\n{listed}\n", f"{rows}\n", "0") == {"count": 1, "faults": []}


def fake(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a fake nvidia-smi first on PATH."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("listed", "visible", "found"),
    [
        ("0, GPU-a, Not Active, Not Active", None, []),
        ("0, GPU-a, Active, Not Active", None, ["GPU 0 (GPU-a) is slowed down because it is too hot"]),
        ("0, GPU-a, Not Active, Active", "0", ["GPU 0 (GPU-a) is slowed down by the power brake of its node"]),
        (
            "0, GPU-a, Active, Active",
            "GPU-a",
            ["GPU 0 (GPU-a) is slowed down because it is too hot and by the power brake of its node"],
        ),
        ("0, GPU-a, Active, Active", "1", []),
        ("0, GPU-a, [N/A], [Not Supported]", None, []),
        ("Field is not valid", None, []),
    ],
)
def test_a_gpu_that_its_hardware_slows_down_is_named(
    listed: str, visible: str | None, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, f"echo '{listed}'", monkeypatch)
    assert gpus.slowed(visible) == found


def test_a_driver_that_does_not_say_so_slows_nothing_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "echo '0, GPU-a, Active, Active'; exit 2", monkeypatch)
    assert gpus.slowed(None) == []
    fake(tmp_path, "exec sleep 60", monkeypatch)
    assert gpus.slowed(None, limit=0.1) == []
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert gpus.slowed(None) == []


def test_an_old_driver_knows_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'Field "remapped_rows.pending" is not a valid field to query.'
    fake(tmp_path, f"case $1 in *gpu=*) echo '0, GPU-a, 0, No';; *) echo '{said}'; exit 2;; esac", monkeypatch)
    assert gpus.report(None) == {"count": 1, "faults": []}


def test_a_driver_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = "Unable to determine the device handle for GPU0: 0000:01:00.0: Unknown Error"
    fake(tmp_path, f"echo '{lost}'; exit 15", monkeypatch)
    assert gpus.report(None) == {"count": 0, "faults": [f"nvidia-smi exited with 15: {lost}"]}


def test_a_driver_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that it started are killed, too."""
    fake(tmp_path, f"echo $$ >> '{tmp_path}/pids'; sleep 60", monkeypatch)
    started = time.monotonic()
    assert gpus.report(None, 1.0) == {"count": 0, "faults": ["its GPU driver does not answer within 1 s"]}
    assert time.monotonic() - started < 10
    for pid in (tmp_path / "pids").read_text().split():
        until(lambda group=int(pid): not alive(group), "the end of what it started")  # type: ignore[misc]


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_without_nvidia_smi_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.report(None) is None


def test_gpus_are_counted_without_a_look_at_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the list of the kernel, otherwise of nvidia-smi, reduced by CUDA_VISIBLE_DEVICES."""
    fake(tmp_path, f"[ $1 = -L ] && cat '{tmp_path}/list'", monkeypatch)
    (tmp_path / "list").write_text(
        "GPU 0: NVIDIA H100 (UUID: GPU-a)\n  MIG 1g.10gb Device 0: (UUID: MIG-b)\nGPU 1: (UUID: c)\n"
    )
    for address in ("0000:01:00.0", "0000:81:00.0", "0000:c1:00.0"):
        (tmp_path / "proc" / address).mkdir(parents=True)
    nowhere = tmp_path / "nowhere"
    assert gpus.count(None, proc=nowhere) == 2
    assert gpus.count(None, proc=tmp_path / "proc") == 3
    for visible, of_unknown, of_three in (
        ("", 0, 0),
        ("0,-1,1", 1, 1),
        ("1,7,2", 3, 1),
        ("2,2", 0, 0),
        ("MIG-b", 1, 1),
    ):
        assert gpus.count(visible, proc=nowhere) == of_unknown
        assert gpus.count(visible, proc=tmp_path / "proc") == of_three
    monkeypatch.setenv("PATH", str(tmp_path / "proc"))
    assert gpus.count(None, proc=nowhere) == 0


def test_a_list_that_does_not_come_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(tmp_path, f"echo $$ >> '{tmp_path}/pids'; sleep 60", monkeypatch)
    assert gpus.count(None, 0.5, tmp_path / "nowhere") == 0
    assert capsys.readouterr().err == "launch: nvidia-smi -L does not answer within 0.5 s; no GPU is used\n"
    for pid in (tmp_path / "pids").read_text().split():
        until(lambda group=int(pid): not alive(group), "the end of what it started")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "visible"),
    [(["0,1", "0,1"], "0,1"), (["3", "1"], "3,1"), (["", ""], None), ([None, "2"], "2"), (["MIG-a", "MIG-b"], "MIG-a,MIG-b")],
)  # fmt: skip
def test_what_ray_gave_the_workers_of_a_node_is_one_list(given: list[str | None], visible: str | None) -> None:
    """Naming a device twice would make the list empty."""
    members = [
        SimpleNamespace(
            node=SimpleNamespace(id="n"), environment={"CUDA_VISIBLE_DEVICES": text} if text is not None else {}
        )
        for text in given
    ]
    assert WorkerGroup.visible_on(SimpleNamespace(members=members), "n") == visible  # type: ignore[arg-type]


MIG_LIST = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 1g.10gb     Device  0: (UUID: MIG-aa)
  MIG 1g.10gb     Device  1: (UUID: MIG-ab)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-second)
  MIG 3g.40gb     Device  0: (UUID: MIG-ba)
"""


@pytest.mark.parametrize(
    ("visible", "ranks", "refused"),
    [
        ("MIG-aa,MIG-ab", 2, True),
        ("MIG-ba,MIG-aa,MIG-ab", 3, True),
        ("MIG-aa,MIG-ab", 1, False),
        ("MIG-aa,MIG-ba", 2, False),
        ("MIG-ba,MIG-aa,MIG-ab", 2, False),
        ("MIG-unknown,MIG-ab", 2, False),
        ("GPU-5d5ba0d6,GPU-second", 2, False),
    ],
)
def test_several_slices_of_one_card_are_refused_before_anything_is_sent(
    visible: str, ranks: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, f"cat <<'END'\n{MIG_LIST}END", monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    target = Target("script", "x.py")
    site, placement = Cluster("local", "local"), Placement(1, ranks, "cuda")
    plan = Plan("x", tmp_path, RunSpec("x.py"), "local", site, placement, target, tmp_path, 60)
    with pytest.raises(BadRequest, match=r"2 MIG instances of one card \(GPU-5d5b") if refused else nullcontext():
        LocalBackend().check(plan)
