"""The store through which the ranks of an attempt find each other, in a process of its own.

A process group needs its store as long as any rank runs. In rank 0, where torch would hold it, it ends with that rank. So the
agent of rank 0's node holds it, as torchrun's does. It does so in another process, since it is torch's own store, and an agent
does not import torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from launcher.agent.network.addresses import listener, reserve_port
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.environment import agent_holds_store, shared_environment
from launcher.request import own_packages
from launcher.request.spec import Plan

UNMOVED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that SLURM or a terminal sends to all processes of a job; ranks that save after one still need the store."""


class Store:
    """The port of an attempt's process groups on the node of rank 0, and the store behind it.

    Its process lives as long as the run's agent on that node, and holds an empty store for each attempt in turn.
    """

    def __init__(self, run_dir: RunDir, plan: Plan, node: int) -> None:
        self._run_dir, self._plan, self._node = run_dir, plan, node
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._held: socket.socket | None = None

    def prepare(self) -> None:
        """Start the process, unless it runs; it imports torch while the nodes find each other."""
        if not agent_holds_store(self._plan.placement) or (self._process is not None and self._process.poll() is None):
            return
        self.close()
        self._line, remote = socket.socketpair()
        own = {"CUDA_VISIBLE_DEVICES": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, UNMOVED)  # inherited, and so in force from the first moment
        try:
            with self._run_dir.open_agent_log(self._node) as log:
                self._process = subprocess.Popen(
                    own_packages.command("launcher.agent.network.store"),
                    stdin=remote.fileno(),
                    stdout=log,
                    stderr=log,
                    env=shared_environment(os.environ, self._plan) | own,
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            remote.close()

    def open(self) -> int:
        """Return the port for the next attempt. Ranks can connect to it at once, and wait while the process imports torch."""
        self._release()
        if not agent_holds_store(self._plan.placement):
            self._held = reserve_port()
            return int(self._held.getsockname()[1])
        self.prepare()
        assert self._line is not None
        with listener(socket.SOMAXCONN) as listening:
            with suppress(OSError):  # it has just ended: the ranks cannot connect, and the attempt fails
                socket.send_fds(self._line, [b"\n"], [listening.fileno()])
            return int(listening.getsockname()[1])

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def close(self) -> None:
        """End the process. A process whose agent was killed ends by itself."""
        self._release()
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def main() -> None:
    """Hold a store on each listening socket that standard input passes, in place of the one before, until it ends."""
    line = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    from torch._C._distributed_c10d import TCPStore

    store: TCPStore | None = None
    while True:
        data, descriptors, _, _ = socket.recv_fds(line, 1, 1)
        if not data:
            os._exit(0)  # torch has nothing to put in order
        del store
        port = socket.socket(fileno=os.dup(descriptors[0])).getsockname()[1]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=descriptors[0])


if __name__ == "__main__":
    main()
