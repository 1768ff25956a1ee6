"""Files that appear whole or not at all, and logs that are appended to a line at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""What a file system says that has no room left: none at all, or none for this user."""


MAX_JSON_BYTES = 16 << 20
"""Limit of one JSON file, and of one line of a file of JSON lines."""

MAX_LINES_BYTES = 1 << 30
"""Limit of what `read_lines` reads: of a larger file, the end."""


class NotPlain(OSError, ValueError):
    """A file that is not opened: it is a link, a directory, a pipe or a device, or it exceeds its limit of bytes."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EINVAL, why, str(path))


def open_plain(path: Path, flags: int = os.O_RDONLY, mode: int = 0o600) -> int:
    """Open a regular file and return its descriptor; a link is not followed, and a pipe does not block.

    Raises NotPlain for anything but a regular file, and OSError as the file system does.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise NotPlain(path, "is a link, a directory, a pipe or a device, and not a plain file") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotPlain(path, "is a directory, a pipe or a device, and not a plain file")
    return handle


def read_plain(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises NotPlain for a larger one, else as `open_plain`."""
    with os.fdopen(open_plain(path), "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise NotPlain(path, f"is larger than {limit} bytes")
    return raw


def parse_json(raw: bytes) -> Any:
    """The JSON value in `raw`. Raises ValueError, also for brackets nested too deeply."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def write_atomic(path: Path, data: bytes | str, mode: int = 0o600) -> None:
    """Write `data` to `path` so that a reader, also after a crash, sees the old file or the new one, never a part.

    The file is readable by its owner alone; a `mode` of 0o666 leaves it to the umask, as for files made to be shared.
    Raises OSError as the file system does; no temporary file is left then.
    """
    raw = data.encode() if isinstance(data, str) else data
    name = str(path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp"))
    # The kernel applies the umask: reading it would mean setting it, for all threads of the process.
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
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

    Raises OSError as the file system does, ENOSPC where it is full, and NotPlain for a link, which is not followed.
    Where the last writer died in the middle of a line, the torn piece is closed off first and only it is lost.
    """
    line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
    handle = open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
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
    """The JSON value in `path`, or None where there is no such file.

    Raises ValueError for other content, more than `MAX_JSON_BYTES` of it, or anything but a plain file.
    """
    try:
        return parse_json(read_plain(path))
    except FileNotFoundError:
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; an absent file has none, and a torn line (a writer died) is left out."""
    try:
        handle = open_plain(path)
    except FileNotFoundError:
        return []
    records = []
    with os.fdopen(handle, "rb") as file:
        file.seek(max(0, os.fstat(handle).st_size - MAX_LINES_BYTES))
        while line := file.readline(MAX_JSON_BYTES):
            with contextlib.suppress(ValueError):
                record = parse_json(line)
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
