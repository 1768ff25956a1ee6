"""What is asked (`RunSpec`), what will be sent (`Plan`), and the states a run can be in."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launcher.cluster import Cluster
from launcher.errors import BadRequest
from launcher.placement import Devices, Placement

DEFAULT_TARGET = "training.train:train"


class State(enum.StrEnum):
    """Where a run is. LOST: it ended and left no result; UNKNOWN: nobody could tell just now, so it is never an end."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"
    UNKNOWN = "unknown"

    @property
    def done(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.STOPPED, State.LOST)

    @property
    def exit_status(self) -> int:
        """The exit status of ``launch`` for a run that ended in this state."""
        return {State.SUCCEEDED: 0, State.STOPPED: 3}.get(self, 1)


@dataclass(frozen=True)
class RunSpec:
    """What is asked, in the words of the command line. Field names are the options' and the Python keywords'."""

    target: str = DEFAULT_TARGET
    args: tuple[str, ...] = ()
    backend: str | None = None
    cluster: str | None = None
    gpus: int | None = None
    tpus: int | None = None
    cpus: int | None = None
    nodes: int | None = None
    accelerator: str | None = None
    topology: str | None = None
    name: str | None = None
    time: str | None = None
    max_restarts: int = 3
    spare_nodes: int = 0

    def __post_init__(self) -> None:
        for option, least in (
            ("gpus", 1),
            ("tpus", 1),
            ("cpus", 1),
            ("nodes", 1),
            ("max_restarts", 0),
            ("spare_nodes", 0),
        ):
            value = getattr(self, option)
            flag = f"--{option.replace('_', '-')} {value}"
            if value is not None and type(value) is not int:  # from Python; a flag's text is a number by now
                raise BadRequest(f"{flag}: a whole number is needed, not {value!r}.")
            if value is not None and value < least:
                raise BadRequest(f"{flag}: {'at least 1' if least else '0 or more'} is needed.")
        asked = [f"--{k}" for k in ("gpus", "tpus", "cpus") if getattr(self, k) is not None]
        if len(asked) > 1:
            raise BadRequest(f"{' and '.join(asked)} together: a run uses one kind of device. Give one of them.")
        if self.name is not None:
            check_name(self.name)

    def devices(self) -> Devices | None:
        """The devices asked for, or None when the choice is left to the backend's default."""
        shape = (self.nodes, self.accelerator, self.topology)
        if self.gpus is not None:
            return Devices("gpu", self.gpus, *shape)
        if self.tpus is not None:
            return Devices("tpu", self.tpus, *shape)
        if self.cpus is not None:
            return Devices("cpu", self.cpus, *shape)
        return None


TargetKind = Literal["function", "script", "module", "value"]


@dataclass(frozen=True)
class Target:
    """What every rank runs.

    Attributes:
        kind: ``function`` (``name`` is ``module:function``), ``script`` (a path below ``code/`` or absolute),
            ``module`` (run as ``-m name``) or ``value`` (a function that travels pickled in ``target.pkl``).
        path: entries that come first on ``sys.path`` of every rank; they point into the snapshot.
        source: files whose import statements the forkserver preloads.
    """

    kind: TargetKind
    name: str
    args: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    source: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that will be sent. A backend needs nothing else, and ``--dry-run`` prints it."""

    name: str
    run_dir: Path
    spec: RunSpec
    backend: str
    cluster: Cluster
    placement: Placement
    target: Target
    cwd: Path
    time_minutes: int
    environment: dict[str, str] = field(default_factory=dict)
    start: str = ""  # when and where the scheduler would start it, as it said when the plan was made


def check_name(name: str) -> None:
    """Refuse a run name that is not a plain file name; names end up in paths, job names and scripts.

    Raises:
        BadRequest: anything but letters, digits, dot, dash and underscore, or more than 100 characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise BadRequest(
            f"--name {name!r}: a run name is up to 100 letters, digits, '.', '_' and '-', and begins with a letter or a"
            " digit, such as 'mrpc-lr3e-5'."
        )


def parse_minutes(text: str) -> int:
    """Return whole minutes (rounded up) for ``90m``, ``2h``, ``1d12h``, ``45s`` or SLURM's ``[D-]HH:MM:SS``.

    Raises:
        BadRequest: anything else, or nothing at all.
    """
    slurm = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
    units = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    match = slurm or units
    days, hours, minutes, seconds = (int(g or 0) for g in match.groups()) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise BadRequest(f"--time {text!r}: write a duration such as 90m, 2h, 1d12h or 02:30:00.")
    return -(-total // 60)
