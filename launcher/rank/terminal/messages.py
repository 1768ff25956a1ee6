"""Messages between a foreground command and the agent about the terminal of a rank.

They are those of a SOCK_SEQPACKET socket. The first byte of a message is its kind; the data follows.

====================  ===================================================
to the agent
`TYPED`               bytes of the keyboard
`SIZE`                the size of the window, as ``struct winsize``
`CONTINUED`           the foreground command goes on after `SUSPEND`
from the agent
`STARTING`            the output of another attempt follows
`OUTPUT`              bytes that the rank wrote
`STOPPING`            the run was asked to stop, by Ctrl-C
`SUSPEND`             the ranks are suspended, by Ctrl-Z
====================  ===================================================
"""

from __future__ import annotations

TYPED, SIZE, CONTINUED = b"i", b"w", b"c"
STARTING, OUTPUT, STOPPING, SUSPEND = b"a", b"o", b"s", b"z"

CHUNK = 65536
"""Bytes of data in one message at most."""

STDIN, CONNECTION, MASTER, SLAVE = 0, 3, 4, 5
"""Descriptors of the agent at its start: the standard input of the rank, the socket, and both ends of a pseudo-terminal."""
