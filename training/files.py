"""Files that appear whole or not at all, and logs that are appended to a line at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""What a file system says that has no room left: none at all, or none for this user."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, also after a crash, sees the old file or the new one, never a part.

    Raises OSError as the file system does; no temporary file is left then.
    """
    raw = data.encode() if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp makes files that only the owner reads
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    sync_folder(path.parent)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one line of JSON by one write, so that lines of several processes never mix.

    Raises OSError as the file system does, ENOSPC where it is full.
    Where the last writer died in the middle of a line, the torn piece is closed off first and only it is lost.
    """
    line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:  # a disk that fills up takes a part, and raises at the next try
            line = line[os.write(handle, line) :]
    finally:
        os.close(handle)


class Lines:
    """Appends lines to files, and where the disk is full keeps them for when there is room: nothing is lost, in order.

    Attributes:
        most: how many are kept; more raise OSError.
    """

    most = 100_000

    def __init__(self) -> None:
        self._kept: deque[tuple[Path, Mapping[str, Any]]] = deque()
        self._lock = threading.Lock()  # what saves in the background has its say, too

    def append(self, path: Path, record: Mapping[str, Any]) -> None:
        """As `append_line`, now or later. Raises OSError for anything but a full disk."""
        with self._lock:
            self._kept.append((path, record))
            try:
                self._write()
            except OSError as error:
                if error.errno not in FULL_DISK or len(self._kept) > self.most:
                    raise

    def flush(self) -> None:
        """Write what was kept. Raises OSError where there is no room still."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        while self._kept:
            append_line(*self._kept[0])
            self._kept.popleft()


def read_json(path: Path) -> Any | None:
    """The JSON value in `path`, or None where there is no such file. Raises json.JSONDecodeError for other content."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; an absent file has none, and a torn line (a writer died) is left out."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    records = []
    for line in raw.splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` (created, renamed, removed) last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
