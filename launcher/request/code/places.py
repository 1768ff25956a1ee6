"""Where what was looked through lies in the copy, and what a symbolic link becomes there."""

from __future__ import annotations

import os
from pathlib import Path


class Places:
    """The folders that were looked through, by their real paths, and the folder `exclude` that is not (the runs).

    So a second link to a folder, or a link into it, becomes a link inside the copy.
    """

    def __init__(self, exclude: Path) -> None:
        self.exclude = (str(exclude), os.path.realpath(exclude))
        self.names: dict[str, str] = {}

    def add(self, path: Path, name: str) -> None:
        """The folder `path` is called `name` in the copy."""
        self.names[os.path.realpath(path)] = name

    def excludes(self, path: str) -> bool:
        return any(_below(path, folder) for folder in self.exclude)

    def above(self, real: str) -> bool:
        """Whether the folder `real` holds the runs, or a folder that was looked through."""
        return any(_below(place, real) for place in (*self.names, *self.exclude))

    def inside(self, real: str) -> str | None:
        """The name in the copy of what has the path `real`; None if it is not in the copy."""
        if self.excludes(real):
            return None
        for place, name in self.names.items():
            if _below(real, place):
                return os.path.normpath(os.path.join(name, os.path.relpath(real, place)))
        return None

    def link(self, path: Path, name: str) -> str | None:
        """The text of the link `path`, called `name`, if it leads into the copy or to nothing; else None.

        A relative text that stays in the copy is kept.
        """
        text, real = os.readlink(path), os.path.realpath(path)
        stays = self._stays(os.path.realpath(path.parent), name, text)
        if (inside := self.inside(real)) is not None:
            return text if stays else os.path.relpath(inside, os.path.dirname(name) or ".")
        if os.path.exists(real):
            return None
        return text if stays or os.path.isabs(text) else os.path.join(path.parent, text)

    def _stays(self, folder: str, name: str, text: str) -> bool:
        """Whether a link in `folder` reads the same in the copy: it does not leave a project that was looked through."""
        for place, prefix in self.names.items():
            if _below(folder, place) and os.path.normpath(
                os.path.join(place, os.path.relpath(name, prefix or "."))
            ) == (os.path.join(folder, os.path.basename(name))):
                return not os.path.isabs(text) and _below(os.path.normpath(os.path.join(folder, text)), place)
        return False


def _below(path: str, folder: str) -> bool:
    """Whether `path` is `folder`, or lies in it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
