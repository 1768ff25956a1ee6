"""Write files atomically, append lines of JSON, read both with limits, and convert values to JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a file system without free space: none at all, or none within the quota."""


MAX_JSON_BYTES = 16 << 20
"""Limit of one JSON file, and of one line of a file of JSON lines."""

BLOCK_BYTES = 1 << 16
MAX_LINES_BYTES = 1 << 30
"""Limit of `read_lines`, which reads the end of a larger file."""


class NotPlain(OSError, ValueError):
    """A file is refused: it is a link, a directory, a pipe or a device, or exceeds its limit of bytes."""

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
    """Return the content of a regular file of at most `limit` bytes.

    Raises NotPlain for a larger file, and the errors of `open_plain`.
    """
    with os.fdopen(open_plain(path), "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise NotPlain(path, f"is larger than {limit} bytes")
    return raw


def parse_json(raw: bytes) -> Any:
    """Return the JSON value in `raw`. Raises ValueError, also for brackets nested too deeply."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def write_atomic(path: Path, data: bytes | str, mode: int = 0o600) -> None:
    """Write `data` to `path` atomically: a reader sees the old file or the new one, also after a crash.

    With the default `mode` only the owner can read the file; with 0o666 the umask decides.
    Raises the OSError of the file system, after the temporary file is removed.
    """
    raw = data.encode() if isinstance(data, str) else data
    name = str(path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp"))
    # The kernel applies the umask, which cannot be read without setting it for all threads of the process.
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


def plain(value: Any) -> Any:
    """Return `value` as a value of JSON, for metrics and results.

    Tensors and numpy arrays become numbers (0 dimensions) or nested lists; the keys of mappings become strings; tuples
    and sets become lists. JSON has no number that is not finite: it becomes the string "NaN", "Infinity" or "-Infinity",
    which `float` reads. Anything else becomes its `str`. A tensor on a GPU is waited for.
    """
    match value:
        case None | bool():
            return value
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else _spell(value)
        case str():
            return str(value)
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
    if callable(getattr(value, "tolist", None)) and not isinstance(value, type):
        items = value.tolist()
        return plain(items) if items is not value else str(value)
    return str(value)


def _spell(number: float) -> str:
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one line of JSON by one write, so that lines of several processes do not mix.

    An incomplete last line, left by a killed writer, is terminated first. Raises NotPlain for a symbolic link, and the
    OSError of the file system, such as ENOSPC.
    """
    line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
    handle = open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:  # a disk that fills up accepts a part and raises at the next write
            line = line[os.write(handle, line) :]
    finally:
        os.close(handle)


class Lines:
    """Append lines to files in order, and keep them in memory while the disk is full.

    Attributes:
        most: lines that are kept; more raise OSError.
    """

    most = 100_000

    def __init__(self) -> None:
        self._kept: deque[tuple[Path, Mapping[str, Any]]] = deque()
        self._lock = threading.Lock()  # the writer of checkpoints appends from its own thread

    def append(self, path: Path, record: Mapping[str, Any]) -> None:
        """Append a line now, or later if the disk is full. Raises the other errors of `append_line`."""
        with self._lock:
            self._kept.append((path, record))
            try:
                self._write()
            except OSError as error:
                if error.errno not in FULL_DISK or len(self._kept) > self.most:
                    raise

    def flush(self) -> None:
        """Write the kept lines. Raises OSError if the disk is still full."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        while self._kept:
            append_line(*self._kept[0])
            self._kept.popleft()


def read_json(path: Path) -> Any | None:
    """Return the JSON value in `path`, or None if there is no such file.

    Raises ValueError for other content, for more than `MAX_JSON_BYTES`, and for anything but a plain file.
    """
    try:
        return parse_json(read_plain(path))
    except FileNotFoundError:
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, without incomplete lines; an absent file has none."""
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


def newest_record(path: Path, key: str) -> dict[str, Any] | None:
    """Return the newest record with `key` of a file of JSON lines, which is read from its end; None if there is none.

    Older records than the last `MAX_JSON_BYTES` of the file do not count.
    """
    word = json.dumps(key).encode()
    try:
        handle = open_plain(path)
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        end = size = os.fstat(handle).st_size
        rest = b""
        while end and size - end < MAX_JSON_BYTES:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            block = file.read(end - start) + rest
            rest, _, lines = block.partition(b"\n") if start else (b"", b"", block)
            for line in reversed(lines.split(b"\n")) if word in lines else ():
                with contextlib.suppress(ValueError):
                    record = parse_json(line) if word in line else None
                    if isinstance(record, dict) and key in record:
                        return record
            end = start
    return None


def sync_folder(folder: Path) -> None:
    """Flush the entries of `folder` to disk, so that created, renamed and removed names survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
