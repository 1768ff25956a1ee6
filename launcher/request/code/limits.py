"""Bound what is copied: data beyond the limits is linked to where it lies."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

from launcher.errors import BadRequest
from launcher.request.code.kinds import is_code
from launcher.request.code.survey import Survey

MAX_FILES = 20_000
MAX_BYTES = 256 * 2**20
"""With more, folders of tracked data are linked, largest first."""

MOST_FILES = 200_000
MOST_BYTES = 2 * 2**30
"""With more that cannot be linked, the request is refused."""


def fit(found: Survey) -> None:
    """Turn copies of data into links until the limits hold.

    Raises:
        BadRequest: the code alone is too much; the largest files are named.
    """
    files, size = len(found.copied), sum(found.copied.values())
    if files <= MAX_FILES and size <= MAX_BYTES:
        return
    chosen: dict[str, str] = {}
    for folder, (count, total) in _folders_of_data(found):
        if files > MAX_FILES or size > MAX_BYTES:
            chosen[folder] = f"{count} files of data, {total >> 20} MiB"
            files, size = files - count, size - total
    if chosen:
        for entries in (found.copied, found.linked, found.why, found.left):
            for name in [name for name in entries if any(above in chosen for above in _above(name))]:
                del entries[name]
        for folder, why in chosen.items():
            found.link(folder, found.root / folder, why)
    for name in sorted(found.copied, key=lambda name: found.copied[name], reverse=True):
        if size <= MAX_BYTES:
            break
        if not is_code(name):
            size -= found.copied.pop(name)
            files -= 1
            found.link(name, found.root / name, "data")
    if files > MOST_FILES or size > MOST_BYTES:
        largest = sorted(found.copied, key=lambda name: found.copied[name], reverse=True)[:3]
        raise BadRequest(
            f"the project {found.root} is too large to copy with the run (limit: {MOST_FILES} files, {MOST_BYTES >> 20} MiB"
            f" of code); the largest files are {', '.join(largest)}. Start from a folder that holds only the code."
        )


def _folders_of_data(found: Survey) -> list[tuple[str, tuple[int, int]]]:
    """The topmost folders without code, with their files and bytes; those that count most come first.

    Folders that reached the copy through a link are not among them: they lie elsewhere than their names say.
    """
    holds_code, counts, sizes = {""}, defaultdict[str, int](int), defaultdict[str, int](int)
    for name, size in found.copied.items():
        if is_code(name):
            holds_code.update(_above(name))
            continue
        for folder in _above(name):
            counts[folder] += 1
            sizes[folder] += size
    top = [f for f in counts if f not in holds_code and os.path.dirname(f) in holds_code]
    root = os.path.realpath(found.root)
    top = [folder for folder in top if os.path.realpath(found.root / folder) == os.path.join(root, folder)]
    weight = {folder: max(counts[folder] / MAX_FILES, sizes[folder] / MAX_BYTES) for folder in top}
    return [(f, (counts[f], sizes[f])) for f in sorted(top, key=lambda f: weight[f], reverse=True)]


def _above(name: str) -> Iterator[str]:
    while name := os.path.dirname(name):
        yield name
