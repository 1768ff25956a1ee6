"""The GPUs of this node, as NVIDIA's driver reports them through nvidia-smi.

All calls have a time limit: a faulty driver hangs the process that queries it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.timeouts import TIMEOUTS
from training.distributed.visible import visible_devices

PROC = Path("/proc/driver/nvidia/gpus")
"""Holds a folder for each GPU, created by the driver."""

STATE = "index,uuid,ecc.errors.uncorrected.volatile.total,retired_pages.pending"
ROWS = "gpu_uuid,remapped_rows.pending,remapped_rows.failure"
"""Queried properties of each GPU. Source: ``nvidia-smi --help-query-gpu`` and ``--help-query-remapped-rows``.

GPUs before Ampere retire pages, later ones remap rows; the property that a GPU lacks is ``[N/A]``.
"""

MEMORY = "index,uuid,memory.free,memory.total,mig.mode.current,compute_mode"


@dataclass(frozen=True)
class Gpu:
    """A GPU and its memory; `free` and `total` in MiB."""

    index: int
    uuid: str
    free: int
    total: int

    def __str__(self) -> str:
        return f"GPU {self.index} has the most free memory ({self.free / 1024:.1f} of {self.total / 1024:.1f} GiB)"


SLOWED = "index,uuid,clocks_throttle_reasons.hw_thermal_slowdown,clocks_throttle_reasons.hw_power_brake_slowdown"
"""Why the hardware lowers the clocks of each GPU; drivers since 530 call it ``clocks_event_reasons`` and know both names."""


def slowed(visible: str | None, limit: float = TIMEOUTS.gpu_driver) -> list[str]:
    """Return a sentence for each GPU of `visible` that the hardware slows down; empty if nvidia-smi does not say."""
    if shutil.which("nvidia-smi") is None:
        return []
    answer = _answer(
        _start("nvidia-smi", f"--query-gpu={SLOWED}", "--format=csv,noheader,nounits"), time.monotonic() + limit
    )
    status, listed = answer or (1, "")
    gpus = [found for line in listed.splitlines() if len(found := _fields(line)) == 4] if status == 0 else []
    why = ("because it is too hot", "by the power brake of its node")
    return [
        f"GPU {index} ({uuid}) is slowed down {' and '.join(reasons)}"
        for index, uuid, *states in _select_visible(gpus, visible)[0]
        if (reasons := [text for text, state in zip(why, states, strict=True) if state == "Active"])
    ]


def report(visible: str | None, limit: float = TIMEOUTS.gpu_driver) -> dict[str, Any] | None:
    """``{"count": usable GPUs, "faults": [one sentence each]}``; None without nvidia-smi.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES``, the GPUs whose faults count; None: all.
        limit: seconds for nvidia-smi to answer.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    deadline = time.monotonic() + limit
    form = "--format=csv,noheader,nounits"
    both = [
        _start("nvidia-smi", f"--query-gpu={STATE}", form),
        _start("nvidia-smi", f"--query-remapped-rows={ROWS}", form),
    ]
    answers = [_answer(process, deadline) for process in both]
    if None in answers:
        return {"count": 0, "faults": [f"its GPU driver does not answer within {limit:g} s"]}
    (status, listed), (_, rows) = (answer for answer in answers if answer is not None)
    if status:
        last = next((line for line in reversed(listed.splitlines()) if line.strip()), "no output")
        return {"count": 0, "faults": [f"nvidia-smi exited with {status}: {last.strip()}"]}
    return read(listed, rows, visible)


def count(visible: str | None, limit: float = TIMEOUTS.gpu_driver, proc: Path = PROC) -> int:
    """Count the GPUs and MIG instances visible to a process; whether they work is not tested.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES``; None: all.
        limit: seconds for nvidia-smi to answer if the kernel does not list the GPUs; without an answer the count is 0.
    """
    there = len(list(proc.iterdir())) if proc.is_dir() else None
    devices = visible_devices(visible, there)
    if devices is not None:
        return len(devices)
    if there is not None:
        return there
    cards = _list_cards(limit)
    if cards is None:
        print(f"launch: nvidia-smi -L does not answer within {limit:g} s; no GPU is used", file=sys.stderr)
    return len(cards or ())


def shared_cards(instances: Sequence[str], limit: float = TIMEOUTS.gpu_driver) -> dict[str, list[str]]:
    """Return the GPUs of which several of the MIG instances are slices: GPU -> the instances.

    Args:
        instances: ``MIG-<uuid>`` each. Those whose GPU nvidia-smi does not name within `limit` seconds are left out.
    """
    wanted = {
        card: [name for name in slices if name in instances] for card, slices in (_list_cards(limit) or {}).items()
    }
    return {card: slices for card, slices in wanted.items() if len(slices) > 1}


def freest(limit: float = TIMEOUTS.gpu_driver) -> Gpu | None:
    """Return the GPU with the most free memory, the first of several.

    None if nvidia-smi is missing, fails, or does not answer within `limit` seconds, if no GPU reports its memory, or if one
    is divided into MIG instances, of which CUDA shows a process the first.
    """
    status, listed = ask("nvidia-smi", f"--query-gpu={MEMORY}", "--format=csv,noheader,nounits", limit=limit) or (1, "")
    rows = [fields for line in listed.splitlines() if len(fields := _fields(line)) == 6] if status == 0 else []
    if any(mig == "Enabled" for *_, mig, _ in rows):
        return None
    found = [
        Gpu(int(index), uuid, int(free), int(total))
        for index, uuid, free, total, _, mode in rows
        if mode != "Prohibited" and index.isdigit() and free.isdigit() and total.isdigit()
    ]
    return max(found, key=lambda gpu: (gpu.free, -gpu.index), default=None)


def read(listed: str, rows: str, visible: str | None) -> dict[str, Any]:
    """Make the `report` from the two answers of nvidia-smi, CSV without a header; ``[N/A]`` is no fault."""
    gpus = [fields for line in listed.splitlines() if len(fields := _fields(line)) == 4]
    remapped = {fields[0]: fields[1:] for line in rows.splitlines() if len(fields := _fields(line)) == 3}
    visible_gpus, slices = _select_visible(gpus, visible)
    faults = []
    for index, uuid, errors, retired in visible_gpus:
        pending, failure = remapped.get(uuid, ["", ""])
        found = {
            f"has {errors} uncorrected ECC errors": errors.isdigit() and errors != "0",
            "has pages to retire at its next reset": _yes(retired),
            "has rows to remap at its next reset": _yes(pending),
            "could not remap a row": _yes(failure),
        }
        faults += [f"GPU {index} ({uuid}) {text}" for text, true in found.items() if true]
    return {"count": len(visible_gpus) + slices, "faults": faults}


def _select_visible(gpus: Sequence[list[str]], visible: str | None) -> tuple[list[list[str]], int]:
    """The GPUs and the number of MIG instances that `visible` names; the GPU of an instance is unknown."""
    entries = visible_devices(visible, len(gpus))
    if entries is None:
        return list(gpus), 0
    whole = tuple(entry for entry in entries if entry.startswith("GPU-"))  # CUDA allows a prefix of the uuid
    named = [gpu for gpu in gpus if gpu[0] in entries or (whole and gpu[1].startswith(whole))]
    return named, sum(entry.startswith("MIG-") for entry in entries)


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.split(",")]


def _yes(text: str) -> bool:
    return text.lower() in ("yes", "1")


def _list_cards(limit: float) -> dict[str, list[str]] | None:
    """The GPUs that ``nvidia-smi -L`` names, each with its MIG instances; None if it does not answer in `limit` seconds."""
    answer = ask("nvidia-smi", "-L", limit=limit)
    cards: dict[str, list[str]] = {}
    for line in answer[1].splitlines() if answer else ():
        uuid = re.search(r"UUID: ([^)\s]+)", line)
        if line.startswith("GPU "):
            cards[uuid[1] if uuid else line] = []
        elif uuid and cards:
            cards[next(reversed(cards))].append(uuid[1])
    return None if answer is None else cards


def ask(program: str, *words: str, limit: float) -> tuple[int, str] | None:
    """Return the exit status and output of a program; None after `limit` seconds. If it is missing, 127 and nothing."""
    if shutil.which(program) is None:
        return 127, ""
    return _answer(_start(program, *words), time.monotonic() + limit)


def _start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _answer(process: subprocess.Popen[str], deadline: float) -> tuple[int, str] | None:
    """The exit status and output of `process`; None after `deadline`, when it is killed."""
    try:
        output, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a process in the D state cannot be killed; do not wait for it
            process.wait(0.5)
        assert process.stdout is not None
        process.stdout.close()
        return None
    return process.returncode, output
