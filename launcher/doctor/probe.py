"""What `launch doctor --on-nodes` runs on every node: look around, then try what ranks do together."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.agent.health import environment_record, fabric, gpus, limits
from launcher.agent.health.kernel_log import xid_errors
from launcher.agent.health.links import dcgm_faults, nvlink_faults
from launcher.agent.health.node_facts import _until, appears, renames, versions, within
from launcher.agent.network.addresses import source_towards
from launcher.config.codec import to_json
from launcher.config.timeouts import TIMEOUTS
from launcher.doctor import bandwidth
from training.files import write_atomic

if TYPE_CHECKING:
    from training.context import Context


def main(ctx: Context) -> dict[str, Any]:
    """The findings of all nodes: ``{"nodes": [one dict a node]}``, and what `launcher.doctor.bandwidth` measured between them."""
    folder = ctx.run_dir / "doctor"
    folder.mkdir(exist_ok=True)
    own = folder / f"{ctx.world.node_rank}.json"
    local = alone(ctx)
    if ctx.world.local_rank == 0:
        # Left before anything is tried together: where that fails, this much is known.
        write_atomic(own, to_json(local))
    else:
        _until(own.exists, TIMEOUTS.probe_ranks)  # a rank that fails first would have the one that writes killed
    local |= together(ctx, folder, local["host"])
    found = ctx.group.gather(local)
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
        "limits": limits.warnings(limits.look(), world.local_world_size, world.world_size),
        "device": world.device,
        "devices": devices() if world.device == "cuda" else {},
        "network": fabric.look(),
        "scratch": shutil.disk_usage(os.environ.get("TMPDIR", "/tmp")).free,
        "hub": hub(),
    }


def devices() -> dict[str, Any]:
    """The GPUs of this node as its ranks see them."""
    import torch

    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(n) for n in range(count)})
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {
        "visible": visible,
        "count": count,
        "names": names,
        "driver": environment_record.driver(),
        "faults": [*(gpus.report(visible) or {}).get("faults", []), *dcgm_faults()],
        "warnings": [*gpus.slowed(visible), *xid_errors(), *nvlink_faults(), *_without_peers(count)],
    }


def _without_peers(count: int) -> list[str]:
    """A sentence if pairs of the GPUs that this process sees cannot read each other's memory."""
    import torch

    pairs = [(a, b) for a in range(count) for b in range(a) if not torch.cuda.can_device_access_peer(a, b)]
    if not pairs:
        return []
    text = f"{len(pairs)} of {count * (count - 1) // 2} pairs of GPUs cannot read each other's memory"
    return [f"{text} (GPU {pairs[0][1]} and {pairs[0][0]}), so NCCL copies through the host"]


def hub() -> dict[str, Any]:
    """Whether models and data sets can be had: the cache's folder, and the Hub itself unless that is not wanted."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_HOME") or default)
    offline = os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "on")
    reached = None
    if not offline and not os.environ.get("https_proxy"):
        reached = within(TIMEOUTS.probe, lambda: _connects("huggingface.co", 443)) or False
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
            if not within(TIMEOUTS.probe, lambda a=peer["address"], p=port: _connects(a, p))  # type: ignore[misc]
        ]
        group.barrier()
    hosts = sorted({peer["host"] for peer in peers})
    return {
        "seen": seen,
        "renames": renames(folder / f"rank-{ctx.world.rank}"),
        "clock": clock - peers[0]["clock"],
        "unreached": unreached,
        "unresolved": [host for host in hosts if not within(TIMEOUTS.probe, lambda h=host: _resolves(h))],  # type: ignore[misc]
    }


def _connects(host: str, port: int) -> bool:
    socket.create_connection((host, port), timeout=TIMEOUTS.probe).close()
    return True


def _resolves(host: str) -> Sequence[Any]:
    return socket.getaddrinfo(host, None)
