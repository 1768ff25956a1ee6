"""What `launch doctor --on-nodes` runs on every node: look around, then try what ranks do together."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from launcher.agent.health import environment_record, gpus
from launcher.agent.network import source_towards
from launcher.doctor import bandwidth
from launcher.lifecycle.run_dir import to_json
from training.files import write_atomic

if TYPE_CHECKING:
    from training.context import Context

T = TypeVar("T")

PATIENCE_SECONDS = 5.0
"""For one name, one connection, one file to appear on another node."""
ALONE_SECONDS = 30.0
"""How long the ranks of a node may be apart before they have anything to do with each other."""
SKEW_SECONDS = 1.0
"""Clocks further apart make the times of events and logs of different nodes misleading, and break certificates and caches."""

RENAMES = 20


def main(ctx: Context) -> dict[str, Any]:
    """The findings of all nodes: ``{"nodes": [one dict a node]}``, and what `launcher.doctor.bandwidth` measured between them."""
    folder = ctx.run_dir / "doctor"
    folder.mkdir(exist_ok=True)
    own = folder / f"{ctx.world.node_rank}.json"
    mine = alone(ctx)
    if ctx.world.local_rank == 0:
        # Left before anything is tried together: where that fails, this much is known.
        write_atomic(own, to_json(mine))
    else:
        _until(own.exists, ALONE_SECONDS)  # a rank that fails first would have the one that writes killed
    mine |= together(ctx, folder, mine["host"])
    found = ctx.group.gather(mine)
    nodes = [each for each in found if each["local_rank"] == 0]
    return {"nodes": nodes, **bandwidth.speed(ctx), **bandwidth.pairs(ctx)}


def alone(ctx: Context) -> dict[str, Any]:
    """What this node can say of itself."""
    world = ctx.world
    return {
        "node": world.node_rank,
        "local_rank": world.local_rank,
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "address": source_towards(world.master_addr),
        "versions": versions(),
        "ranks": world.local_world_size,
        "device": world.device,
        "devices": devices() if world.device == "cuda" else {},
        "scratch": shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free,
        "hub": hub(),
    }


def versions() -> dict[str, str]:
    """What has to be the same on all nodes: Python, the packages that `launch` needs, and its own code."""
    installed = environment_record.packages()
    return {
        "python": platform.python_version(),
        "launch": code_hash(),
        **{name: installed.get(name, "missing") for name in environment_record.PACKAGES},
    }


def differences(mine: Mapping[str, str], theirs: Mapping[str, str], whose: str) -> list[str]:
    """What of `mine` differs from `theirs`, the versions of the host `whose`; each as ``has torch 2.12, n0 has 2.13``."""
    return [f"has {n} {v}, {whose} has {theirs.get(n)}" for n, v in mine.items() if v != theirs.get(n)]


def code_hash() -> str:
    """A short hash of the code of `launch` on this node."""
    total = hashlib.sha256()
    for package in ("launcher", "training"):
        for path in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()[:12]


def devices() -> dict[str, Any]:
    """The GPUs of this node as its ranks see them."""
    import torch

    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(n) for n in range(count)})
    return {
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "count": count,
        "names": names,
        "driver": environment_record.driver(),
        "faults": (gpus.report(os.environ.get("CUDA_VISIBLE_DEVICES")) or {}).get("faults", []),
    }


def hub() -> dict[str, Any]:
    """Whether models and data sets can be had: the cache's folder, and the Hub itself unless that is not wanted."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_HOME") or default)
    offline = os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "on")
    reached = None
    if not offline and not os.environ.get("https_proxy"):
        reached = within(PATIENCE_SECONDS, lambda: _connects("huggingface.co", 443)) or False
    there = os.access(cache, os.R_OK | os.X_OK)
    return {"cache": str(cache), "chosen": "HF_HOME" in os.environ, "there": there, "reached": reached}


def together(ctx: Context, folder: Path, host: str) -> dict[str, Any]:
    """What only several nodes can find out: the shared folder, clocks, names and ports."""
    group = ctx.group
    token = folder / "token"
    if ctx.world.rank == 0:
        write_atomic(token, "seen")
    group.barrier()
    clock = time.time()
    seen = appears(token)
    peers = group.gather({"address": source_towards(ctx.world.master_addr), "host": host, "clock": clock})
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen(len(peers) + 8)
        ports = group.gather(listener.getsockname()[1])
        unreached = [
            f"{peer['host']} ({peer['address']})"
            for peer, port in zip(peers, ports, strict=True)
            if not within(PATIENCE_SECONDS, lambda a=peer["address"], p=port: _connects(a, p))  # type: ignore[misc]
        ]
        group.barrier()
    hosts = sorted({peer["host"] for peer in peers})
    return {
        "seen": seen,
        "renames": renames(folder / f"rank-{ctx.world.rank}"),
        "clock": clock - peers[0]["clock"],
        "unreached": unreached,
        "unresolved": [host for host in hosts if not within(PATIENCE_SECONDS, lambda h=host: _resolves(h))],  # type: ignore[misc]
    }


def renames(path: Path, times: int = RENAMES) -> float:
    """The median of seconds that an atomic write of a small file takes, tried `times` times."""
    taken = []
    for number in range(times):
        started = time.perf_counter()
        write_atomic(path, str(number))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def within(limit: float, work: Callable[[], T]) -> T | None:
    """The result of `work`, or None where it raises OSError or takes longer than `limit` seconds; name services hang."""
    done: list[T] = []

    def run() -> None:
        try:
            done.append(work())
        except OSError:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    return done[0] if done else None


def _connects(host: str, port: int) -> bool:
    socket.create_connection((host, port), timeout=PATIENCE_SECONDS).close()
    return True


def _resolves(host: str) -> Sequence[Any]:
    return socket.getaddrinfo(host, None)


def appears(path: Path) -> float:
    """Seconds until a file that another node has written is seen here; -1 for never."""
    started = time.monotonic()

    def there() -> bool:
        os.listdir(path.parent)  # makes an NFS client look again
        return path.exists()

    return time.monotonic() - started if _until(there, PATIENCE_SECONDS) else -1.0


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until `condition` holds, `seconds` at most; whether it does."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds
