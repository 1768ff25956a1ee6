"""Open, read and write files with limits, and convert values to JSON."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a file system without free space: none at all, or none within the quota."""


MAX_JSON_BYTES = 16 << 20
"""Limit of one JSON file, and of one line of a file of JSON lines."""

MAX_JSON_ITEMS = 1_000_000
"""Limit of the commas in one JSON value: small items take 30 times their text in memory."""

BLOCK_BYTES = 1 << 16
MAX_NAMES = 100_000
"""Limit of the entries of a folder that `names_in` returns."""

FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class NotPlain(OSError, ValueError):
    """A file is refused: it is a link, a directory, a pipe or a device, or exceeds its limit of bytes."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EINVAL, why, str(path))


def open_plain(path: Path, flags: int = os.O_RDONLY, mode: int = 0o600, top: Path | None = None) -> int:
    """Open a regular file and return its descriptor; a link is not followed, and a pipe does not block.

    With `top`, a folder above the file, no folder between the two is a link either.
    Raises NotPlain for anything but a regular file, and OSError as the file system does.
    """
    folder, name = (None, str(path)) if top is None else (_open_folder(path.parent, top), path.name)
    try:
        handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise NotPlain(path, "is a link, a directory, a pipe or a device, and not a plain file") from None
        error.filename = str(path)
        raise
    finally:
        if folder is not None:
            os.close(folder)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise NotPlain(path, "is a directory, a pipe or a device, and not a plain file")
    return handle


def _open_folder(folder: Path, top: Path) -> int:
    """Open a folder that `top` contains, following no link below `top`. Raises NotPlain for one."""
    handle = os.open(top, FOLDER & ~os.O_NOFOLLOW)
    for name in folder.relative_to(top).parts:
        try:
            inner = os.open(name, FOLDER, dir_fd=handle)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise NotPlain(folder, "is a link or a file, and not a plain directory") from None
            error.filename = str(folder)
            raise
        finally:
            os.close(handle)
        handle = inner
    return handle


def names_in(folder: Path, top: Path) -> list[str]:
    """Return the names in a folder that `top` contains, at most `MAX_NAMES`; an absent one has none.

    Raises NotPlain if the folder, or one between the two, is a link or a file; and OSError as the file system does.
    """
    try:
        handle = _open_folder(folder, top)
    except FileNotFoundError:
        return []
    try:
        listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=handle)
    finally:
        os.close(handle)
    try:
        with os.scandir(listed) as entries:
            return [entry.name for _, entry in zip(range(MAX_NAMES), entries, strict=False)]
    finally:
        os.close(listed)


def read_plain(path: Path, limit: int = MAX_JSON_BYTES, top: Path | None = None) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. `top` is as for `open_plain`.

    Raises NotPlain for a larger file, and the errors of `open_plain`.
    """
    handle = open_plain(path, top=top)
    try:
        raw = os.read(handle, min(limit + 1, BLOCK_BYTES))
        if len(raw) == BLOCK_BYTES:
            with os.fdopen(handle, "rb", closefd=False) as file:
                raw += file.read(limit + 1 - len(raw))
        elif raw and (more := os.read(handle, BLOCK_BYTES)):  # a file that grows, or a short read
            with os.fdopen(handle, "rb", closefd=False) as file:
                raw += more + file.read(max(0, limit + 1 - len(raw) - len(more)))
    finally:
        os.close(handle)
    if len(raw) > limit:
        raise NotPlain(path, f"is larger than {limit} bytes")
    return raw


def parse_json(raw: bytes) -> Any:
    """Return the JSON value in `raw`. Raises ValueError, also for brackets nested too deeply and too many items."""
    if len(raw) > MAX_JSON_ITEMS and raw.count(b",") > MAX_JSON_ITEMS:
        raise ValueError(f"it has more than {MAX_JSON_ITEMS} items")
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


def read_json(path: Path, top: Path | None = None, limit: int = MAX_JSON_BYTES) -> Any | None:
    """Return the JSON value in `path`, or None if there is no such file. `top` is as for `open_plain`.

    Raises ValueError for other content, for more than `limit` bytes, and for anything but a plain file.
    """
    try:
        return parse_json(read_plain(path, limit, top))
    except FileNotFoundError:
        return None


def sync_folder(folder: Path) -> None:
    """Flush the entries of `folder` to disk, so that created, renamed and removed names survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
