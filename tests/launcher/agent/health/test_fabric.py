"""Networks of nodes, as a tree of files in the form of Linux's sysfs describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.agent.health import fabric


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def rdma(
    root: Path, name: str, layer: str, rate: str, state: str = "4: ACTIVE", driver: str = "mlx5_core", port: int = 1
) -> None:
    folder = root / "sys/class/infiniband" / name
    for file, text in (("link_layer", layer), ("rate", rate), ("state", state)):
        write(folder / f"ports/{port}/{file}", text)
    (root / "drivers" / driver).mkdir(parents=True, exist_ok=True)
    (folder / "device").mkdir(exist_ok=True)
    if not (folder / "device/driver").exists():
        (folder / "device/driver").symlink_to(root / "drivers" / driver)


def card(root: Path, name: str, speed: str, state: str = "up", device: bool = True) -> None:
    folder = root / "sys/class/net" / name
    write(folder / "speed", speed)
    write(folder / "operstate", state)
    if device:
        (folder / "device").mkdir()


def test_a_node_without_cards_has_no_network(tmp_path: Path) -> None:
    card(tmp_path, "lo", "10000", device=False)
    assert fabric.look(tmp_path, {}) == {}
    assert fabric.describe({}) == "no network card"
    assert fabric.warnings({}) == []
    assert fabric.below_rate([{}, {}], 1.0) == ""


def test_infiniband_with_gpudirect_is_in_order(tmp_path: Path) -> None:
    for number in range(8):
        rdma(tmp_path, f"mlx5_{number}", "InfiniBand", "400 Gb/sec (4X NDR)")
    rdma(tmp_path, "mlx5_8", "Ethernet", "100 Gb/sec (4X EDR)")
    card(tmp_path, "eth0", "25000")
    (tmp_path / "sys/module/nvidia_peermem").mkdir(parents=True)
    found = fabric.look(tmp_path, {})
    assert (found["kind"], len(found["adapters"]), found["down"]) == ("infiniband", 8, [])
    assert fabric.describe(found) == "8 x InfiniBand 400 Gbit/s"
    assert fabric.warnings(found) == []
    assert fabric.below_rate([found, found], 300e9) == ""
    assert fabric.below_rate([found, found], 40e9) == "10% of what 8 x InfiniBand 400 Gbit/s can give"


def test_an_adapter_that_is_down_or_slow_is_seen(tmp_path: Path) -> None:
    rdma(tmp_path, "mlx5_0", "InfiniBand", "400 Gb/sec (4X NDR)")
    rdma(tmp_path, "mlx5_1", "InfiniBand", "10 Gb/sec (4X SDR)", "1: DOWN")
    rdma(tmp_path, "mlx5_2", "InfiniBand", "100 Gb/sec (1X NDR)")
    rdma(tmp_path, "mlx5_2", "InfiniBand", "400 Gb/sec (4X NDR)", "2: INIT", port=2)
    found = fabric.look(tmp_path, {})
    assert found["adapters"] == {"mlx5_0": 400.0, "mlx5_2": 100.0}
    assert fabric.describe(found) == "1 x InfiniBand 100 Gbit/s and 1 x InfiniBand 400 Gbit/s"
    down, direct = fabric.warnings(found)
    assert down == "mlx5_1, mlx5_2:2 (InfiniBand) are down"
    assert "cannot read the memory of GPUs" in direct


@pytest.mark.parametrize(
    ("version", "direct"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65", True),
        ("NVIDIA UNIX x86_64 Kernel Module  580.65", False),
    ],
)
def test_the_open_driver_needs_no_module_for_gpudirect(tmp_path: Path, version: str, direct: bool) -> None:
    rdma(tmp_path, "rocep1", "Ethernet", "200 Gb/sec (4X HDR)")
    write(tmp_path / "proc/driver/nvidia/version", version)
    found = fabric.look(tmp_path, {})
    assert (found["kind"], found["gpudirect"]) == ("roce", direct)
    assert bool(fabric.warnings(found)) != direct


@pytest.mark.parametrize(
    "place", ["", "LD_LIBRARY_PATH", "opt/amazon/ofi-nccl/lib/x86_64-linux-gnu", "etc/ld.so.cache"]
)
@pytest.mark.parametrize("kind", ["efa", "slingshot"])
def test_without_its_plugin_nccl_would_use_tcp(tmp_path: Path, kind: str, place: str) -> None:
    environment = {"LD_LIBRARY_PATH": ":/nowhere:/own"}
    if kind == "efa":
        rdma(tmp_path, "efa_0", "Unspecified", "100 Gb/sec (4X EDR)", driver="efa")
    else:
        write(tmp_path / "sys/class/cxi/cxi0/device/net/hsn0/speed", "200000")
        write(tmp_path / "sys/class/cxi/cxi0/device/net/hsn0/operstate", "up")
    if place == "etc/ld.so.cache":
        write(tmp_path / place, "\0libnccl-net.so\0/usr/lib/libnccl-net.so")
    elif place:
        write(tmp_path / ("own" if place == "LD_LIBRARY_PATH" else place.rpartition("/")[0]) / "libnccl-net.so", "")
    found = fabric.look(tmp_path, environment)
    assert (found["kind"], found["plugin"]) == (kind, bool(place))
    assert ["it would use TCP" in text for text in fabric.warnings(found)] == [] if place else [True]


def test_a_chosen_plugin_is_looked_for_by_its_name(tmp_path: Path) -> None:
    rdma(tmp_path, "efa_0", "Unspecified", "100 Gb/sec (4X EDR)", driver="efa")
    write(tmp_path / "own/libnccl-net-mine.so", "")
    environment = {"LD_LIBRARY_PATH": "/own", "NCCL_NET_PLUGIN": "mine"}
    assert fabric.look(tmp_path, environment)["plugin"]


def test_of_several_ethernet_cards_the_fastest_counts(tmp_path: Path) -> None:
    card(tmp_path, "eth0", "1000")
    card(tmp_path, "eth1", "100000")
    card(tmp_path, "eth2", "200000", "down")
    card(tmp_path, "eth3", "-1")
    found = fabric.look(tmp_path, {})
    assert (found["kind"], found["adapters"], found["down"]) == ("ethernet", {"eth1": 100.0}, [])
    assert fabric.warnings(found) == []


@pytest.mark.parametrize("text", ["", "many Gb/sec", "\x00\xff", "-5 Gb/sec", "1e999 Gb/sec"])
def test_a_rate_that_says_nothing_is_an_adapter_that_is_down(tmp_path: Path, text: str) -> None:
    rdma(tmp_path, "mlx5_0", "InfiniBand", text, "4: ACTIVE")
    rdma(tmp_path, "mlx5_1", "InfiniBand", "400 Gb/sec (4X NDR)")
    found: dict[str, Any] = fabric.look(tmp_path, {})
    assert found["adapters"].get("mlx5_1") == 400.0
    assert "mlx5_0" in found["down"] or found["adapters"]["mlx5_0"] == 1.0


def test_this_machine_can_be_looked_at() -> None:
    found = fabric.look()
    assert not found or fabric.describe(found)
