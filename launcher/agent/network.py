"""Addresses and ports without name resolution."""

from __future__ import annotations

import fcntl
import socket
import struct

SIOCGIFADDR = 0x8915


def reserve_port(address: str = "") -> socket.socket:
    """Bind a free TCP port and keep it: the socket's owner can lend it to one listener on this node at a time.

    The socket is bound but does not listen. Linux then gives the port to nobody who asks for a free one, yet lets a
    process of the same user that sets SO_REUSEADDR (as torch's TCPStore does) listen on it. So there is no moment between
    looking for a port and using it in which another job on the node can take it.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((address, 0))
    return holder


def source_towards(address: str) -> str:
    """Return the IP address of this machine that packets to `address` leave from. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 1))
        return str(probe.getsockname()[0])


def interface_of(ip: str) -> str | None:
    """Return the name of the network interface that has the IPv4 address `ip`, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                packed = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(packed[20:24]) == ip:
                return name
    return None
