"""Find the newest intact checkpoint of a run, the same one on all ranks."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from training.errors import CheckpointError

if TYPE_CHECKING:
    from training.loop.rank import Rank


def newest_parts(rank: Rank) -> dict[str, Any] | None:
    """The parts of the newest intact checkpoint, which rank 0 chooses; None if there is none. A collective.

    Raises CheckpointError, on all ranks, if all are damaged, or a rank cannot read the one that rank 0 has chosen.
    """
    from training.checkpoints.manifest import load, read_manifest

    chosen: tuple[str, str] | None = None
    problem: CheckpointError | None = None
    if rank.world.rank == 0:
        rank.checkpoints.clean()
        try:
            newest = rank.checkpoints.latest()
            chosen = (newest.path.name, read_manifest(newest.path)["sha256"]) if newest else None
        except CheckpointError as error:
            problem = error
    chosen, problem = rank.group.broadcast((chosen, problem))
    if problem is not None:
        raise problem
    if chosen is None:
        return None
    name, digest = chosen
    path = rank.checkpoints.folder / name
    parts: dict[str, Any] = {}
    text = ""
    try:
        if read_manifest(path)["sha256"] != digest:
            raise CheckpointError(f"{path} is not the checkpoint that rank 0 has")
        parts = load(path)
    except CheckpointError as error:
        text = f"{error} (on {socket.gethostname()}; all nodes must see the run directory on a disk that they share)"
    for each in rank.group.gather(text):
        if each:
            raise CheckpointError(each)
    if "state.json" not in parts or "items" not in parts["state.json"]:
        raise CheckpointError(f"{path} was not saved by ctx.state; use another run directory")
    return parts
