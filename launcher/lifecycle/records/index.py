"""Index of large logs in the user's cache folder: how far each was read, and what it added up to.

An entry is used if the bytes that it stands for have the same hash now, or if the file has the same inode, size and
times as then. So it never changes a result.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from launcher.lifecycle.records.attempts import AttemptsDigest
from launcher.lifecycle.records.metrics import MetricsDigest
from launcher.lifecycle.records.user_files import remove_old, user_folder
from training.files import (
    MAX_JSON_BYTES,
    MAX_LINES_BYTES,
    line_blocks,
    open_plain,
    read_plain,
    records_in,
    write_atomic,
)

LARGE = 1 << 18
"""Bytes of a log from which on it has an entry."""

VERSION = 1

SAME_TIME = 2.0
"""Seconds within which two changes of a file may have the same time, by the resolution of file systems."""


D = TypeVar("D", MetricsDigest, AttemptsDigest)


def read_digests(metrics: Path, events: Path) -> tuple[MetricsDigest, AttemptsDigest]:
    """Return the digests of the two logs of a run; an absent log has no records. Raises OSError for an unreadable one."""
    index = Index(metrics.parent)
    found = index.digest(metrics, MetricsDigest), index.digest(events, AttemptsDigest)
    index.save()
    return found


class Index:
    """The entries of one run directory."""

    def __init__(self, run: Path) -> None:
        self.run = os.path.realpath(run)
        self._path: Path | None = None
        self._loaded: dict[str, Any] | None = None
        self._news, self._changed = (
            0,
            False,
        )  # bytes that no saved entry stands for; whether the entries should be saved

    def digest(self, log: Path, kind: type[D]) -> D:
        """Return the digest of a log."""
        try:
            handle = open_plain(log)
        except FileNotFoundError:
            return kind()
        with os.fdopen(handle, "rb", 0) as file:
            size = os.fstat(handle).st_size
            if LARGE <= size <= MAX_LINES_BYTES:
                return self._continued(file, log.name, kind)
            digest = kind()
            file.seek(max(0, size - MAX_LINES_BYTES))
            for block, whole in line_blocks(file, MAX_LINES_BYTES):
                if whole:
                    digest.add(records_in(block))
            return digest

    def _continued(self, file: BinaryIO, name: str, kind: type[D]) -> D:
        """The digest of a large log, from where its entry ends."""
        info = os.fstat(file.fileno())
        facts = [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]
        entry = self._entries().get(name, {})
        same = entry.get("facts") == facts and entry["settled"]
        if same and entry["end"] == info.st_size:
            return kind.unpacked(entry["digest"])
        start, hasher = _hashed(file, entry, info.st_size)
        digest = kind.unpacked(entry["digest"]) if start else kind()
        file.seek(start)
        at, end, found, rest = start, start, hasher.hexdigest(), b""
        for block, whole in line_blocks(file, info.st_size - start):
            if whole and not block.endswith(b"\n"):
                rest = block  # an incomplete last line
                break
            hasher.update(block)
            at += len(block)
            if whole:
                digest.add(records_in(block))
            if block.endswith(b"\n"):
                end, found = at, hasher.hexdigest()
        settled = time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) > SAME_TIME * 1e9
        self._news += end - start
        self._changed |= self._news >= LARGE // 4 or (settled and not same)
        new = {"facts": facts, "settled": settled, "end": end, "hash": found, "digest": digest.packed()}
        self._entries()[name] = new
        digest.add(records_in(rest))
        return digest

    def _entries(self) -> dict[str, Any]:
        if self._loaded is None:
            self._loaded = {}
            folder = user_folder("logs")
            if folder is not None:
                self._path = folder / f"{_sha256(os.fsencode(self.run))[:32]}.json"
                with suppress(OSError, ValueError, KeyError, TypeError):
                    checksum, _, text = read_plain(self._path).partition(b"\n")
                    data = json.loads(text) if checksum == _checksum(text) else {}
                    if data["version"] == VERSION and data["run"] == self.run:
                        self._loaded = data["logs"]
        return self._loaded

    def save(self) -> None:
        """Write the entries, if they save much reading; nothing is written if the folder cannot be."""
        if self._changed and self._path is not None:
            text = json.dumps({"version": VERSION, "run": self.run, "logs": self._entries()}).encode()
            if len(text) < MAX_JSON_BYTES:
                with suppress(OSError):
                    write_atomic(self._path, _checksum(text) + b"\n" + text)
                    remove_old(self._path.parent)


def _checksum(text: bytes) -> bytes:
    return _sha256(text).encode()


def _sha256(text: bytes) -> str:
    import hashlib  # takes 3 ms, and few commands meet a log that is long enough for an index

    return hashlib.sha256(text).hexdigest()


def _hashed(file: BinaryIO, entry: Mapping[str, Any], size: int) -> tuple[int, Any]:
    """Return where an entry ends and the hash of the file up to there; 0 if the file is no longer what it stands for."""
    import xxhash

    hasher, left = xxhash.xxh3_128(), entry.get("end", 0)
    if 0 < left <= size:
        while left and (data := file.read(min(LARGE, left))):
            hasher.update(data)
            left -= len(data)
        if not left and hasher.hexdigest() == entry["hash"]:
            return entry["end"], hasher
    return 0, xxhash.xxh3_128()
