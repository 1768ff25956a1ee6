"""The user's runs, wherever they are: one link a run in the user's state folder, made when it is sent.

The registry only says where to look. Nothing depends on it: a link whose run is gone is passed over, and a registry that cannot
be written is none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SEPARATOR = "~"
"""Between the name of a run and the digest of its path; no run's name has it."""


def folder() -> Path:
    """The folder of the links: ``launch/runs`` in XDG_STATE_HOME, by default ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(state) / "launch" / "runs"


def register(run: Path) -> None:
    """Remember the run in the directory `run`; does nothing if the state folder cannot be written."""
    links = folder()
    link = links / _link_name(run)
    with suppress(OSError):
        links.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = links / f".{link.name}.{os.getpid()}"
        temporary.symlink_to(run)
        temporary.replace(link)  # the newest link of a name counts, also of one that is used again


def forget(run: Path) -> None:
    """Remove the links of the run that was in the directory `run`, also those that lead there by another path."""
    place = os.path.realpath(run)
    for link, _, target in list(_links(run.name)):
        if os.path.realpath(target) == place:
            with suppress(OSError):
                os.unlink(link)


def named(name: str) -> list[Path]:
    """The directories of the runs called `name` that are there, newest first."""
    return known(name)


def known(name: str = "") -> list[Path]:
    """The directories of all registered runs that are there, or of those called `name`, newest first."""
    links = sorted((made, run) for _, made, run in _links(name))
    return [run for _, run in reversed(links) if os.path.lexists(f"{run}/plan.json")]


def sent_at(run: Path) -> float:
    """When the run in the directory `run` was sent, in seconds since 1970; 0 if it is gone."""
    with suppress(OSError):
        return (run / "plan.json").lstat().st_mtime
    return 0.0


def _links(wanted: str = "") -> Iterator[tuple[str, float, Path]]:
    """The path of each link, when it was made, and where it leads; with `wanted`, of runs of this name.

    Links to anything that no run could be are passed over.
    """
    try:
        with os.scandir(folder()) as entries:
            for entry in entries:
                name, separator, _ = entry.name.partition(SEPARATOR)
                if not separator or (wanted and name != wanted):
                    continue
                with suppress(OSError):
                    target = Path(os.readlink(entry.path))
                    if target.is_absolute() and target.name == name:
                        yield entry.path, entry.stat(follow_symlinks=False).st_mtime, target
    except OSError:
        return


def _link_name(run: Path) -> str:
    import hashlib  # its library takes 3 ms to load, and most commands ask for no name

    digest = hashlib.sha256(os.fsencode(run)).hexdigest()[:16]
    return f"{run.name}{SEPARATOR}{digest}"
