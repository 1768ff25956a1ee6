"""The code as submitted: a copy of the project, so that edits after submitting change nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import BadRequest

MAX_FILES = 20_000
MAX_BYTES = 256 * 2**20
SOURCE_SUFFIXES = (".py", ".pyi", ".json", ".jsonl", ".toml", ".yaml", ".yml", ".txt", ".cfg", ".ini", ".sh", ".md")
"""Outside git nothing says which files matter; these are copied."""


@dataclass(frozen=True)
class Snapshot:
    """What was copied: the project's root, the commit it stood at (None outside git), and the uncommitted diff."""

    root: Path
    commit: str | None
    dirty: bool
    files: int
    bytes: int
    diff: str


def project_root(folder: Path) -> tuple[Path, bool]:
    """Return the top of the git checkout that holds `folder` and True, or `folder` itself and False."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    return (Path(top.rstrip("\n")), True) if top else (folder, False)


def take(root: Path, in_git: bool, destination: Path, exclude: Path) -> Snapshot:
    """Copy the project at `root` to `destination`, leaving out what lies below `exclude` (the runs).

    In a git checkout: tracked files as they are now, and untracked ones that git does not ignore. Elsewhere: source and
    configuration files. Links are copied as links, modes are kept.

    Raises:
        BadRequest: more than `MAX_FILES` files or `MAX_BYTES` bytes; the largest are named.
    """
    exclude = exclude.resolve()
    names = _git_files(root) if in_git else _source_files(root)
    paths = {name: root / name for name in names}
    sizes = {
        name: path.lstat().st_size
        for name, path in paths.items()
        if (path.is_symlink() or path.is_file()) and exclude != path and exclude not in path.parents
    }
    _check(root, sizes, in_git)
    for name in sizes:
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target, follow_symlinks=False)
    commit = _git(root, "rev-parse", "HEAD").strip() or None if in_git else None
    diff = _git(root, *_DIFF, "HEAD") if commit else ""
    status = _git(root, "status", "--porcelain") if in_git else ""
    return Snapshot(root, commit, bool(status), len(sizes), sum(sizes.values()), diff)


# Whatever the user's configuration makes of a diff to look at, this one is for `git apply`.
_DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")


def _check(root: Path, sizes: dict[str, int], in_git: bool) -> None:
    if len(sizes) <= MAX_FILES and sum(sizes.values()) <= MAX_BYTES:
        return
    largest = sorted(sizes, key=lambda n: sizes[n], reverse=True)[:3]
    how = "name them in .gitignore" if in_git else "start from a folder that holds only the code, or `git init` it"
    raise BadRequest(
        f"the project {root} is too large to copy with the run (limit: {MAX_FILES} files, {MAX_BYTES >> 20} MiB); the"
        f" largest files are {', '.join(largest)}. Data and outputs do not belong in it: {how}."
    )


def _git_files(root: Path) -> list[str]:
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    found = {name.rstrip("/") for name in listed.split("\0") if name}
    # A submodule, and a checkout inside this one, is listed as one entry; its files are as much part of the code.
    for inner in [name for name in found if (root / name / ".git").exists()]:
        found |= {f"{inner}/{name}" for name in _git_files(root / inner)}
    return sorted(found)


def _source_files(root: Path) -> list[str]:
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in ("__pycache__", "node_modules"))
        # A nested environment is somebody's installation, not this project's code.
        folders[:] = [f for f in folders if not os.path.exists(os.path.join(folder, f, "pyvenv.cfg"))]
        links = [f for f in folders if os.path.islink(os.path.join(folder, f))]
        wanted = links + [f for f in sorted(files) if f.endswith(SOURCE_SUFFIXES)]
        found += [os.path.relpath(os.path.join(folder, f), root) for f in wanted]
        if len(found) > MAX_FILES:
            break
    return found


def _git(folder: Path, *arguments: str) -> str:
    """Run git in `folder`; an empty string where git is missing or says no."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            check=False,
        )
    except OSError:
        return ""
    # Not text=True: it would turn the \r\n inside a diff, or a \r in a file's name, into \n.
    return os.fsdecode(done.stdout) if done.returncode == 0 else ""
