"""Xid errors in records of the kernel's log."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launcher.agent.health import kernel_log
from launcher.agent.health.kernel_log import xid_errors


def record(text: str, minutes: float = 12.0) -> str:
    return f"3,1204,{int((time.monotonic() - 60 * minutes) * 1e6)},-;{text}\n"


def test_errors_of_gpus_are_named_with_their_age(tmp_path: Path) -> None:
    source = tmp_path / "kmsg"
    lost = "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
    source.write_text(
        record("usb 1-1: new device")
        + record(lost, 90)
        + " SUBSYSTEM=pci\n"
        + record("NVRM: Xid (PCI:0000:5e:00): 48, pid=7, name=python, An uncorrectable double bit error")
        + record(lost)
        + "torn"
    )
    assert xid_errors(source) == [
        "GPU at PCI 0000:5e:00 had Xid 48 12 min ago: pid=7, name=python, An uncorrectable double bit error",
        "GPU at PCI 0000:3b:00 had Xid 79 12 min ago: pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    ]


@pytest.mark.parametrize("number", [13, 31, 43, 45])
def test_errors_that_programs_cause_are_left_out(tmp_path: Path, number: int) -> None:
    source = tmp_path / "kmsg"
    source.write_text(record(f"NVRM: Xid (PCI:0000:3b:00): {number}, pid=7, Ch 00000008"))
    assert xid_errors(source) == []


def test_a_log_that_cannot_be_read_and_one_of_anything_say_nothing(tmp_path: Path) -> None:
    assert xid_errors(tmp_path / "absent") == []
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(1 << 16))
    assert xid_errors(noise) == []
    secret = tmp_path / "secret"
    secret.write_text(record("NVRM: Xid (PCI:0000:3b:00): 79, x"))
    many = "".join(record(f"NVRM: Xid (PCI:0000:{n:02x}:00): 79, {'x' * 999}") for n in range(50))
    secret.write_text(many)
    assert len(xid_errors(secret)) <= kernel_log.MOST_SHOWN
    assert max(map(len, xid_errors(secret))) < 200


def test_the_real_log_is_read_to_its_end_without_waiting() -> None:
    assert isinstance(xid_errors(), list)
