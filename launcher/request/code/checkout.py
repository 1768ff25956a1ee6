"""Read a git checkout without executing anything that its own configuration names."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from training.files import read_plain

TIMEOUT = 60.0
"""Seconds that one git command may take."""

# Whatever the user's configuration makes of a diff to look at, this one is for `git apply`.
DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/")

# A submodule is a checkout of its own: git would run `git status` in it, under its configuration.
SHALLOW = "--ignore-submodules=dirty"

INERT = re.compile(
    r"(?:core\.(?:filemode|symlinks|ignorecase|autocrlf|eol|precomposeunicode)|extensions\.(?:objectformat|refstorage))"
)
"""Settings of a checkout that are kept: what its files mean, and nothing that names a command or a file."""

SHARED = ("objects", "refs", "packed-refs", "reftable", "info", "shallow", "lfs")
"""What the checkouts made by `git worktree` have in common."""

NOT_READ = ("config", "config.worktree", "hooks", "HEAD", "commondir", "gitdir", "worktrees", "modules")


@dataclass(frozen=True)
class Git:
    """Questions to git about the checkout at `root`; each answer is empty if git is missing or fails."""

    root: Path
    environment: dict[str, str]

    def tracked(self) -> list[str] | None:
        """The tracked files, relative to the root; None if git cannot read the checkout."""
        listed = self._run("ls-files", "-z", "--cached")
        return None if listed is None else sorted({name for name in listed.split("\0") if name})

    def ignored(self, folders: Iterable[str]) -> set[str]:
        """Those of `folders` that git ignores."""
        asked = "".join(f"{folder}/\0" for folder in folders)
        listed = self._run("check-ignore", "-z", "--stdin", given=asked) if asked else None
        return {name.rstrip("/") for name in (listed or "").split("\0") if name}

    def commit(self) -> str | None:
        return (self._run("rev-parse", "--verify", "-q", "HEAD") or "").strip() or None

    def diff(self, without: Iterable[str]) -> str:
        """The changes that are not committed, but for the files `without`."""
        return self._run(*DIFF, SHALLOW, "HEAD", "--", ".", *(f":(exclude,literal){name}" for name in without)) or ""

    def dirty(self) -> bool:
        return bool(self._run("status", "--porcelain", SHALLOW))

    def _run(self, *arguments: str, given: str = "") -> str | None:
        command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
        try:
            done = subprocess.run(
                command,
                cwd=self.root,
                env=self.environment,
                input=os.fsencode(given),
                capture_output=True,
                check=False,
                timeout=TIMEOUT,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        # Not text=True: it would turn the \r\n inside a diff, or a \r in a file's name, into \n.
        return os.fsdecode(done.stdout) if done.returncode in (0, 1) else None


def top_of(folder: Path) -> Path | None:
    """The root of the checkout that holds `folder`; None outside of one. Its owner does not matter."""
    return next((path for path in (folder, *folder.parents) if git_dir_of(path) is not None), None)


def git_dir_of(root: Path) -> Path | None:
    """The git directory of the checkout at `root`, also of a worktree or a submodule; None if there is none."""
    place = root / ".git"
    with suppress(OSError, ValueError):
        if place.is_file():
            text = os.fsdecode(read_plain(place, 64 * 1024)).strip()
            place = root / text.removeprefix("gitdir:").strip() if text.startswith("gitdir:") else place
        if place.is_dir() and os.path.lexists(place / "HEAD") and (_shared(place) / "objects").is_dir():
            return place
    return None


@contextmanager
def opened(root: Path) -> Iterator[Git | None]:
    """Open the checkout at `root`; None if it is none.

    git gets a temporary directory in place of ``.git``, with links to its objects, references and index, and without its
    configuration, which can name commands: monitors of the file system, hooks, filters, formats of a diff. The user's own
    configuration holds. Nobody is asked who owns the checkout, which is a protection against that configuration.
    """
    git_dir = git_dir_of(root)
    if git_dir is None or shutil.which("git") is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="launch-git-") as folder:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG")}
        environment |= {
            "GIT_DIR": folder,
            "GIT_WORK_TREE": str(root),
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_TERMINAL_PROMPT": "0",
        }
        try:
            _furnish(Path(folder), git_dir, environment)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            yield None
            return
        yield Git(root, environment)


def _furnish(folder: Path, git_dir: Path, environment: dict[str, str]) -> None:
    shared = _shared(git_dir)
    names = {name: git_dir / name for name in os.listdir(git_dir) if name not in NOT_READ}
    names |= {name: shared / name for name in SHARED if (shared / name).exists()}
    for name, path in names.items():
        kind = path.stat().st_mode if path.exists() else 0
        if stat.S_ISREG(kind) or stat.S_ISDIR(kind):  # git would wait for the writer of a pipe
            (folder / name).symlink_to(path.absolute())
    head = git_dir / "HEAD"
    written = f"ref: {os.readlink(head)}\n".encode() if head.is_symlink() else read_plain(head, 4096)
    (folder / "HEAD").write_bytes(written)
    (folder / "config").write_text(_settings(shared / "config", environment))


def _shared(git_dir: Path) -> Path:
    """The git directory of the main checkout of a worktree; any other is its own."""
    if not (git_dir / "commondir").is_file():
        return git_dir
    return git_dir / os.fsdecode(read_plain(git_dir / "commondir", 64 * 1024)).strip()


def _settings(config: Path, environment: dict[str, str]) -> str:
    """The text of a configuration with the `INERT` settings of `config`."""
    text = "[core]\n\trepositoryformatversion = 1\n\tbare = false\n"
    command = ["git", "config", "--file", str(config), "--no-includes", "-z", "--list"]
    elsewhere = {name: value for name, value in environment.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    if config.is_file():
        done = subprocess.run(
            command, cwd="/", env=elsewhere, capture_output=True, check=False, timeout=TIMEOUT, stdin=subprocess.DEVNULL
        )
        for entry in os.fsdecode(done.stdout).split("\0"):
            key, _, value = entry.partition("\n")
            if INERT.fullmatch(key) and re.fullmatch("[A-Za-z0-9]{1,20}", value):
                section, _, name = key.partition(".")
                text += f"[{section}]\n\t{name} = {value}\n"
    return text
