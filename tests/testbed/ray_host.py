"""Start the Ray nodes of a test cluster: ``python -m tests.testbed.ray_host FOLDER``.

One process starts all nodes, because importing Ray takes more than a second. It reads requests (operation, arguments)
one after another from the socket ``<folder>/host``, and answers ("ok", value) or ("error", text).
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.util import get_node_ip_address

from tests.testbed.keeper import free_ports, listening

spawning = threading.Lock()


class OrderlyNode(Node):  # type: ignore[misc]  # ray is not followed by mypy
    """A node that spawns processes under a lock, because it names log files by those that exist."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        spawning.acquire()
        try:
            super().__init__(*args, **kwargs)
        finally:
            if not self.spawned:
                spawning.release()

    spawned = False

    def start_ray_processes(self) -> None:
        super().start_ray_processes()
        self.spawned = True
        spawning.release()  # nodes register in parallel, which takes most of the time


class Host:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ip: str = get_node_ip_address()  # not 127.0.0.1, which ray.init translates to this address
        self.address = ""
        self.nodes: dict[str, Node] = {}

    def start(self, specs: dict[str, dict[str, Any]]) -> str:
        """Start nodes in parallel, the first one as the head; returns the cluster's address."""
        failures: dict[str, str] = {}
        threads = []
        for name, spec in specs.items():
            head = not self.address
            port = free_ports(1)[0] if head else 0
            thread = threading.Thread(target=self._start_node, args=(name, spec, port, failures))
            thread.start()
            threads.append(thread)
            if head:  # the other nodes need only its port
                while thread.is_alive() and not listening(port, self.ip):
                    time.sleep(0.02)
                self.address = f"{self.ip}:{port}"
        for thread in threads:
            thread.join()
        if failures:
            raise RuntimeError("\n".join(f"{name}: {text}" for name, text in failures.items()))
        return self.address

    def remove(self, name: str, graceful: bool) -> None:
        self.nodes.pop(name).kill_all_processes(check_alive=False, allow_graceful=graceful, wait=True)

    def ids(self) -> dict[str, str]:
        return {name: node.node_id for name, node in self.nodes.items()}

    def _start_node(self, name: str, spec: dict[str, Any], head_port: int, failures: dict[str, str]) -> None:
        params = {
            "node_ip_address": self.ip,
            "temp_dir": str(self.folder),
            "object_store_memory": 100 * 2**20,
            "min_worker_port": 0,
            "max_worker_port": 0,
            "node_manager_port": 0,
            "dashboard_agent_listen_port": None,  # any free port; the default is the same for all nodes
            # named here: nodes that start in parallel would select the same file
            "raylet_socket_name": str(self.folder / f"{name}.raylet"),
            "plasma_store_socket_name": str(self.folder / f"{name}.plasma"),
        }
        if head_port:
            params |= {"gcs_server_port": head_port, "include_dashboard": False, "no_monitor": True}
        else:
            params |= {"gcs_address": self.address, "include_log_monitor": False}
        try:
            node = OrderlyNode(
                RayParams(**params | spec), head=bool(head_port), shutdown_at_exit=False, spawn_reaper=False
            )
        except Exception:
            failures[name] = traceback.format_exc()
        else:
            self.nodes[name] = node


def main(folder: Path) -> None:
    host = Host(folder)
    with Listener(str(folder / "host")) as listener, listener.accept() as connection:
        while True:
            operation, arguments = connection.recv()
            try:
                connection.send(("ok", getattr(host, operation)(*arguments)))
            except Exception:
                connection.send(("error", traceback.format_exc()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
