"""The command of srun on a node: setup, scratch, containers. A real shell runs the lines."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.slurm import node_command
from launcher.config.cluster import Cluster, Container, Ray, Slurm
from launcher.errors import BadRequest
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, Target

IMAGE = Container("/images/a b.sif", "apptainer", ("/data", "/nodes/disk:/scratch"), ("--fakeroot",))

BINDS = "apptainer exec --nv --bind /data --bind /nodes/disk:/scratch --bind /runs"


def plan(device: Any = "cuda", python: str | None = None, **slurm: Any) -> Plan:
    site = Cluster("site", "slurm", python=python, slurm=Slurm(**slurm))
    folder, target = Path("/runs/it's"), Target("script", "x.py")
    return Plan("x", folder, RunSpec("x.py"), "slurm", site, Placement(1, 2, device), target, folder, 60)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (plan(), [sys.executable]),
        (plan(python="conda run -n 'my env' python"), ["conda", "run", "-n", "my env", "python"]),
        (
            plan(container=IMAGE),
            [*BINDS.split(), "--fakeroot", "/images/a b.sif", "python3"],
        ),
        (
            plan("cpu", container=replace(IMAGE, runtime="singularity", mounts=("/runs",), options=())),
            ["singularity", "exec", "--bind", "/runs", "/images/a b.sif", "python3"],
        ),
        (plan(container=Container("x.sqsh"), python="/opt/venv/bin/python"), ["/opt/venv/bin/python"]),
    ],
)  # fmt: skip
def test_the_python_of_a_node(wanted: Plan, words: list[str]) -> None:
    assert node_command.python(wanted) == words
    assert shlex.split(node_command.command(wanted)) == [*words, "-P"]


ALONE = ["--kill-on-bad-exit=0", "--wait=120"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (plan(), ["--gpu-bind=none", *ALONE]),
        (plan("cpu", srun_args=("--mpi=none",)), [*ALONE, "--mpi=none"]),
        (
            plan(container=Container("x.sqsh", mounts=("/", "/a:/b:ro"), options=("--container-writable",))),
            [
                *("--gpu-bind=none", *ALONE, "--container-image=x.sqsh", "--container-mounts=/:/,/a:/b:ro"),
                "--container-writable",
            ],
        ),
        (
            plan("cpu", container=Container("x.sqsh")),
            [*ALONE, "--container-image=x.sqsh", "--container-mounts=/runs:/runs"],
        ),
        (plan("cpu", container=IMAGE), ALONE),
    ],
)
def test_the_arguments_of_srun(wanted: Plan, words: list[str]) -> None:
    assert node_command.srun_args(wanted) == words


def test_where_others_may_go_on_without_a_node_srun_waits_for_them_for_ever() -> None:
    spare = plan()
    spare = replace(spare, spec=replace(spare.spec, spare_nodes=1))
    assert node_command.srun_args(spare) == ["--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=0", "--no-kill"]
    ray = plan("cpu")
    ray = replace(ray, cluster=replace(ray.cluster, ray=Ray(inside="slurm")))
    assert node_command.srun_args(ray) == ["--kill-on-bad-exit=0", "--wait=0"]


def test_a_python_that_is_no_command() -> None:
    with pytest.raises(BadRequest, match="python = \"'x\" in the cluster's profile: No closing quotation"):
        node_command.command(plan(python="'x"))


def run(wanted: Plan, *words: str, **environment: str) -> subprocess.Popen[str]:
    line = f"exec {node_command.command(wanted)} {shlex.join(words)}"
    variables = os.environ | {"SLURMD_NODENAME": "n1", "SLURM_JOB_ID": "7", **environment}
    return subprocess.Popen(
        ["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
    )


def test_lines_run_on_the_node_before_its_ranks(tmp_path: Path) -> None:
    lines = ('export A="it\'s $SLURM_JOB_ID"  # first', "B=2; export B", "cd " + shlex.quote(str(tmp_path)))
    with run(
        plan(node_setup=lines), "-c", "import os; print(os.environ['A'], os.environ['B'], os.getcwd())"
    ) as process:
        assert process.communicate() == (f"it's 7 2 {tmp_path}\n", "")
    assert process.returncode == 0


def test_a_line_that_fails_keeps_the_node_from_starting() -> None:
    with run(
        plan(node_setup=("true", "test -d /no/such/disk", "echo not reached")), "-c", "print('nor this')"
    ) as process:
        said, complaint = process.communicate()
    assert (said, complaint) == ("", "launch: on n1, before the ranks: test -d /no/such/disk failed\n")
    assert process.returncode == 1


def test_a_scratch_folder_lives_as_long_as_the_ranks(tmp_path: Path) -> None:
    """Also if the agent is stopped: the shell waits for it and returns its exit status."""
    program = (
        "import os, signal, sys, tempfile, time\n"
        "def told(number, _): open(sys.argv[1], 'w').write(tempfile.gettempdir()); sys.exit(3)\n"
        "signal.signal(signal.SIGTERM, told)\n"
        "open(os.path.join(tempfile.gettempdir(), 'file'), 'w')\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "program.py").write_text(program)
    scratch = tmp_path / "local-7"
    wanted = plan(scratch=f"{tmp_path}/local-${{SLURM_JOB_ID}}")
    with run(wanted, str(tmp_path / "program.py"), str(tmp_path / "told")) as process:
        while not (scratch / "file").exists():
            assert process.poll() is None
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, children)):  # as SLURM does
            os.kill(pid, signal.SIGTERM)
        assert process.wait() == 3
    assert (tmp_path / "told").read_text() == str(scratch)
    assert not scratch.exists()
