"""What can be found out about the Ray at hand: the check of ``launch doctor``, and a first profile."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.config.check import Check
from launcher.errors import BadRequest

CONNECT_SECONDS = 5.0
"""How long the head has to accept a connection; `ray.init` would try for five minutes."""


def reachable(where: str | None) -> Check:
    """Whether the head at the address `where` accepts connections."""
    if where is None:
        return Check("ray", True, "no address: a Ray is started on this machine for each run")
    try:
        _connect(where)
        return Check("ray", True, f"{where} answers")
    except (OSError, ValueError) as error:
        return Check("ray", False, f"{where}: {error}", "is the head running, and is this its GCS port?")


def _connect(where: str) -> None:
    """Open a connection to ``host:port`` and close it; ``auto`` and ``ray://`` addresses are left to Ray."""
    host, _, port = where.rpartition(":")
    if where != "auto" and "://" not in where:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def nodes_at(where: str) -> list[Mapping[str, Any]]:
    """The resources of each living node of the Ray at the address `where`.

    Raises:
        BadRequest: it cannot be reached.
    """
    import ray

    try:
        _connect(where)
        ray.init(where, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRequest(f"Ray at {where} cannot be reached: {error}") from None
    try:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def profile_text(where: str, nodes: Sequence[Mapping[str, float]]) -> str:
    """A profile of a Ray at the address `where` whose nodes have these resources."""
    with_gpus = [node for node in nodes if node.get("GPU")]
    of = with_gpus or list(nodes)
    gpus = int(min((node.get("GPU", 0) for node in of), default=0))
    cpus = int(min((node.get("CPU", 0) for node in of), default=0))
    types = sorted({key.partition(":")[2] for node in of for key in node if key.startswith("accelerator_type:")})
    alike = len({(node.get("GPU", 0), node.get("CPU", 0)) for node in of}) < 2
    return "\n".join(
        [
            "# Written by `launch clusters new`; docs/profiles.md lists all keys.",
            'description = "the Ray cluster at hand"',
            'backend = "ray"',
            "",
            "# Run directories. All nodes have to see them under the same path; with `shared`, others are refused.",
            '# runs = "/mnt/shared/runs"',
            '# shared = ["/mnt/shared"]',
            "",
            f"# {len(nodes)} nodes are up, {len(with_gpus)} of them with GPUs"
            + ("." if alike else "; they differ, and these are the numbers of the smallest."),
            f"nodes = {len(of)}",
            "[node]",
            f"gpus = {gpus}",
            f"cpus = {cpus}",
            *([f"accelerator = {_quoted(types[0])}"] if len(types) == 1 else []),
            "",
            "[ray]",
            f"address = {_quoted(where)}",
            "# autoscales = true                  # the cluster grows on demand: do not refuse what is larger than it is now",
            "",
        ]
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
