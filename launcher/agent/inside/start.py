"""What the agent gives a session on its standard input."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.lifecycle.records.visits import VisitRequest


@dataclass(frozen=True)
class VisitedRank:
    """A rank of the node.

    Attributes:
        pid: its process; 0: it does not run.
        started: when the process began, as field 22 of ``/proc/PID/stat`` says, so that it is not confused with a later one.
        environment: its variables.
    """

    rank: int
    pid: int = 0
    started: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SessionStart:
    """A session of the visit `id` on node number `node` of the placement.

    Attributes:
        ranks: those of the node that the client asked for; all of the node if it asked for nodes.
        environment: the variables of a process of the node that is no rank.
        path: folders of the code of the run; `moved` are those that were copied from elsewhere.
        command: the program of the ranks, if they run a command instead of Python code.
    """

    id: str
    run_dir: str
    node: int
    host: str
    attempt: int
    request: VisitRequest
    ranks: list[VisitedRank]
    environment: dict[str, str]
    cwd: str
    path: list[str]
    moved: dict[str, str] = field(default_factory=dict)
    command: str = ""
