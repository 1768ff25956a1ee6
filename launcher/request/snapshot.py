"""The code as submitted: a copy of the project, so that edits after submitting change nothing."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launcher.request.code import limits, outside
from launcher.request.code.roots import project_root
from launcher.request.code.survey import Survey, shown, survey

MOST_OUTSIDE = 5_000
"""Files of one project besides the run's own that are copied; with more, it is read where it lies."""

THREADS = 4
"""Copies at once; on a shared disk each waits for the server most of the time."""


@dataclass(frozen=True)
class Snapshot:
    """What was copied from `root`: commit and uncommitted diff of git (None and "" outside), and what was not copied.

    `linked` and `left` map names to the reason; of each, the first 1,000.
    """

    root: Path
    commit: str | None
    dirty: bool
    files: int
    bytes: int
    diff: str
    linked: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A project and where its copy lies; `needed` is the folder of the program in it, `live` why there is no copy."""

    root: Path
    copy: Path
    needed: Path | None = None
    live: str = ""

    def look(self, exclude: Path) -> Survey:
        """Return what would be copied. Writes nothing.

        Raises:
            BadRequest: the code is too large.
        """
        if self.live:
            return Survey(self.root, left={"": self.live})
        found = survey(self.root, exclude, self.needed)
        limits.fit(found)
        if self.needed is None and len(found.copied) > MOST_OUTSIDE:
            return Survey(self.root, left={"": f"more than {MOST_OUTSIDE} files; {outside.INSTALL}"})
        return found


def parts(project: Path, cwd: Path, run_dir: Path, as_module: bool) -> tuple[list[Part], dict[str, str], list[str]]:
    """The projects whose code a run takes along, and how sys.path changes by that.

    The program's own project is the first, its copy ``code``; the others lie below ``packages``. The second value maps
    folders to their copies; they take the place of entries of sys.path, or follow the last one. The third are the copies
    that come first on sys.path, as entries of PYTHONPATH do, and the current folder of ``python -m`` (`as_module`).
    """
    root = project_root(project, cwd)
    if project.is_relative_to(run_dir.parent) and not root.is_relative_to(run_dir.parent):
        root = project  # such as the copy that an earlier run made
    found = {root: Part(root, run_dir / "code", project)}
    moved: dict[str, str] = {}
    first = []
    for each in outside.find(root, cwd, as_module):
        if each.root not in found:
            name = re.sub(r"[^A-Za-z0-9._-]", "_", each.root.name) or "root"
            taken = {part.copy.name for part in found.values()}
            name = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10**6))) if n not in taken)
            found[each.root] = Part(each.root, run_dir / "packages" / name, live=each.live)
        copy = found[each.root].copy / each.folder.relative_to(each.root)
        if each.live:
            continue
        if each.first:
            first.append(str(copy))
        elif each.folder != project:
            moved[str(each.folder)] = str(copy)
    return list(found.values()), moved, first


def take(root: Path, destination: Path, exclude: Path, needed: Path | None = None) -> Snapshot:
    """Copy the project at `root` to `destination`, leaving out what lies below `exclude` (the runs).

    `needed` is the folder of the program. `launcher.request.code.survey` says what is copied, and what is linked.

    Raises:
        BadRequest: the code is too large; the largest files are named.
    """
    return take_part(Part(root, destination, needed or root), exclude)


def take_part(part: Part, exclude: Path) -> Snapshot:
    """Copy one project; see `take`. One that is not copied becomes a link."""
    found = part.look(exclude)
    if "" in found.left:
        part.copy.parent.mkdir(0o755, parents=True, exist_ok=True)
        part.copy.symlink_to(part.root)
    else:
        write(found, part.copy)
    return Snapshot(
        part.root,
        found.commit,
        found.dirty,
        len(found.copied),
        sum(found.copied.values()),
        found.diff,
        dict(list(found.why.items())[:1000]),
        dict(list(found.left.items())[:1000]),
    )


def write(found: Survey, destination: Path) -> None:
    """Write the copies and links of a survey below `destination`."""
    folders: set[str] = set()
    for name in (*found.copied, *found.linked):
        while (name := os.path.dirname(name)) and name not in folders:
            folders.add(name)
    destination.parent.mkdir(0o755, parents=True, exist_ok=True)
    for folder in ("", *sorted(folders)):
        (destination / folder).mkdir(0o755, exist_ok=True)
    for name, text in found.linked.items():
        os.symlink(text, destination / name)
    source, target = str(found.root), str(destination)
    todo = list(found.copied)
    with ThreadPoolExecutor(THREADS) as pool:
        # The caller sees the first error of any.
        list(pool.map(lambda start: _copy(source, target, todo[start : start + 200]), range(0, len(todo), 200)))


def _copy(source: str, target: str, names: Iterable[str]) -> None:
    for name in names:
        with suppress(FileNotFoundError):  # removed just now
            _copy_file(f"{source}/{name}", f"{target}/{name}")


def _copy_file(source: str, target: str) -> None:
    """Copy a regular file with its time and mode, which nobody else's right to write is a part of."""
    reader = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(reader)
        if not stat.S_ISREG(found.st_mode):
            return  # replaced just now
        mode = found.st_mode & 0o755 | stat.S_IRUSR
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            while data := os.read(reader, 2**20):
                while data:
                    data = data[os.write(writer, data) :]
            os.utime(writer, ns=(found.st_atime_ns, found.st_mtime_ns))
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def excluded(root: Path, run_dir: Path) -> Path:
    """The folder that is no part of the code: that of all runs, unless the project lies in it."""
    return run_dir if root.is_relative_to(run_dir.parent) else run_dir.parent


def describe(looked: Iterable[tuple[Part, Survey]]) -> list[str]:
    """Lines for a person about what is not a copy; long lists are shortened."""
    lines = []
    for part, found in looked:
        if "" in found.left:
            lines.append(f"live   {part.root} is not copied: {found.left['']}")
            continue
        if part.copy.name != "code" or part.needed is None:
            lines.append(f"code   {part.copy}, a copy of {part.root}, from which ranks import too")
        if found.why:
            lines.append("links  to where it lies; the nodes have to share it, and the run sees later changes:")
            lines += _grouped(found.why)
        if found.left:
            lines += ["left   not copied:", *_grouped(found.left)]
    return lines


def _grouped(entries: Mapping[str, str]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, why in entries.items():
        groups.setdefault(why, []).append(name)
    texts = {why: ", ".join(map(shown, names[:4])) for why, names in groups.items()}
    return [
        f"       {texts[why]}{f' and {len(names) - 4} more' if len(names) > 4 else ''} ({why})"
        for why, names in groups.items()
    ]
