"""Addresses and ports without name resolution."""

from __future__ import annotations

import fcntl
import ipaddress
import resource
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

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


def listener(address: str = "", backlog: int = socket.SOMAXCONN) -> socket.socket:
    """Return a listening TCP socket on a free port of the IP address `address`, by which other nodes reach this machine.

    If it is unknown, or not this machine's own (behind a translation of addresses), the socket listens on all addresses,
    IPv4 and IPv6. `backlog` connections wait at most until they are accepted.
    """
    if address:
        with suppress(OSError):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return socket.create_server((address, 0), family=family, backlog=backlog)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def peer_of(name: tuple[Any, ...]) -> str:
    """Return the IP address in the name of a peer; that of an IPv4 peer of a socket for both as IPv4."""
    return str(name[0]).removeprefix("::ffff:") if "." in name[0] else str(name[0])


def source_towards(address: str) -> str:
    """Return the IP address of this machine that packets to the IP address `address` leave from. Sends nothing."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 1))
        return str(probe.getsockname()[0])


def interface_of(ip: str) -> str | None:
    """Return the name of the network interface that has the IP address `ip`, or None."""
    if ":" in ip:
        return _interface_of_ipv6(ip)
    return next((name for name, address in _ipv4_addresses() if address == ip), None)


def _ipv4_addresses() -> Iterator[tuple[str, str]]:
    """The interfaces of this machine that have an IPv4 address, with it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                packed = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
                yield name, socket.inet_ntoa(packed[20:24])


def _interface_of_ipv6(ip: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, ip.partition("%")[0])
    return next((name for name, packed in _ipv6_addresses() if packed == wanted), None)


def _ipv6_addresses() -> Iterator[tuple[str, bytes]]:
    """The interfaces of this machine that have an IPv6 address, with it."""
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            if words := line.split():
                yield words[-1], bytes.fromhex(words[0])


def own_addresses() -> list[str]:
    """Return the IP addresses of this machine by which others may reach it; those of the machine alone come last.

    Without IPv6 addresses of a single link, which no other machine can name.
    """
    found = [address for _, address in _ipv4_addresses()]
    for _, packed in _ipv6_addresses():
        address = ipaddress.IPv6Address(packed)
        if not address.is_link_local:
            found.append(str(address))
    return sorted(dict.fromkeys(found), key=lambda address: ipaddress.ip_address(address).is_loopback)


def interface_variables(interface: str | None, root: Path = Path("/")) -> dict[str, str]:
    """Return the variables that name the network interface between nodes to gloo and NCCL.

    Without them, both look up the host's own name, and use the loopback if it does not resolve. NCCL's is set only if the
    node has no faster network: not beside an adapter of InfiniBand or RoCE, nor beside a faster interface that is up. It
    is an exact name, since NCCL otherwise takes it for a prefix, and ``eth1`` for ``eth10``, too.
    """
    if not interface:
        return {}
    variables = {"GLOO_SOCKET_IFNAME": interface}
    if not _faster_network(interface, root):
        variables["NCCL_SOCKET_IFNAME"] = f"={interface}"
    return variables


def _faster_network(interface: str, root: Path) -> bool:
    adapters = root / "sys/class/infiniband"
    if adapters.is_dir() and any(adapters.iterdir()):
        return True
    cards = [path.parent for path in (root / "sys/class/net").glob("*/device")]  # virtual interfaces have no device
    speeds = {card.name: _speed(card) for card in cards}
    return max(speeds.values(), default=0) > speeds.get(interface, _speed(root / "sys/class/net" / interface))


def _speed(interface: Path) -> int:
    """The speed of an interface in Mbit/s; 0: down or unknown."""
    try:
        up = (interface / "operstate").read_text().strip() == "up"
        return max(0, int((interface / "speed").read_text())) if up else 0
    except (OSError, ValueError):
        return 0


def file_limit() -> int:
    """Return how many files this process can have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else sys.maxsize


def raise_file_limit() -> None:
    """Raise the limit of open files of this process, and of those that it starts, to what the system allows.

    In a large run the coordinator has a connection for each node, and rank 0 has some for each rank; many systems allow
    1,024 files unless a process asks for more.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
