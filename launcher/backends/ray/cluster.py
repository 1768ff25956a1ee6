"""State of a Ray cluster: its nodes, their capacity, and the nodes that are being drained."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.backends.ray.backend import settings
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir
from launcher.request.own_packages import ROOT
from launcher.request.placement.tpu import Topology
from launcher.request.spec import Plan

SHOWN = ("CPU", "GPU", "TPU")
_TOKEN_HINT = ". If the cluster needs a token (there was one in ~/.ray when `ray start` ran), set RAY_AUTH_MODE=token."

SLICE, WORKER, TOPOLOGY = "ray.io/tpu-slice-name", "ray.io/tpu-worker-id", "ray.io/tpu-topology"

LONGEST_SOCKET = 107
"""Bytes of the path of a socket; see unix(7)."""

TEMPORARY = "r"
"""Name of Ray's folder in one that only this user can enter: Ray lets all users write to its own."""

BELOW = "/session_2026-11-26_10-57-47_123456_4194304/sockets/plasma_store.999"
"""What Ray adds to its temporary folder, at most."""


@dataclass(frozen=True)
class RayNode:
    """A node that is up: its total resources, used or not, and its labels."""

    id: str
    address: str = ""
    host: str = ""
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.host} ({self.id[:8]})"

    def holds(self, each: Mapping[str, float]) -> int:
        """How many ranks with the resources `each` fit on the node."""
        return min(int(self.resources.get(name, 0) // amount) for name, amount in each.items())


def look() -> list[RayNode]:
    """The nodes that are up and not draining; the caller is connected to Ray."""
    import ray

    going = draining()
    return [
        RayNode(n["NodeID"], n["NodeManagerAddress"], n["NodeManagerHostname"], n["Resources"], n.get("Labels") or {})
        for n in ray.nodes()
        if n["Alive"] and n["NodeID"] not in going
    ]


def draining() -> dict[str, float]:
    """Draining nodes: id -> the time at which they go, in seconds since 1970 (0: unknown)."""
    from ray._private.state import state  # as Ray Train's own watcher does; there is no public API

    return {node: deadline / 1000 for node, deadline in (state.get_draining_nodes() or {}).items()}


def own_node() -> str:
    """The id of the node through which this process is connected; Ray Train keeps its controller on it."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def reservations() -> dict[str, tuple[str, ...]]:
    """The created placement groups: id -> the node of each bundle."""
    from ray.util import placement_group_table

    return {
        group: tuple(each["bundles_to_node_id"].values())
        for group, each in placement_group_table().items()
        if each["state"] == "CREATED"
    }


def demand(scaling: Mapping[str, Any]) -> dict[str, float]:
    """The resources of one rank of a ScalingConfig, by Ray's names."""
    each = dict(scaling["resources_per_worker"])
    if scaling.get("accelerator_type") and not scaling.get("use_tpu"):
        each[f"accelerator_type:{scaling['accelerator_type']}"] = 0.001
    return each


def capacity(nodes: Sequence[RayNode], scaling: Mapping[str, Any]) -> int:
    """How many ranks of a ScalingConfig fit on `nodes` if they are otherwise idle."""
    each = demand(scaling)
    fits = [node.holds(each) for node in nodes]
    if scaling.get("topology"):
        chips = Topology.parse(scaling["topology"]).chips
        if _of_one_host(scaling):
            right = [node for node in nodes if node.labels.get(TOPOLOGY, scaling["topology"]) == scaling["topology"]]
            return chips * sum(node.holds(each) >= chips for node in right)
        # A slice of which a host is missing cannot be used.
        return sum(chips for found, have in slices(nodes).values() if (found, have) == (scaling["topology"], chips))
    match scaling.get("placement_strategy"):
        case "STRICT_PACK":
            return max(fits, default=0)
        case "STRICT_SPREAD":
            return sum(1 for n in fits if n)
    return sum(fits)


def _of_one_host(scaling: Mapping[str, Any]) -> bool:
    return any(name.endswith("-head") for name in scaling["resources_per_worker"])


def slices(nodes: Iterable[RayNode]) -> dict[str, tuple[str, int]]:
    """The TPU slices: name -> topology and number of chips that are up."""
    found: dict[str, tuple[str, int]] = {}
    for node in nodes:
        if TOPOLOGY in node.labels:
            name = node.labels.get(SLICE) or node.id
            _, chips = found.get(name, ("", 0))
            found[name] = node.labels[TOPOLOGY], chips + int(node.resources.get("TPU", 0))
    return found


def fitting(asked: int, capacity: int, unit: int = 1) -> int:
    """The largest divisor of `asked` up to `capacity` that is a multiple of `unit`; 0 if there is none."""
    sizes = [n for n in range(unit, min(asked, capacity) + 1, unit) if asked % n == 0]
    return max(sizes, default=0)


def shortage(nodes: Sequence[RayNode], scaling: Mapping[str, Any]) -> str:
    """Why the request does not fit on `nodes`, with their resources; empty if it fits."""
    ranks, most = scaling["num_workers"], capacity(nodes, scaling)
    if ranks <= most:
        return ""
    totals = {
        name: sum(node.resources.get(name, 0) for node in nodes) for name in demand(scaling) | dict.fromkeys(SHOWN)
    }
    shown = ", ".join(f"{totals[name]:g} {name}" for name in SHOWN if totals[name]) or "nothing"
    have = f"in all: {shown} on {len(nodes)} node{'s' * (len(nodes) != 1)}"
    if scaling.get("topology"):
        wanted, chips = scaling["topology"], Topology.parse(scaling["topology"]).chips
        there = [f"{topology} with {up} chips up" for topology, up in slices(nodes).values()]
        if _of_one_host(scaling):
            wanted += " on one host"
        return (
            f"{ranks} ranks need {ranks // chips} whole TPU slice{'s' * (ranks > chips)} of {wanted}, but this Ray cluster"
            f" has {most // chips} ({have}; slices: {', '.join(there) or 'none'})"
        )
    for name, each in demand(scaling).items():
        if each * ranks > totals[name]:
            return f"{ranks} ranks need {each * ranks:g} {name}, but this Ray cluster has {totals[name]:g} ({have})"
    strategy = scaling.get("placement_strategy", "PACK")
    return f"{ranks} ranks placed by {strategy} do not fit on the nodes of this Ray cluster, which hold {most} ({have})"


def connect(plan: Plan) -> None:
    """Connect this process to the cluster of the plan, or start a Ray on this machine.

    Raises:
        BadRequest: the cluster cannot be reached.
    """
    os.environ.update(settings(plan))
    address = plan.cluster.ray.address or os.environ.get("RAY_ADDRESS")  # the latter inside a job
    if address is None and not any(name.startswith("RAY_AUTH_") for name in os.environ):
        # By default Ray creates one token for all Rays of a user, and one of two that start at once is rejected.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray  # after the variables, which it reads at import

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is None:
        # CPU ranks are for debugging; there may be more of them than cores.
        cpus = plan.placement.world_size * max(1, plan.placement.cpus_per_rank)
        cpus = max(cpus, os.cpu_count() or 1)
        os.environ.setdefault("RAY_worker_niceness", "0")  # the default is 15; this Ray serves one run
        with chdir(ROOT):  # as below
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **_temporary(), **common)
        return
    _reach(address)
    try:
        # Ray puts the driver's working directory first on the sys.path of workers, which import this toolkit.
        with chdir(ROOT):
            ray.init(address=address, **common)
    except (ConnectionError, ValueError, RuntimeError) as error:
        hint = "" if "RAY_AUTH_MODE" in os.environ else _TOKEN_HINT
        raise BadRequest(f"Ray at {address} cannot be reached: {error}{hint}") from None


def short_folder() -> str:
    """Return the folder for temporary files, or ``/tmp`` if the sockets of a Ray in it would have too long paths."""
    base = tempfile.gettempdir()
    return base if len(os.fsencode(f"{base}/ray-12345678/{TEMPORARY}{BELOW}")) <= LONGEST_SOCKET else "/tmp"


def _temporary() -> dict[str, str]:
    """The option of ``ray.init`` for a temporary folder; none where Ray's own choice is short enough."""
    own = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(os.fsencode(f"{own}/ray{BELOW}")) <= LONGEST_SOCKET:
        return {}
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    _own_folders.append(folder)
    return {"_temp_dir": f"{folder}/{TEMPORARY}"}


_own_folders: list[Path] = []
"""Temporary folders of a Ray that this process has started; `leave` removes them."""


async def join(plan: Plan) -> None:
    """`connect`; with a Ray inside a job, also wait until all of its nodes have joined, or a stop is requested.

    Raises:
        BadRequest: the cluster cannot be reached.
    """
    connect(plan)
    deadline, stop = time.monotonic() + TIMEOUTS.connect, RunDir(plan.run_dir).stop_file
    while plan.cluster.ray.inside and len(look()) < plan.placement.nodes and time.monotonic() < deadline:
        if stop.exists():
            return
        await asyncio.sleep(0.2)


async def leave() -> None:
    """Disconnect, which ends this job's processes on the cluster and a Ray that `connect` started."""
    import ray

    loop, left = asyncio.get_running_loop(), asyncio.Event()

    def shut_down() -> None:
        with suppress(Exception):  # the cluster may be gone
            ray.shutdown()
        loop.call_soon_threadsafe(left.set)

    threading.Thread(target=shut_down, daemon=True).start()
    with suppress(TimeoutError):
        async with asyncio.timeout(TIMEOUTS.ray_leave):
            await left.wait()
            while any(folder.exists() for folder in _own_folders):  # Ray's processes write while they end
                for folder in _own_folders:
                    shutil.rmtree(folder, ignore_errors=True)
                await asyncio.sleep(0.05)


def _reach(address: str) -> None:
    """Fail at once if nothing listens at `address`; Ray itself would try for a minute."""
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"Ray at {address} cannot be reached: {error}. Is its head running, and is this its GCS port (default"
            " 6379)?"
        ) from None
