"""Write the collectives that a rank has entered, as torch's flight recorders have them, for a launcher that asks for them."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

from training.distributed.heartbeat import Heartbeat
from training.distributed.world import World
from training.files import write_atomic

KEPT = 200
"""Entries of each recorder that are written: the newest ones, and the first of those that are not completed."""

LOOK_SECONDS = 0.25  # between two checks for a request

RECORDERS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}
"""The functions of torch that return the record of a backend as JSON; a build of torch has those of its backends."""


def dump(path: Path, rank: int) -> None:
    """Write {"rank", "groups", "traces"} to `path`.

    "groups" has the ranks of each process group by its name, "traces" the record of each backend: what torch's recorder
    (`torch/csrc/distributed/c10d/FlightRecorder.hpp`, version 2) returns as JSON, without its oldest entries.

    Raises:
        OSError: the file cannot be written.
        ValueError: a recorder returned no JSON.
    """
    from torch._C import _distributed_c10d as c10d

    functions = {backend: getattr(c10d, name, None) for backend, name in RECORDERS.items()}
    traces = {backend: _newest(json.loads(read())) for backend, read in functions.items() if read is not None}
    write_atomic(path, json.dumps({"rank": rank, "groups": group_ranks(), "traces": traces}))


def group_ranks() -> dict[str, list[int]]:
    """Return the ranks of each process group of this rank by its name; empty if this version of torch does not say."""
    from torch.distributed import distributed_c10d

    world = getattr(distributed_c10d, "_world", None)
    names, ranks = getattr(world, "pg_names", {}), getattr(world, "pg_group_ranks", {})
    return {str(name): sorted(ranks[group]) for group, name in list(names.items()) if group in ranks}


RETIRES_WHAT_ENDED = frozenset(("gloo",))
"""Backends whose recorder retires entries for no other reason than their end, without a state; NCCL retires failed ones."""


def is_done(backend: str, entry: dict[str, Any]) -> bool:
    """Whether a collective has ended on this rank."""
    return entry.get("state") == "completed" or (backend in RETIRES_WHAT_ENDED and entry.get("retired") is True)


def _newest(trace: dict[str, Any]) -> dict[str, Any]:
    entries = trace.get("entries", [])
    unfinished = [entry for entry in entries[:-KEPT] if not (entry.get("retired") or entry.get("state") == "completed")]
    return {**trace, "entries": unfinished[:KEPT] + entries[-KEPT:]}


def answer_requests(run_dir: Path, world: World, heartbeat: Heartbeat) -> CollectiveDumper | None:
    """Return what answers a launcher's requests, if there are other ranks and a launcher that reads the heartbeat."""
    if world.world_size == 1 or not heartbeat.shared:
        return None
    path = run_dir / "logs" / str(world.attempt) / f"{world.rank}.collectives.json"
    return CollectiveDumper(path, world.rank, heartbeat)


class CollectiveDumper:
    """Waits in a thread of its own, since that of the program may be in a collective, for requests in the heartbeat."""

    def __init__(self, path: Path, rank: int, heartbeat: Heartbeat) -> None:
        self._path, self._rank, self._heartbeat = path, rank, heartbeat
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collectives", daemon=True)
        self._thread.start()
        heartbeat.answer_dump()

    def _run(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            if self._heartbeat.dump_requested:
                try:
                    dump(self._path, self._rank)
                except (OSError, ValueError, RuntimeError) as error:
                    print(f"the collectives of rank {self._rank} cannot be written: {error}", file=sys.stderr)
                self._heartbeat.answer_dump()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()
