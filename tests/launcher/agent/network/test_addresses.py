"""Addresses and ports without name resolution."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.agent.network.addresses import (
    interface_of,
    interface_variables,
    listener,
    reserve_port,
    source_towards,
)

IP_LOCAL_PORT_RANGE = 51  # since Linux 6.3: the range of this socket's automatic ports, high << 16 | low

LISTEN = """
import sys
from pathlib import Path
from torch.distributed import TCPStore
for attempt in range(2):  # and again after a restart of the ranks
    store = TCPStore("127.0.0.1", int(sys.argv[1]), world_size=1, is_master=True)
    store.set("key", "value")
    print(store.get("key").decode())
    del store
"""


def test_nobody_who_asks_for_a_free_port_gets_the_reserved_one() -> None:
    with contextlib.ExitStack() as stack:
        reserved = {stack.enter_context(reserve_port()).getsockname()[1] for _ in range(20)}
        assert len(reserved) == 20
        for address in ("", "127.0.0.1"):
            for reuse in (0, 1):
                for _ in range(100):
                    other = stack.enter_context(socket.socket())
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
                    other.bind((address, 0))
                    assert other.getsockname()[1] not in reserved


def test_not_even_where_it_is_the_only_one_left() -> None:
    with reserve_port() as holder, socket.socket() as other:
        port = holder.getsockname()[1]
        try:
            other.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
        except OSError:
            return  # an older kernel; the test above uses random ports
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="Address already in use"):
            other.bind(("", 0))


@pytest.mark.slow
def test_a_store_of_torch_listens_on_the_port_while_it_is_held() -> None:
    with reserve_port() as holder:
        port = str(holder.getsockname()[1])
        done = subprocess.run([sys.executable, "-c", LISTEN, port], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "value\nvalue\n"), done.stderr


def test_the_way_to_this_machine_is_the_loopback() -> None:
    assert source_towards("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None  # reserved for documentation


@pytest.mark.parametrize(
    ("address", "reached"),
    [("127.0.0.1", {"127.0.0.1"}), ("", {"127.0.0.1", "127.0.0.2"}), ("192.0.2.1", {"127.0.0.1", "127.0.0.2"})],
)
def test_it_listens_on_its_own_address_or_if_that_is_unknown_or_translated_on_all(
    address: str, reached: set[str]
) -> None:
    found = set()
    with listener(address) as listening:
        for each in ("127.0.0.1", "127.0.0.2"):
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection((each, listening.getsockname()[1])).close()
                found.add(each)
    assert found == reached


IPV6_ONLY = """
import asyncio, os, socket
from launcher.agent.network.addresses import interface_of, interface_variables, listener, peer_of, source_towards

async def main():
    server = await asyncio.start_server(serve, sock=listener())
    port = server.sockets[0].getsockname()[1]
    for address in ("fd00::1", *os.environ["ALSO"].split()):
        reader, writer = await asyncio.open_connection(address, port)
        print((await reader.readline()).decode().strip(), source_towards(address), interface_of(source_towards(address)))
        writer.close()

async def serve(reader, writer):
    writer.write(peer_of(writer.get_extra_info("peername")).encode() + b"\\n")
    await writer.drain()
    writer.close()

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("setup", "also", "found"),
    [
        ("", "", ["fd00::1 fd00::1 lo"]),
        ("ip addr add 10.1.2.3/24 dev lo && ", "10.1.2.3", ["fd00::1 fd00::1 lo", "10.1.2.3 10.1.2.3 lo"]),
    ],
)
def test_agents_meet_over_ipv6_and_over_both(setup: str, also: str, found: list[str]) -> None:
    network = f"ip link set lo up && ip -4 addr flush dev lo && ip -6 addr add fd00::1/64 dev lo nodad && {setup}"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", network + 'exec "$@"', "sh", sys.executable, "-c", IPV6_ONLY],
        env={**os.environ, "ALSO": also}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == found, done.stderr


def _network(root: Path, **speeds: int | None) -> Path:
    """A /sys with network cards of these speeds in Mbit/s; None: the link is down."""
    for name, speed in speeds.items():
        card = root / "sys/class/net" / name
        (card / "device").mkdir(parents=True)
        (card / "operstate").write_text("down\n" if speed is None else "up\n")
        (card / "speed").write_text(f"{-1 if speed is None else speed}\n")
    return root


def test_nccl_gets_the_interface_by_its_exact_name_where_nothing_is_faster(tmp_path: Path) -> None:
    both = {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}
    assert interface_variables("eth1", _network(tmp_path / "one", eth1=10000)) == both
    assert interface_variables("eth1", _network(tmp_path / "equal", eth1=10000, eth10=10000)) == both
    assert interface_variables("eth1", _network(tmp_path / "down", eth1=1000, eth2=None)) == both
    assert interface_variables("eth1", tmp_path / "nothing known") == both
    assert interface_variables(None, tmp_path) == {}


def test_nccl_chooses_by_itself_where_the_node_has_a_faster_network(tmp_path: Path) -> None:
    gloo = {"GLOO_SOCKET_IFNAME": "eth0"}
    assert interface_variables("eth0", _network(tmp_path / "faster", eth0=1000, eth1=100000)) == gloo
    verbs = _network(tmp_path / "verbs", eth0=1000)
    (verbs / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    assert interface_variables("eth0", verbs) == gloo
    bond = _network(tmp_path / "bond", eth0=25000, eth1=25000)
    (bond / "sys/class/net/bond0").mkdir()
    for file, text in (("operstate", "up"), ("speed", "50000")):
        (bond / "sys/class/net/bond0" / file).write_text(text)
    assert interface_variables("bond0", bond)["NCCL_SOCKET_IFNAME"] == "=bond0"


def test_the_limit_of_open_files_becomes_what_the_system_allows() -> None:
    code = """
import resource
from launcher.agent.network.addresses import raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))
raise_file_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(4096, 4096)\n"
