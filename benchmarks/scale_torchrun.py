"""The rendezvous of torchrun, for comparison: ``python -m benchmarks.scale_torchrun NODES ...``.

Each node is a thread with the objects of torchrun's agent: a client of the store, torch's `C10dRendezvousBackend` and its
`DynamicRendezvousHandler`, of which `next_rendezvous` is called. The store is torch's TCPStore in this process, as on node 0.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from itertools import pairwise

CLIENTS = 2
LARGEST = 256
"""Each client writes the list of all nodes into one key, and again when another was faster; more nodes take too long."""

LIMIT = 240.0
"""Seconds after which a rendezvous counts as not run."""


def rendezvous_of_torchrun(nodes: int) -> float | None:
    """Return the seconds until all nodes know each other; None for more nodes than `LARGEST`, or after `LIMIT`."""
    if nodes > LARGEST:
        return None
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    parts = [nodes * part // CLIENTS for part in range(CLIENTS + 1)]
    clients = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.scale_torchrun",
                "clients",
                str(store.port),
                str(last - first),
                str(nodes),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for first, last in pairwise(parts)
    ]
    for client in clients:
        assert client.stdout is not None
        client.stdout.readline()
    began = time.monotonic()
    for client in clients:
        assert client.stdin is not None
        print("go", file=client.stdin, flush=True)
    try:
        ends = [client.communicate(timeout=LIMIT)[0].split() for client in clients]
        return max(float(end[-1]) for end in ends) - began if all(ends) else None
    except subprocess.TimeoutExpired:
        return None
    finally:
        for client in clients:
            client.kill()
            client.wait()


def be_clients(port: int, number: int, nodes: int) -> None:
    """Be `number` of `nodes` nodes; print when the last of them has finished."""
    from datetime import timedelta

    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

    limits = RendezvousTimeout(join=timedelta(seconds=LIMIT))
    ends: list[float] = []

    def join() -> None:
        store = TCPStore("127.0.0.1", port, is_master=False)
        backend = C10dRendezvousBackend(store, "run")
        handler = DynamicRendezvousHandler.from_backend("run", store, backend, nodes, nodes, timeout=limits)
        handler.next_rendezvous()
        ends.append(time.monotonic())

    print("ready", flush=True)
    sys.stdin.readline()
    threads = [threading.Thread(target=join, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(max(ends), flush=True)


def main() -> None:
    for nodes in map(int, sys.argv[1:]):
        seconds = rendezvous_of_torchrun(nodes)
        print(f"{nodes:>7} {f'{seconds:.3f} s' if seconds is not None else f'not within {LIMIT:g} s'}", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["clients", port, number, nodes]:
            be_clients(int(port), int(number), int(nodes))
        case _:
            main()
