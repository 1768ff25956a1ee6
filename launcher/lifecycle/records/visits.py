"""Requests of clients to look inside a running run: ``visits/ID.json`` in the run directory.

A client leaves a request, which names its addresses and a key, and listens. The supervisor of the run finds it and sends its id to
the agents; a session on each node that it is about connects to the client (`launcher.agent.inside`). The client removes it.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launcher.config.codec import to_data, to_json
from training.errors import ConfigError
from training.files import NotPlain, names_in, open_plain, parse_json, read_plain, write_atomic
from training.flags.typed import from_data

Kind = Literal["stacks", "command", "shell", "debug", "profile"]

ID = re.compile(r"([0-9a-f]{32})\.json")
KEY = re.compile(r"[0-9a-f]{64}")
MAX_BYTES = 64 * 1024
MAX_FAILURE = 1000
OLD = 3600.0
"""Age in seconds of requests that a client has left behind, and which the next client removes."""


@dataclass(frozen=True)
class VisitRequest:
    """What a client asks for.

    Attributes:
        addresses: IP addresses of the client's machine, to be tried in this order.
        key: 64 hexadecimal digits, chosen for this request; both ends prove that they have it.
        ranks: the nodes of these ranks.
        nodes: these nodes, by their numbers in the placement; without ranks and nodes, every node.
    """

    kind: Kind
    addresses: list[str]
    port: int
    key: str
    ranks: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not (KEY.fullmatch(self.key) and 0 < self.port < 65536 and 0 < len(self.addresses) <= 256):
            raise ConfigError("a request needs a key of 64 hexadecimal digits, a port and 1 to 256 addresses.")


def prepare(folder: Path) -> None:
    """Make the folder of requests: an NFS client reports new names in a folder at once, but not a new folder."""
    with suppress(FileExistsError):
        folder.mkdir(0o700)


def leave(folder: Path, request: VisitRequest) -> str:
    """Write a request into `folder`; return its id. Raises OSError."""
    prepare(folder)
    _check(folder, folder.lstat(), stat.S_ISDIR)
    _remove_old(folder)
    visit = secrets.token_hex(16)
    write_atomic(folder / f"{visit}.json", to_json(to_data(request)))
    return visit


def remove(folder: Path, visit: str) -> None:
    """Remove a request and the reasons of sessions that did not connect."""
    with suppress(OSError):
        for name in names_in(folder, folder.parent):
            if name.startswith(f"{visit}."):
                (folder / name).unlink(missing_ok=True)


def waiting(folder: Path) -> set[str]:
    """Return the ids of the requests in `folder`. Raises OSError."""
    return {match[1] for name in names_in(folder, folder.parent) if (match := ID.fullmatch(name))}


def read(folder: Path, visit: str) -> VisitRequest:
    """Return a request, which this user has written.

    Raises:
        OSError: it cannot be read, is larger than `MAX_BYTES`, or another user could have written it.
        ValueError: it is not a request.
    """
    path = folder / f"{visit}.json"
    handle = open_plain(path, top=folder.parent)
    try:
        _check(path, os.fstat(handle), stat.S_ISREG)
        raw = os.read(handle, MAX_BYTES + 1)
    finally:
        os.close(handle)
    if len(raw) > MAX_BYTES:
        raise NotPlain(path, f"is larger than {MAX_BYTES} bytes")
    return from_data(VisitRequest, parse_json(raw), str(path))


def _check(path: Path, found: os.stat_result, kind: Callable[[int], bool]) -> None:
    if not kind(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise NotPlain(path, "does not belong to this user, or others can write it")


def leave_failure(folder: Path, visit: str, node: int, reason: str) -> None:
    """Record for the client why the session of a node does not connect."""
    with suppress(OSError):
        write_atomic(folder / f"{visit}.{node}.failed", reason[:MAX_FAILURE])


def failures(folder: Path, visit: str) -> dict[int, str]:
    """Return why sessions do not connect, by node."""
    found = {}
    with suppress(OSError):
        for name in names_in(folder, folder.parent):
            if match := re.fullmatch(rf"{visit}\.([0-9]{{1,6}})\.failed", name):
                found[int(match[1])] = read_plain(folder / name, 4 * MAX_FAILURE, folder.parent).decode(
                    errors="replace"
                )
    return found


def _remove_old(folder: Path) -> None:
    """Remove the requests of clients that were killed."""
    for name in names_in(folder, folder.parent):
        with suppress(OSError):
            if time.time() - (folder / name).lstat().st_mtime > OLD:
                (folder / name).unlink()
