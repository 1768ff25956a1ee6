"""Files that appear whole or not at all, and logs that are appended to a line at a time."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
