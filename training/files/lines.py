"""Append lines of JSON to files, and read them: all, new ones, or the newest."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from json.scanner import make_scanner
from pathlib import Path
from typing import Any, BinaryIO

from training.files.access import BLOCK_BYTES, FULL_DISK, MAX_JSON_BYTES, open_plain, parse_json

MAX_LINES_BYTES = 1 << 30
"""Limit of `read_lines`, which reads the end of a larger file."""

LOCK_SECONDS = 2.0


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one line of JSON by one write, so that lines of several processes do not mix.

    A lock makes that true on NFS, too, where a client writes to the end of the file that it knows. An incomplete last line, left
    by a killed writer, is terminated first. Raises NotPlain for a symbolic link, and the OSError of the file system, such as
    ENOSPC.
    """
    line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
    handle = open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        _lock(handle)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:  # a disk that fills up accepts a part and raises at the next write
            line = line[os.write(handle, line) :]
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    """Lock a file until it is closed, for which an NFS client asks the server for its size.

    A file system may have no locks, and a process may have been stopped with the lock: then the line is written without.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return
        time.sleep(0.002)


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


def read_lines(path: Path, only: re.Pattern[str] | None = None) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, without incomplete lines; an absent file has none.

    With `only`, lines in which it is not found are left out.
    """
    try:
        handle = open_plain(path)
    except FileNotFoundError:
        return []
    with os.fdopen(handle, "rb", 0) as file:
        file.seek(max(0, os.fstat(handle).st_size - MAX_LINES_BYTES))
        return [
            record for block, whole in line_blocks(file, MAX_LINES_BYTES) if whole for record in records_in(block, only)
        ]


def line_blocks(file: BinaryIO, limit: int) -> Iterator[tuple[bytes, bool]]:
    """Yield the next `limit` bytes of `file` in blocks that end with a line, each with whether its lines are whole.

    A line of more than `MAX_JSON_BYTES` comes in pieces, which are not whole. The last line may be incomplete.
    """
    rest, in_piece = b"", False
    while limit > 0 and (data := file.read(min(16 * BLOCK_BYTES, limit))):
        limit -= len(data)
        if in_piece:
            cut = data.find(b"\n") + 1
            yield data[: cut or len(data)], False
            data, in_piece = data[cut:] if cut else b"", not cut
        cut = data.rfind(b"\n") + 1
        if cut:
            yield rest + data[:cut], True
            rest = data[cut:]
        else:
            rest += data
        if len(rest) > MAX_JSON_BYTES:
            yield rest, False
            rest, in_piece = b"", True
    if rest:
        yield rest, True


_decoder: Any = json.JSONDecoder()
_decode = make_scanner(_decoder)


def records_in(block: bytes, only: re.Pattern[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in the lines of `block`; other lines are left out, and those without `only`."""
    try:
        text = block.decode() if len(block) < 2 * 16 * BLOCK_BYTES else ""
    except UnicodeDecodeError:
        text = ""
    if not text:
        yield from _records_one_by_one(block, only)
        return
    start, end = 0, len(text)
    while start < end:
        stop = text.find("\n", start)
        if stop < 0:
            stop = end
        if only is None or only.search(text, start, stop):
            if text[start] == "{" and text[stop - 1] == "}":  # else the decoder might go on in the next line
                try:
                    record, last = _decode(text, start)
                except (ValueError, RecursionError, StopIteration):
                    last = -1
                if last == stop:
                    yield record
            else:
                yield from _records_one_by_one(text[start:stop].encode(), None)
        start = stop + 1


def _records_one_by_one(block: bytes, only: re.Pattern[str] | None) -> Iterator[dict[str, Any]]:
    for line in block.split(b"\n"):
        line = line.strip(b"\0 \t\r")  # zeros: a gap that two clients of a network file system left
        if line[:1] == b"{" and (only is None or only.search(line.decode(errors="replace"))):
            with contextlib.suppress(ValueError):
                record = parse_json(line)
                if isinstance(record, dict):
                    yield record


def newest_record(path: Path, key: str) -> dict[str, Any] | None:
    """Return the newest record with `key` of a file of JSON lines; None if there is none. See `newest_records`."""
    return newest_records(path, [key], lambda key, record: key in record).get(key)


def newest_records(
    path: Path,
    words: Sequence[str],
    accept: Callable[[str, Mapping[str, Any]], bool],
    limit: int = MAX_LINES_BYTES,
    one: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return, for each of `words`, the newest record in which it is a string and that `accept(word, record)` accepts.

    The file of JSON lines is read from its end, at most `limit` bytes; an absent one has no records. With `one`, only the
    newest record of all words is returned.
    """
    found: dict[str, dict[str, Any]] = {}
    try:
        handle = open_plain(path)
    except FileNotFoundError:
        return found
    with os.fdopen(handle, "rb", 0) as file:
        for lines in _blocks_from_end(file, os.fstat(handle).st_size, limit):
            newest = {word: _newest_in(lines, word, accept) for word in words if word not in found}
            in_block = {word: each for word, each in newest.items() if each is not None}
            if one and in_block:
                word = max(in_block, key=lambda word: in_block[word][0])
                return {word: in_block[word][1]}
            found |= {word: record for word, (_, record) in in_block.items()}
            if len(found) == len(words):
                break
    return found


def _newest_in(
    lines: bytes, word: str, accept: Callable[[str, Mapping[str, Any]], bool]
) -> tuple[int, dict[str, Any]] | None:
    """The last line that is wanted, with its position; None if there is none."""
    quoted, end = json.dumps(word).encode(), len(lines)
    while (at := lines.rfind(quoted, 0, end)) >= 0:
        start, stop = lines.rfind(b"\n", 0, at) + 1, lines.find(b"\n", at)
        with contextlib.suppress(ValueError):
            record = parse_json(lines[start : stop if stop >= 0 else len(lines)])
            if isinstance(record, dict) and accept(word, record):
                return start, record
        end = start
    return None


def _blocks_from_end(file: BinaryIO, size: int, limit: int) -> Iterator[bytes]:
    """Yield blocks of whole lines, the last one of the file first; lines of more than `MAX_JSON_BYTES` are spoiled."""
    end, rest, length = size, b"", BLOCK_BYTES
    while end > 0 and size - end < limit:
        start = max(0, end - length)
        file.seek(start)
        data = file.read(end - start)
        end, length = start, min(2 * length, 16 * BLOCK_BYTES)
        cut = data.find(b"\n") if start else -1
        if cut < 0 and start:
            rest = data + rest if len(rest) < MAX_JSON_BYTES else b"\0"
            continue
        yield data[cut + 1 :] + rest
        rest = data[:cut] if start else b""
