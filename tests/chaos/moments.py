"""Find the moments at which a run is killed, from what the kernel reports of its files (inotify(7))."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import signal
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.files import read_lines

KINDS = ("step", "save", "epoch")
CHANGES = 0x2 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200  # IN_MODIFY, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE
FOLDER = 0x40000000  # IN_ISDIR
HEADER = struct.Struct("iIII")
PATIENCE = 10.0  # seconds for ranks whose peer was killed to end by themselves


@dataclass(frozen=True)
class Moment:
    """The `count`-th occurrence of `kind`: a logged step, a change in the folder of checkpoints, or a line at an epoch's end.

    Attributes:
        victims: ranks that are killed at once.
        alone: the others are not killed with them, but end by themselves.
    """

    kind: str
    count: int
    victims: tuple[int, ...]
    alone: bool

    @classmethod
    def draw(cls, chance: random.Random, size: int, steps: int) -> Moment:
        """A random moment in a run of `size` ranks with `steps` steps."""
        kind = chance.choice(KINDS)
        count = chance.randint(1, {"step": steps // 2, "save": 24, "epoch": 3}[kind])
        victims = tuple(sorted(chance.sample(range(size), chance.randint(1, size))))
        return cls(kind, count, victims, alone=chance.random() < 0.5)


class Killer:
    """Kills ranks of one life of a run with SIGKILL at a moment; used as the `watch` of `tests.training.ranks.spawn`.

    Attributes:
        struck: whether the moment came before the life ended.
    """

    def __init__(self, run_dir: Path, saves: Path, moment: Moment) -> None:
        self.moment, self.struck = moment, False
        self._metrics, self._saves = run_dir / "metrics.jsonl", saves
        self._began = len(read_lines(self._metrics))
        self._changes = 0
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = self._libc.inotify_init1(os.O_CLOEXEC)
        self._watched: dict[int, Path] = {}
        saves.mkdir(parents=True, exist_ok=True)
        for folder in (run_dir, saves):
            self._watch(folder)

    def __call__(self, pids: Sequence[int]) -> None:
        """Wait for the moment, and kill; returns at once if the ranks end before."""
        handles = [os.pidfd_open(pid) for pid in pids]
        try:
            left = list(handles)
            while left and not self.struck:
                ready, _, _ = select.select([self._inotify, *left], [], [])
                if self._inotify in ready and self._read():
                    self._kill(handles)
                left = [handle for handle in left if handle not in ready]
        finally:
            for handle in (*handles, self._inotify):
                os.close(handle)

    def _kill(self, handles: Sequence[int]) -> None:
        self.struck = True
        for rank in self.moment.victims:
            _send(handles[rank])
        deadline = time.monotonic() + (PATIENCE if self.moment.alone else 0.0)
        for handle in handles:
            select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            _send(handle)

    def _watch(self, folder: Path) -> None:
        number = self._libc.inotify_add_watch(self._inotify, os.fsencode(folder), CHANGES)
        if number >= 0:  # else it was renamed in the meantime
            self._watched[number] = folder

    def _read(self) -> bool:
        """Take the reported changes; returns whether the moment has come."""
        data, at = os.read(self._inotify, 1 << 16), 0
        while at < len(data):
            number, mask, _, length = HEADER.unpack_from(data, at)
            name = data[at + HEADER.size : at + HEADER.size + length].rstrip(b"\0").decode()
            at += HEADER.size + length
            folder = self._watched.get(number, self._saves)
            if folder == self._metrics.parent:
                continue
            self._changes += 1
            if mask & FOLDER and mask & 0x100 and folder == self._saves:
                self._watch(folder / name)
        if self.moment.kind == "save":
            return self._changes >= self.moment.count
        lines = read_lines(self._metrics)[self._began :]
        if self.moment.kind == "step":
            return sum("loss" in line for line in lines) >= self.moment.count
        return sum("eval" in line or float(line.get("epoch", 0.5)).is_integer() for line in lines) >= self.moment.count


def _send(handle: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        signal.pidfd_send_signal(handle, signal.SIGKILL)
