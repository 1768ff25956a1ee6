"""The store through which the ranks of an attempt find each other, in a process of its own.

A process group needs its store as long as any rank runs. In rank 0, where torch would hold it, it ends with that rank. So the
agent of rank 0's node holds it, as torchrun's does. It does so in another process, since it is torch's own store, and an agent
does not import torch.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

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
        """Start the process, unless it runs; it imports while the nodes find each other."""
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
        """Return the port for the next attempt. Ranks can connect to it at once, and wait while the process imports."""
        self._release()
        if not agent_holds_store(self._plan.placement):
            self._held = reserve_port()
            return int(self._held.getsockname()[1])
        self.prepare()
        assert self._line is not None
        with listener() as listening:  # by any name of the node, as that of torchrun
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
    """Hold a store on each listening socket that standard input passes, in place of the one before, until it ends.

    A child process does so with torch's core alone; if that cannot be imported, this one does with all of torch.
    """
    line = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    ready, imported = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kind = core_of_torch().TCPStore
        except BaseException:  # another version of torch; it may also crash
            os._exit(1)
        os.write(imported, b"\n")
        os.close(imported)
        hold(line, kind)
    os.close(imported)
    if os.read(ready, 1):
        os.waitpid(child, 0)
        os._exit(0)  # without the child there is no store: the agent starts another process for the next attempt
    from torch._C._distributed_c10d import TCPStore

    hold(line, TCPStore)


def core_of_torch() -> Any:
    """Import torch's classes for process groups without its Python modules: a third of the time, and less memory."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    for name in ("torch", "torch.distributed"):  # which torch's core looks for
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
    ctypes.CDLL(str(folder / "lib/libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    core = importlib.import_module("torch._C")
    if not core._c10d_init():
        raise ImportError("this build of torch has no process groups")
    return importlib.import_module("torch._C._distributed_c10d")


def hold(line: socket.socket, kind: Any) -> NoReturn:
    """Hold a store of `kind`, torch's TCPStore, on the newest listening socket of `line`; exit at its end."""
    store = None
    while True:
        data, descriptors, _, _ = socket.recv_fds(line, 1, 1)
        if not data:
            os._exit(0)  # torch has nothing to put in order
        del store
        port = socket.socket(fileno=os.dup(descriptors[0])).getsockname()[1]
        store = kind("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=descriptors[0])


if __name__ == "__main__":
    main()
