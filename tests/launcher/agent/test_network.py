"""Addresses and ports without name resolution."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys

import pytest

from launcher.agent.network import interface_of, reserve_port, source_towards

IP_LOCAL_PORT_RANGE = 51  # since Linux 6.3: the range of this socket's automatic ports, high << 16 | low

LISTEN = """
import sys
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
