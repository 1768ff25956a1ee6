"""Find the newest intact checkpoint of a run, on its disks or in its mirror; all ranks get the same one."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.checkpoints.manifest import load, read_manifest, verify
from training.checkpoints.store import Checkpoint
from training.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from training.checkpoints.mirror import Mirror
    from training.loop.rank import Rank

PROBE_SECONDS = 1.0  # how long a node waits for a file of rank 0: a network disk may cache that it was missing
FORMAT = 1  # of state.json


class Finder:
    """Finds the checkpoint from which all ranks continue.

    Attributes:
        one_disk: whether all nodes share the folder of checkpoints; known after `newest`.
    """

    def __init__(self, rank: Rank, mirror: Mirror | None = None) -> None:
        self._rank, self._mirror = rank, mirror
        self.one_disk = True

    def newest(self) -> dict[str, Any] | None:
        """The parts of the newest intact checkpoint, which rank 0 chooses; None if there is none. A collective.

        Raises, on all ranks:
            CheckpointError: all are damaged, or a rank cannot read the one that rank 0 has chosen.
            ConfigError: the mirror cannot be read.
        """
        rank = self._rank
        self.one_disk = rank.world.num_nodes == 1 or self._look_for_one_disk()
        chosen: tuple[str, str] | None = None
        problem: Exception | None = None
        if rank.world.rank == 0:
            try:
                newest = self._choose()
                chosen = (newest.path.name, read_manifest(newest.path)["sha256"]) if newest else None
            except (CheckpointError, ConfigError) as error:
                problem = error
        chosen, problem = rank.group.broadcast((chosen, problem))
        if problem is not None:
            raise problem
        return None if chosen is None else self._load(*chosen)

    def _load(self, name: str, digest: str) -> dict[str, Any]:
        """The parts of the checkpoint that rank 0 has chosen. A collective."""
        rank, path = self._rank, self._rank.checkpoints.folder / name
        if not self.one_disk:
            first_of_node = rank.world.local_rank == 0 and rank.world.node_rank > 0
            self._agreed(lambda: self.bring(name, digest) if first_of_node else None)

        def read() -> dict[str, Any]:
            if read_manifest(path)["sha256"] != digest:
                raise CheckpointError(f"{path} is not the checkpoint that rank 0 has")
            return load(path)

        parts: dict[str, Any] = self._agreed(read)
        saved = parts.get("state.json", {})
        if "items" not in saved:
            raise CheckpointError(f"{path} was not saved by ctx.state; use another run directory")
        if saved["format"] > FORMAT:
            raise CheckpointError(
                f"{path} has format {saved['format']}, and this version reads {FORMAT}; use the version that saved it"
            )
        return parts

    def _agreed(self, work: Any) -> Any:
        """The result of `work`; raises its CheckpointError on all ranks. A collective."""
        found, text = None, ""
        try:
            found = work()
        except CheckpointError as error:
            text = (
                f"{error} (on {socket.gethostname()}; all nodes must see the run directory on a disk that they share;"
                " nodes that share no disk need --mirror, or ctx.state(mirror=...))"
            )
        for each in self._rank.group.gather(text):
            if each:
                raise CheckpointError(each)
        return found

    def _look_for_one_disk(self) -> bool:
        """Whether all nodes see a new file of rank 0 in the folder of checkpoints. A collective."""
        group, folder = self._rank.group, self._rank.checkpoints.folder
        probe: Path | None = None
        if self._rank.world.rank == 0:
            with contextlib.suppress(OSError):  # the first save reports this error
                folder.mkdir(parents=True, exist_ok=True)
                fresh = folder / f".step-probe-{secrets.token_hex(8)}"  # a name that `clean` removes
                fresh.touch()
                probe = fresh
        name = group.broadcast(probe.name if probe else "")
        patience = time.monotonic() + PROBE_SECONDS
        while not (there := bool(name) and (folder / name).is_file()) and name and time.monotonic() < patience:
            time.sleep(0.05)
        seen = all(group.gather(there))
        if probe is not None:
            probe.unlink()
        return seen

    def bring(self, name: str, digest: str) -> None:
        """Provide the checkpoint that rank 0 chose on this node's own disk, and prune the others.

        Raises CheckpointError if it is missing or differs from that of rank 0.
        """
        checkpoints = self._rank.checkpoints
        path = checkpoints.folder / name
        try:
            same = read_manifest(path)["sha256"] == digest
            verify(path)
        except CheckpointError:
            same = False
            if self._mirror is None:
                raise
        if not same:
            if self._mirror is None:
                raise CheckpointError(f"{path} is not the checkpoint that rank 0 has")
            self._mirror.pull(name, checkpoints.folder)
            if read_manifest(path)["sha256"] != digest:
                raise CheckpointError(f"{path} as the mirror has it is not the checkpoint that rank 0 has")
        checkpoints.prune(but=name)

    def _choose(self) -> Checkpoint | None:
        checkpoints = self._rank.checkpoints
        checkpoints.clean()
        if self._mirror is None:
            return checkpoints.latest()
        self._mirror.check()
        local, problem = None, None
        try:
            local = checkpoints.latest()
        except CheckpointError as error:  # all local checkpoints are damaged; the mirror may have a valid one
            problem = error
        for there in reversed(self._mirror.checkpoints()):
            if local is not None and local.step >= there.step:
                break
            try:
                path = self._mirror.pull(there.path.name, checkpoints.folder)
            except CheckpointError as error:
                checkpoints.on_damaged(error)
                continue
            self._rank.event("fetched", step=there.step)
            return Checkpoint(there.step, path, there.score)
        if local is None and problem is not None:
            raise problem
        return local
