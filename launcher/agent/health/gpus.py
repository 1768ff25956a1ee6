"""The GPUs of this node as NVIDIA's driver reports them, through nvidia-smi: a sick driver hangs whoever asks it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.config.timeouts import TIMEOUTS
from training.distributed.visible import visible_devices

PROC = Path("/proc/driver/nvidia/gpus")
"""A folder for each GPU, made by the driver."""

STATE = "index,uuid,ecc.errors.uncorrected.volatile.total,retired_pages.pending"
ROWS = "gpu_uuid,remapped_rows.pending,remapped_rows.failure"
"""What is asked of each GPU. Source: ``nvidia-smi --help-query-gpu`` and ``--help-query-remapped-rows``; GPUs before Ampere
retire pages, later ones remap rows, and each says ``[N/A]`` to the other."""


def report(visible: str | None, limit: float = TIMEOUTS.gpu_driver) -> dict[str, Any] | None:
    """``{"count": GPUs that can be used, "faults": [one sentence each]}``; None where there is no nvidia-smi to ask.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES``, which says whose faults count; None: all of the node's.
        limit: seconds for the driver to answer.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    deadline = time.monotonic() + limit
    form = "--format=csv,noheader,nounits"
    both = [_ask(f"--query-gpu={STATE}", form), _ask(f"--query-remapped-rows={ROWS}", form)]
    answers = [_answer(process, deadline) for process in both]
    if None in answers:
        return {"count": 0, "faults": [f"its GPU driver does not answer within {limit:g} s"]}
    (status, listed), (_, rows) = (answer for answer in answers if answer is not None)
    if status:
        last = next((line for line in reversed(listed.splitlines()) if line.strip()), "no word")
        return {"count": 0, "faults": [f"nvidia-smi ends with {status}: {last.strip()}"]}
    return read(listed, rows, visible)


def count(visible: str | None, limit: float = TIMEOUTS.gpu_driver, proc: Path = PROC) -> int:
    """Count the GPUs and MIG instances that are visible to a process of this machine; whether they work is not tested.

    Args:
        visible: ``CUDA_VISIBLE_DEVICES``; None: all.
        limit: seconds for nvidia-smi to answer, where the kernel does not list the GPUs; after that there are none.
    """
    there = len(list(proc.iterdir())) if proc.is_dir() else None
    devices = visible_devices(visible, there)
    if devices is not None:
        return len(devices)
    if there is not None:
        return there
    if shutil.which("nvidia-smi") is None:
        return 0
    answer = _answer(_ask("-L"), time.monotonic() + limit)
    if answer is None:
        print(f"launch: nvidia-smi -L does not answer within {limit:g} s; no GPU is used", file=sys.stderr)
        return 0
    return sum(line.startswith("GPU ") for line in answer[1].splitlines())


def read(listed: str, rows: str, visible: str | None) -> dict[str, Any]:
    """`report` from the two answers of nvidia-smi, as CSV without a head. What a GPU or driver does not know is no fault."""
    gpus = [fields for line in listed.splitlines() if len(fields := _fields(line)) == 4]
    remapped = {fields[0]: fields[1:] for line in rows.splitlines() if len(fields := _fields(line)) == 3}
    mine, slices = _of_ours(gpus, visible)
    faults = []
    for index, uuid, errors, retired in mine:
        pending, failure = remapped.get(uuid, ["", ""])
        found = {
            f"has {errors} uncorrected ECC errors": errors.isdigit() and errors != "0",
            "has pages to retire at its next reset": _yes(retired),
            "has rows to remap at its next reset": _yes(pending),
            "could not remap a row": _yes(failure),
        }
        faults += [f"GPU {index} ({uuid}) {text}" for text, true in found.items() if true]
    return {"count": len(mine) + slices, "faults": faults}


def _of_ours(gpus: Sequence[list[str]], visible: str | None) -> tuple[list[list[str]], int]:
    """The GPUs that `visible` names, and how many MIG instances it names, which do not tell their GPU."""
    entries = visible_devices(visible, len(gpus))
    if entries is None:
        return list(gpus), 0
    whole = tuple(entry for entry in entries if entry.startswith("GPU-"))  # may be cut short, as CUDA allows
    mine = [gpu for gpu in gpus if gpu[0] in entries or (whole and gpu[1].startswith(whole))]
    return mine, sum(entry.startswith("MIG-") for entry in entries)


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.split(",")]


def _yes(text: str) -> bool:
    return text.lower() in ("yes", "1")


def _ask(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["nvidia-smi", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _answer(process: subprocess.Popen[str], deadline: float) -> tuple[int, str] | None:
    """Its exit status and output; None where it did not end in time, and then it is killed."""
    try:
        output, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # in the D state, it cannot be killed, and must not hold us
            process.wait(0.5)
        assert process.stdout is not None
        process.stdout.close()
        return None
    return process.returncode, output
