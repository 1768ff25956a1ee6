"""A run for fault injection: its progress, its processes, and its remains."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.client.run import Run, find
from launcher.errors import BadRequest
from launcher.request.spec import State
from tests.launcher.engines import Project, ranks_of
from tests.testbed import keeper
from training.distributed.group import environment

STEPS = 160
CACHES = ("torchinductor_",)  # if torch keeps them, an import suffices
ARGUMENTS = ("--max-steps", str(STEPS), "--save-every", "5", "--log-every", "1", "--log-with=")
TOKEN = "LAUNCH_CHAOS"  # in the environment of the processes of a subject, if the engine passes it on
PROFILE = """\
backend = "{engine}"
grace = 10
hang_after = 6
"""
SHAPE = {"local": ("--cpus", "2"), "slurm": ("--cpus", "2", "--nodes", "2"), "ray": ("--cpus", "2", "--nodes", "2")}


@dataclass(frozen=True)
class Mark:
    """Progress of a run: the newest step in its log, its attempt, and its time in seconds since 1970."""

    step: int = 0
    attempt: int = 0
    time: float = 0.0


class Subject:
    """A run of the reference job with two ranks, on two nodes if the engine has several."""

    def __init__(self, project: Project, name: str) -> None:
        self.project, self.name = project, name
        self.temporary = project.folder / f"tmp-{name}"

    # ---- life cycle

    def start(self, pace: float) -> None:
        """Submit the run; each step takes `pace` extra seconds."""
        profiles = self.project.folder / "cluster_configs"
        profiles.mkdir(exist_ok=True)
        (profiles / "chaos.toml").write_text(PROFILE.format(engine=self.project.engine))
        self.temporary.mkdir()
        self._call(
            *("--cluster", "chaos", *SHAPE[self.project.engine], "--max-restarts", "100", "--time", "60m"),
            *("--name", self.name, "--detach", "chaos_target:main", *ARGUMENTS),
        )
        self.set_pace(pace)

    def resume(self) -> str:
        """Resume the run; returns why this was refused, or an empty string."""
        done = self._call("resume", self.name, "--detach", status=None)
        return "" if done.returncode == 0 else done.stderr.strip()

    def kill(self) -> None:
        with suppress(BadRequest):
            self.run.kill()

    def _call(self, *argv: str, status: int | None = 0) -> Any:
        with environment({TOKEN: self.token, "TMPDIR": str(self.temporary)}):
            return self.project.call(*argv, status=status)

    # ---- progress

    @property
    def token(self) -> str:
        return str(self.path)

    @property
    def path(self) -> Path:
        return self.project.folder / "runs" / self.name

    @property
    def run(self) -> Run:
        return find(self.path, self.path.parent)

    def set_pace(self, seconds: float) -> None:
        (self.path / "pace").write_text(str(seconds))

    def mark(self) -> Mark:
        """The current progress."""
        records = [r for r in self.run.dir.metrics() if "loss" in r]
        return Mark(records[-1]["step"], records[-1]["attempt"], records[-1]["time"]) if records else Mark()

    def newest(self) -> int:
        """The newest step of all attempts."""
        return max((r["step"] for r in self.run.dir.metrics()), default=0)

    def first_of(self, attempt: int) -> Mark | None:
        """The first step of the first attempt after `attempt`."""
        later = (r for r in self.run.dir.metrics() if "loss" in r and r["attempt"] > attempt)
        return next((Mark(r["step"], r["attempt"], r["time"]) for r in later), None)

    def hosts(self) -> list[str]:
        """The nodes of the newest attempt."""
        started = [e for e in self.run.dir.events() if e["event"] == "started"]
        return list(started[-1]["hosts"]) if started else []

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return max((e["step"] for e in self.run.dir.events() if e["event"] == "saved"), default=0)

    def wait(self, condition: Callable[[], Any], seconds: float) -> bool:
        """Wait up to `seconds`, or until the run ends, for `condition`; returns whether it holds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.state().done:
                return bool(condition())
            time.sleep(0.05)
        return False

    def state(self) -> State:
        return self.run.state()

    def wait_for_end(self, seconds: float) -> State:
        self.wait(lambda: False, seconds)
        return self.state()

    def weights(self) -> str:
        """The hash of the final weights; empty if there are none."""
        file = self.path / "model" / "model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""

    # ---- processes

    def ranks(self) -> dict[int, int]:
        """Rank -> pid, in the newest attempt."""
        return ranks_of(self.run.dir.logs / str(self.run.dir.last_attempt()))

    def processes(self) -> dict[int, str]:
        """All processes of the run, found by their environment, command or output."""
        found = keeper.processes_with(f"{TOKEN}={self.token}\0")
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if self.token.encode() in words:  # processes that Ray starts have Ray's environment
                    found[pid] = b" ".join(words).decode(errors="replace").strip()
        return found | {pid: f"rank {rank}" for rank, pid in self.ranks().items()}

    def commands(self, *needles: str) -> list[int]:
        """Pids of the run's processes whose command line contains all `needles`."""
        return [pid for pid, command in self.processes().items() if all(needle in command for needle in needles)]

    # ---- remains

    def left_behind(self, patience: float = 20.0) -> list[str]:
        """Describe remaining processes (and kill them), ports and temporary files; an ended run leaves none."""
        deadline = time.monotonic() + patience
        while (processes := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [f"process {command[:60]}" for command in processes.values()]
        left += [f"port {port}" for pid in processes for port in listening(pid)]
        keeper.kill(set(processes))
        half = [*self.path.rglob(".*.tmp"), *self.path.rglob(".*.staging"), *self.temporary.iterdir()]
        return left + [f"file {file.name}" for file in half if not file.name.startswith(CACHES)]


def listening(pid: int) -> list[int]:
    """The TCP ports on which a process listens."""
    inodes = set()
    with suppress(OSError):
        for entry in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                inodes.add(os.readlink(f"/proc/{pid}/fd/{entry}"))
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.append(int(fields[1].rpartition(":")[2], 16))
    return found
