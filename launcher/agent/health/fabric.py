"""The network between nodes: what a node has, what NCCL needs to use it, and what it should give."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PLUGINS = ("libnccl-net.so", "libnccl-net-ofi.so", "libnccl-net-aws-ofi.so")
"""Names of NCCL's plug-in for libfabric, without which it does not use EFA or Slingshot."""

PLUGIN_FOLDERS = ("opt/amazon/ofi-nccl/lib*", "opt/amazon/aws-ofi-nccl/lib*", "opt/aws-ofi-nccl/lib*")
"""Where the installers of the plug-in put it, beside the folders of ``ld.so.cache`` and LD_LIBRARY_PATH."""

NEEDS_PLUGIN = {"efa": "EFA", "slingshot": "Slingshot"}
NAMES = {"infiniband": "InfiniBand", "roce": "RoCE", "ethernet": "Ethernet", **NEEDS_PLUGIN}

GOOD_PART = 0.4
"""An all-reduce of 256 MiB that reaches less than this part of the adapters' rate is worth a look; NCCL reaches 0.7 to 0.95."""


def look(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the fastest kind of network of this node, as JSON data.

    Returns:
        ``{"kind": a key of `NAMES`, "adapters": {name of an active one: Gbit/s}, "down": [names], "plugin": whether NCCL's
        plug-in for libfabric is there, "gpudirect": whether adapters can read a GPU's memory}``; empty if the node has no
        network card.
    """
    kinds: dict[str, dict[str, float]] = {}
    down: dict[str, list[str]] = {}
    for name, kind, rate in (*_rdma(root), *_slingshot(root), *_ethernet(root)):
        if rate > 0:
            kinds.setdefault(kind, {})[name] = rate
        else:
            down.setdefault(kind, []).append(name)
    fastest = [kind for kind in ("infiniband", "efa", "slingshot", "roce", "ethernet") if kind in kinds]
    if not fastest:
        return {}
    kind = fastest[0]
    adapters = kinds[kind]
    if kind == "ethernet":  # the others are for management and storage, and NCCL uses one interface
        adapters = dict([max(adapters.items(), key=lambda each: each[1])])
    return {
        "kind": kind,
        "adapters": adapters,
        "down": down.get(kind, []) if kind != "ethernet" else [],
        "plugin": _has_plugin(root, environment),
        "gpudirect": _gpudirect(root),
    }


def describe(found: Mapping[str, Any]) -> str:
    """Say in a few words what `look` found: ``8 x InfiniBand 400 Gbit/s``."""
    if not found:
        return "no network card"
    counts: dict[float, int] = {}
    for rate in found["adapters"].values():
        counts[rate] = counts.get(rate, 0) + 1
    return " and ".join(f"{count} x {NAMES[found['kind']]} {rate:g} Gbit/s" for rate, count in sorted(counts.items()))


def warnings(found: Mapping[str, Any]) -> list[str]:
    """Return what keeps NCCL from using all of the network that `look` found, with the remedy."""
    if not found:
        return []
    texts = []
    name = NAMES[found["kind"]]
    if found["down"]:
        texts.append(f"{', '.join(found['down'])} ({name}) {'is' if len(found['down']) == 1 else 'are'} down")
    if found["kind"] in NEEDS_PLUGIN and not found["plugin"]:
        texts.append(
            f"NCCL uses {name} through a plug-in, and {PLUGINS[0]} is in no library folder: it would use TCP"
            " (install aws-ofi-nccl, or add its lib folder to LD_LIBRARY_PATH in [environment])"
        )
    if found["kind"] in ("infiniband", "roce") and not found["gpudirect"]:
        texts.append(
            f"{name} cannot read the memory of GPUs, so NCCL copies through the host"
            " (load nvidia_peermem, or use the driver's open kernel modules)"
        )
    return texts


def below_rate(found: Sequence[Mapping[str, Any]], bytes_per_second: float) -> str:
    """Return why an all-reduce over several nodes is slow for their network, or an empty string.

    Args:
        found: what `look` found on each node.
        bytes_per_second: through each rank of a node, as NCCL's "bus bandwidth": 2 (n-1)/n times the size over the time. It
            cannot exceed the rate of all adapters of a node together.
    """
    if not all(found):
        return ""
    slowest = min(found, key=_total)
    part = bytes_per_second * 8e-9 / _total(slowest)
    if part >= GOOD_PART:
        return ""
    return f"{part:.0%} of what {describe(slowest)} can give"


def _total(found: Mapping[str, Any]) -> float:
    return float(sum(found["adapters"].values()))


def _rdma(root: Path) -> Iterator[tuple[str, str, float]]:
    """Each port of an RDMA adapter: its name, the kind, and Gbit/s; 0 if it is not active.

    Source: Documentation/ABI/stable/sysfs-class-infiniband of Linux.
    """
    for port in sorted((root / "sys/class/infiniband").glob("*/ports/*")):
        adapter = port.parents[1]
        layer, state, rate = (_text(port / name) for name in ("link_layer", "state", "rate"))
        driver = os.path.basename(os.path.realpath(adapter / "device/driver"))
        kind = "efa" if driver == "efa" else "roce" if layer == "Ethernet" else "infiniband"
        number = re.match(r"[0-9]+([.][0-9]+)?", rate) if "ACTIVE" in state else None
        name = adapter.name if port.name == "1" else f"{adapter.name}:{port.name}"
        yield name, kind, float(number[0]) if number else 0.0


def _slingshot(root: Path) -> Iterator[tuple[str, str, float]]:
    for adapter in sorted((root / "sys/class/cxi").glob("*")):
        speeds = [_speed(card) for card in (adapter / "device/net").glob("*")]
        yield adapter.name, "slingshot", max(speeds, default=0.0)


def _ethernet(root: Path) -> Iterator[tuple[str, str, float]]:
    for card in sorted((root / "sys/class/net").glob("*")):
        if (card / "device").exists():  # virtual interfaces have none
            yield card.name, "ethernet", _speed(card)


def _speed(card: Path) -> float:
    """The Gbit/s of a network interface; 0 if it is down or does not say."""
    speed = _text(card / "speed")
    return float(speed) / 1000 if _text(card / "operstate") == "up" and speed.isdecimal() else 0.0


def _has_plugin(root: Path, environment: Mapping[str, str]) -> bool:
    chosen = environment.get("NCCL_NET_PLUGIN", "")
    names = [*PLUGINS, *([chosen, f"libnccl-net-{chosen}.so"] if chosen else [])]
    folders = [root / folder.lstrip("/") for folder in environment.get("LD_LIBRARY_PATH", "").split(":") if folder]
    folders += [folder for pattern in PLUGIN_FOLDERS for folder in root.glob(pattern)]
    if any((folder / name).exists() for folder in folders for name in names):
        return True
    try:
        known = (root / "etc/ld.so.cache").read_bytes()
    except OSError:
        return False
    return any(name.encode() in known for name in names)


def _gpudirect(root: Path) -> bool:
    """Whether a module lets adapters read a GPU's memory: nvidia_peermem, its predecessor, or the open driver's DMA-BUF."""
    if any((root / "sys/module" / name).exists() for name in ("nvidia_peermem", "nv_peer_mem")):
        return True
    return "Open Kernel Module" in _text(root / "proc/driver/nvidia/version")


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
