"""A rank that the kernel kills for memory: what is counted, and a real kill in a control group with a limit."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.agent.health.memory_kills import count
from tests.launcher.engines import COMMAND, Project, ranks_of, until

EVENTS = "low 0\nhigh 0\nmax 31\noom 2\noom_kill 2\noom_group_kill 1\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"


@pytest.mark.parametrize(("groups", "file", "text", "kills"), [
    ("0::/system.slice/slurmstepd.scope/job_7/step_0\n", "system.slice/slurmstepd.scope/job_7/step_0/memory.events", EVENTS, 2),
    ("0::/\n", "memory.events", EVENTS, 2),
    ("0::/../../host/path\n", "memory.events", EVENTS, 2),
    ("0::/a\n", "unified/a/memory.events", EVENTS, 2),
    ("9:name=systemd:/\n4:memory:/slurm/uid_0/job_7\n0::/\n", "memory/slurm/uid_0/job_7/memory.oom_control", CONTROL, 3),
    ("4:cpu,memory:/host/path\n", "memory/memory.oom_control", CONTROL, 3),
    ("4:memory:/a:b\n", "memory/a:b/memory.oom_control", CONTROL, 3),
    ("0::/a\n", "a/memory.events", "low 0\n", 0),
    ("0::/a\n", "a/memory.events", "oom_kill many\n", 0),
    ("0::/a\n", "b/memory.events", EVENTS, 0),
    ("", "memory.events", EVENTS, 0),
    ("nonsense\n:::\n\xff", "memory.events", "", 0),
])  # fmt: skip
def test_the_kernels_count(groups: str, file: str, text: str, kills: int, tmp_path: Path) -> None:
    for path, content in {f"sys/fs/cgroup/{file}": text, "proc/self/cgroup": groups}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content, encoding="latin-1")
    assert count(tmp_path) == kills


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 600 MB."""
    v1 = Path("/sys/fs/cgroup/memory")
    folder = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"launch-test-{os.getpid()}"
    try:
        folder.mkdir()
        limit = folder / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")
        limit.write_text(str(600 * 2**20))
    except OSError as error:
        pytest.skip(f"no control group with a limit can be made here ({error}); root can")
    yield folder
    until(lambda: not (folder / "cgroup.procs").read_text(), "the end of the group's processes", 20)
    folder.rmdir()


HUNGRY = """
import os, time
rank = int(os.environ["RANK"])
print("up", flush=True)
if rank == 1:
    taken = bytearray(1 << 30)
    for place in range(0, len(taken), 4096):
        taken[place] = 1
time.sleep(600)
"""


@pytest.mark.slow
def test_a_rank_that_exceeds_the_memory_is_out_of_memory(local_project: Project, small_group: Path) -> None:
    """Another attempt would need as much, so there is none."""
    (local_project.folder / "hungry.py").write_text(HUNGRY)

    def enter() -> None:
        (small_group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        [*COMMAND, "--cpus", "2", "--name", "h", "hungry.py"],
        cwd=local_project.folder, preexec_fn=enter, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    failure = local_project.status("h")["failure"]
    assert (failure["kind"], failure["rank"]) == ("out of memory", 1)
    assert "the kernel killed the process for memory" in failure["message"]
    assert "ask for more of it" in failure["advice"]
    assert done.returncode == 1
    assert [e["event"] for e in local_project.events("h")].count("started") == 1


@pytest.mark.slow
def test_a_rank_that_somebody_kills_is_killed(local_project: Project) -> None:
    (local_project.folder / "waits.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    local_project.launch("--cpus", "2", "--max-restarts", "0", "--name", "k", "--detach", "waits.py")
    until(lambda: len(local_project.logs("k")) == 2, "the ranks to run")
    os.kill(ranks_of(local_project.folder / "runs/k/logs/1")[1], signal.SIGKILL)
    until(lambda: local_project.status("k")["state"] == "failed", "the end")
    assert local_project.status("k")["failure"]["kind"] == "killed"
