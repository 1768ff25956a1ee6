from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.rank.output import DropOnFullDisk
from tests.training.test_files import fill

TALKS = """
import sys
from pathlib import Path
from launcher.rank.output import drop_output_on_full_disk

drop_output_on_full_disk()
print("before")
filler = Path(sys.argv[1])
with filler.open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(1 << 12))
    except OSError:
        pass
for number in range(1000):
    print("while it is full", number)
print("and this", file=sys.stderr)
filler.unlink()
print("after")
"""


def test_a_process_outlives_the_disk_that_its_output_is_on(disk: Path) -> None:
    log = disk / "log"
    with log.open("wb") as out:
        subprocess.run([sys.executable, "-c", TALKS, disk / "filler"], stdout=out, stderr=subprocess.STDOUT, check=True)
    lines = log.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert re.fullmatch(r".*launch: \d+ bytes are missing here: the disk was full", lines[-2])
    assert "while it is full 999" not in lines


def test_what_is_dropped_is_counted_until_there_is_room(disk: Path) -> None:
    filler = fill(disk)
    with DropOnFullDisk(disk / "log", "w") as file:
        assert [file.write(b"abc"), file.write(b"de")] == [3, 2]
        assert file.dropped == 5
        filler.unlink()
        file.write(b"f")
        assert file.dropped == 0
    assert (disk / "log").read_text() == "launch: 5 bytes are missing here: the disk was full\nf"


def test_other_errors_are_not_hidden() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        assert DropOnFullDisk(full.fileno(), "w", closefd=False).write(b"x") == 1
    with Path("/dev/null").open("rb") as read_only, pytest.raises(OSError, match="descriptor") as raised:
        DropOnFullDisk(read_only.fileno(), "w", closefd=False).write(b"x")
    assert raised.value.errno == errno.EBADF
