"""What of a project is copied with a run, what is linked to where it lies, and what is left out. Writes nothing."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from launcher.request.code import checkout, scan
from launcher.request.code.kinds import CONFIG, is_code, is_secret, travels
from launcher.request.code.places import Places
from launcher.request.code.roots import is_shared

MAX_LINKS = 5_000
"""Links in all; data beyond is left out."""

HIDDEN = "hidden, an environment or a run"

UNKNOWN = "too many files to look for code, which git has to track to be copied"

RUNS_FOLDER = "the runs folder"
"""Why the runs are left out."""


@dataclass
class Survey:
    """What travels from the project at `root`, by path relative to it.

    Attributes:
        copied: file -> bytes.
        linked: file or folder -> the text of the symbolic link.
        why: entry of `linked` -> the reason.
        left: entry that is neither copied nor linked -> the reason and the remedy.
        commit, dirty, diff: of git; None, False and "" outside of a checkout.
    """

    root: Path
    copied: dict[str, int] = field(default_factory=dict)
    linked: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool = False
    diff: str = ""

    def link(self, name: str, target: str | Path, why: str) -> None:
        """Link `name` to `target`, or leave it out if there are too many links already."""
        if len(self.linked) < MAX_LINKS:
            self.linked[name] = str(target)
            self.why[name] = why
        else:
            self.left[name] = f"more than {MAX_LINKS} files of data beside code; move them into a folder of their own"


def survey(root: Path, exclude: Path, needed: Path | None = None) -> Survey:
    """Look through the project at `root`, without what lies at or below `exclude` (the runs).

    The files beside the program, in the folder `needed`, are looked at whatever git and the limits say.
    """
    walk = _Walk(Survey(root), exclude)
    wanted = needed.relative_to(root).parts if needed is not None and needed.is_relative_to(root) else ()
    walk.project(root, "", {"/".join(wanted[:n]) for n in range(len(wanted) + 1)})
    return walk.found


class _Walk:
    """One survey in progress."""

    def __init__(self, found: Survey, exclude: Path) -> None:
        self.found, self.places = found, Places(exclude)
        self.scan = scan.Scan(self.places)
        self.shared = is_shared(found.root)  # most of what lies there has nothing to do with the program
        self.most = 0 if self.shared else scan.MAX_IGNORED

    def project(self, top: Path, prefix: str, needed: Iterable[str] = (), most: int | None = None) -> None:
        """Look through a checkout, or a folder outside of git, whose name in the copy is `prefix`.

        One that is no part of the program's own is linked if it has more than `most` files.
        """
        self.places.add(top, prefix)
        with checkout.opened(top) as git:
            listed = git.tracked() if git is not None else None
            if most is not None and len(listed or ()) > most:
                self.found.link(prefix, top, f"a checkout of more than {most} files")
                return
            if listed is None and checkout.git_dir_of(top) is not None:
                why = (
                    "git cannot read this checkout, or is not installed, so that only code and configuration are copied"
                )
                self.found.left[scan.join(prefix, ".git")] = why
            tracked = {scan.join(prefix, name) for name in listed or ()}
            real = {prefix, *(scan.join(prefix, name) for name in needed)}
            for name in tracked:
                while (name := os.path.dirname(name)) not in real:
                    real.add(name)
            loose = []
            for folder in sorted(real):
                loose += self._folder(top, prefix, folder, tracked, real)
            inner = [_relative(name, prefix) for name in loose]
            ignored = git.ignored(inner) if git is not None else set()
            if git is not None and not prefix:
                found = self.found
                found.commit, found.dirty = git.commit(), git.dirty()
                found.diff = git.diff(sorted(tracked & found.why.keys())[:1000]) if found.commit and found.dirty else ""
        for name in loose:
            path = top / _relative(name, prefix)
            if scan.is_environment(path.parent):
                self.found.link(name, path, "a part of an environment")
            else:
                self.loose(path, name, _relative(name, prefix) in ignored, listed is not None)

    def _folder(self, top: Path, prefix: str, folder: str, tracked: set[str], real: set[str]) -> list[str]:
        """Sort the entries of one folder with known files; returns the folders in it without."""
        loose = []
        path = top / _relative(folder, prefix)
        if path.is_symlink() or self.places.excludes(str(path)):
            return []
        if not os.access(path, os.R_OK | os.X_OK) and os.path.lexists(path):
            self.found.left[folder or "."] = "cannot be read by you"
        for entry in scan.entries(path):
            name = scan.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False) and not self.places.excludes(entry.path):
                if name in real or entry.name in scan.SKIPPED:
                    continue
                if name in tracked or checkout.git_dir_of(Path(entry.path)) is not None:
                    self._inner(Path(entry.path), name, name in tracked)
                else:
                    loose.append(name)
            else:
                self.entry(entry, name, name in tracked)
        return loose

    def _inner(self, path: Path, name: str, submodule: bool) -> None:
        """A submodule, or a checkout inside of the checkout; its files are as much part of the code."""
        if checkout.git_dir_of(path) is not None:
            self.project(path, name, most=None if submodule else self.most)
        else:
            self.loose(path, name, False, True)  # a submodule that was not fetched

    def entry(self, entry: os.DirEntry[str], name: str, tracked: bool) -> None:
        """Decide about one file or link."""
        if entry.name in scan.SKIPPED:
            return
        if self.places.excludes(entry.path):
            self.found.left[name] = RUNS_FOLDER
            return
        if entry.is_symlink():
            self.symlink(Path(entry.path), name)
            return
        with suppress(FileNotFoundError):  # removed just now
            found = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                self.found.left[name] = "neither a file, a folder nor a link; the program has to make it itself"
            else:
                self._file(Path(entry.path), name, found.st_size, tracked)

    def _file(self, path: Path, name: str, size: int, tracked: bool) -> None:
        if not os.access(path, os.R_OK):
            self.found.link(name, path, "cannot be read")
        elif travels(name, size, tracked):
            self.found.copied[name] = size
        elif not tracked and is_secret(name):
            self.found.link(name, path, "a secret")
        else:
            self.found.link(name, path, "data")

    # ---- folders of which git knows nothing -------------------------------------------------------------------------

    def loose(self, path: Path, name: str, ignored: bool, in_git: bool) -> None:
        """Copy the code in a folder and link the rest; a folder without code is linked as a whole.

        Configuration counts as code if git does not ignore the folder: results hold files of configuration too.
        """
        if scan.is_opaque(path):
            self.found.link(name, path, HIDDEN)
            return
        if self.shared and not any(is_code(entry.name) for entry in scan.entries(path)):
            self.found.link(name, path, "no code directly in it, beside many other projects")
            return
        self.places.add(path, name)
        entries, unknown = self.scan(path, name, scan.MAX_IGNORED if ignored else scan.MAX_SCAN)
        wanted = {
            n for n, e in entries.items() if is_code(n) or (not ignored and n.endswith(CONFIG) and _small_config(e))
        }
        real: set[str] = set()
        for each in wanted | {n for n, e in entries.items() if e.is_dir(follow_symlinks=False) and scan.is_checkout(e)}:
            while (each := os.path.dirname(each)) not in real and len(each) >= len(name):
                real.add(each)
        if not real:
            why = "git ignores it" if ignored and in_git else "no code in it"
            self.found.link(name, path, f"{why}; {UNKNOWN}" if unknown else why)
        for each, found in entries.items() if real else ():
            if os.path.dirname(each) not in real or each in real:
                continue
            if not found.is_dir(follow_symlinks=False) or self.places.excludes(found.path):
                self.entry(found, each, False)
            elif scan.is_checkout(found):
                self.project(Path(found.path), each, most=self.most)
            elif found.name not in scan.SKIPPED:
                why = HIDDEN if scan.is_opaque(Path(found.path)) else UNKNOWN if each in unknown else "no code in it"
                self.found.link(each, found.path, why)

    def symlink(self, path: Path, name: str) -> None:
        """Keep a link that stays in the copy; of code elsewhere take a copy, and link other things where they are."""
        if (text := self.places.link(path, name)) is not None:
            self.found.linked[name] = text
            return
        real = Path(os.path.realpath(path))
        if real.is_dir() and not self.places.above(str(real)):
            if checkout.git_dir_of(real) is not None:
                self.project(real, name, most=self.most)
            else:
                self.loose(real, name, True, False)
        elif real.is_file():
            self._file(real, name, real.stat().st_size, False)
        else:
            self.found.link(name, real, "a link to what holds the project" if real.is_dir() else "a link outside")


def _small_config(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return not entry.name.endswith(".json") and travels(entry.name, entry.stat().st_size, False)
    return False


def shown(name: str) -> str:
    """The name of a file for a terminal."""
    return name if name.isprintable() else ascii(name)


def _relative(name: str, prefix: str) -> str:
    return name[len(prefix) + 1 :] if prefix else name
