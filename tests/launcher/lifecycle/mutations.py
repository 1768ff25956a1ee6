"""Damaged and hostile run directories, made from real ones: a file x what can be wrong with it."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ESCAPES = "\x1b]0;evil\x07\x1b[2J\x9b31m\x85\u202e\u2066\x00\x08\x7f"
HUGE = 8 << 30

VALUES: dict[str, Any] = {
    "null": None, "true": True, "text": "x", "empty text": "", "-1": -1, "0": 0, "huge": 10**400, "2^63": 2**63, "1e308": 1e308,
    "nan": float("nan"), "infinity": float("inf"), "list": [], "nested list": [[[]]], "table": {}, "table of escapes": {ESCAPES: ESCAPES},
    "escapes": ESCAPES, "long": "n" * 5000, "option": "--me", "jobs": "2,5", "path": "../../outside/.bashrc", "absolute": "/etc/passwd",
    "surrogate": "\udcff", "state": "running",
}  # fmt: skip
"""Values that replace one of a JSON file."""

CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "torn": lambda old: old[: len(old) // 2],
    "no newline": lambda old: old.rstrip(b"\n"),
    "zeros": lambda old: bytes(len(old) or 10),
    "zeros inside": lambda old: old[: len(old) // 2] + bytes(100) + old[len(old) // 2 :],
    "no UTF-8": lambda old: old + b"\xff\xfe\xc3\x28\n",
    "UTF-16": lambda old: old.decode(errors="replace").encode("utf-16"),
    "BOM": lambda old: b"\xef\xbb\xbf" + old,
    "brackets": lambda _: b"[" * 100_000,
    "braces": lambda _: b'{"a":' * 100_000,
    "many items": lambda _: b"[" + b"[]," * 3_000_000 + b"[]]",
    "null": lambda _: b"null\n",
    "number": lambda _: b"9" * 5000 + b"\n",
    "list": lambda _: b"[]\n",
    "table": lambda _: b"{}\n",
    "escapes": lambda _: f"{ESCAPES}\n".encode() + b"\x9b31m\x1b[31m red\n",
    "twice": lambda old: old + old,
    "returns": lambda old: old.replace(b"\n", b"\r"),
    "long line": lambda old: b"x" * 3_000_000 + b"\n" + old,
}
"""What a file can contain, made from what it contains."""


@dataclass(frozen=True)
class Mutation:
    """A change of one file of a run directory."""

    file: str
    kind: str
    apply: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}"


def mutations(template: Path, outside: Path, generator: random.Random, values: int) -> Iterator[Mutation]:
    """All changes of the kind of files, of their content, and `values` changes of single values in JSON files.

    Args:
        template: a run directory.
        outside: a folder with the file ``.bashrc``, to which links point.
        generator: chooses the values.
    """
    files = [
        path.relative_to(template)
        for path in sorted(template.rglob("*"))
        if path.is_file() and "code" not in path.parts
    ]
    for file in files:
        for kind, content in CONTENTS.items():
            yield Mutation(str(file), kind, lambda path, content=content: _rewrite(path, content))  # type: ignore[misc]
    folders = [
        path.relative_to(template) for path in sorted(template.rglob("*")) if path.is_dir() and "code" not in path.parts
    ]
    for file in (*files, *folders, Path("checkpoints")):
        for kind, make in _kinds(outside).items():
            yield Mutation(str(file), kind, lambda path, make=make: _replace(path, make))  # type: ignore[misc]
    texts = [file for file in files if file.suffix in (".json", ".jsonl")]
    for _ in range(values):
        file, name = generator.choice(texts), generator.choice(sorted(VALUES))
        yield Mutation(str(file), f"a value is {name}", _valued(VALUES[name], generator.random()))
    for name in ("x" * 250, "a\x1b[2Jb", "new\nline", "\udcff", "-rf", "'; touch pwned", "\u202etxt"):
        yield Mutation("logs/1/0.log", f"beside {name[:20]!r}", lambda path, name=name: _beside(path, name))  # type: ignore[misc]


def _kinds(outside: Path) -> dict[str, Callable[[Path], None]]:
    """What can be in the place of a file or a folder."""
    return {
        "missing": lambda path: None,
        "folder": lambda path: path.mkdir(parents=True),
        "pipe": os.mkfifo,
        "socket": _socket,
        "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "link outside": lambda path: path.symlink_to(outside / ".bashrc"),
        "link to a folder": lambda path: path.symlink_to(outside),
        "dangling": lambda path: path.symlink_to(outside / "nothing"),
        "circle": lambda path: path.symlink_to(path.name),
        "sparse": _sparse,
        "device": lambda path: os.mknod(path, 0o20600, os.makedev(1, 5)),  # /dev/zero
    }


def _rewrite(path: Path, content: Callable[[bytes], bytes]) -> None:
    path.write_bytes(content(path.read_bytes()))


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    make(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:  # the path of a socket has 108 bytes
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            made.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE)


def _beside(path: Path, name: str) -> None:
    for each in (path.with_name(name), path.parent.parent / name, path.parent.parent.parent / name):
        each.write_text(ESCAPES)


def _valued(value: Any, where: float) -> Callable[[Path], None]:
    """Replace one value, chosen by `where` in [0, 1), of a JSON file or of its lines."""

    def apply(path: Path) -> None:
        lines = path.suffix == ".jsonl"
        data = [json.loads(line) for line in path.read_text().splitlines()] if lines else json.loads(path.read_text())
        data = copy.deepcopy(data)
        places = list(_places(data))
        table, key = places[int(where * len(places))]
        table[key] = value
        text = "".join(json.dumps(each) + "\n" for each in data) if lines else json.dumps(data)
        path.write_text(text)

    return apply


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Each table or list in `data` with each key of it."""
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], dict | list):
            yield from _places(data[key])
