"""What agents, their coordinator and the backends exchange."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.lifecycle.history import JobFate

Message = dict[str, Any]


@dataclass(frozen=True)
class AgentInfo:
    """Where an agent sits. The backend makes it; the agent reads no environment.

    Attributes:
        host: this node's name, for people.
        address: node 0's IP address, as the other nodes reach it.
        session: differs between two submissions of a run, and between two starts of a job, so that nobody takes an old
            rendezvous for a new one.
        requeue: asks the scheduler to start the job again later, away from the given hosts; says whether it will. None
            where nobody can.
        fate: asks the scheduler what it has in mind for the job.
    """

    node: int = 0
    nodes: int = 1
    host: str = field(default_factory=socket.gethostname)
    address: str = "127.0.0.1"
    session: str = ""
    requeue: Callable[[Sequence[str]], bool] | None = None
    fate: Callable[[], JobFate] = lambda: ""
