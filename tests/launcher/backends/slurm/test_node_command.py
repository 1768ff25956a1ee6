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
from launcher.backends.slurm.batch.requeue import JobStart
from launcher.backends.slurm.job import unfit_nodes
from launcher.config.cluster import Cluster, Container, Ray, Slurm
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir
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


def test_srun_is_given_the_cores_of_a_node() -> None:
    wanted = plan("cpu")
    wanted = replace(wanted, placement=replace(wanted.placement, cpus_per_rank=6))
    assert node_command.srun_args(wanted) == ["--cpus-per-task=12", *ALONE]


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


def in_run(folder: Path, nodes: int = 1, **slurm: Any) -> Plan:
    """A plan whose run directory is there."""
    (folder / "it's a run/submitit").mkdir(parents=True)
    wanted = plan(**slurm)
    return replace(wanted, run_dir=folder / "it's a run", placement=replace(wanted.placement, nodes=nodes))


@pytest.mark.parametrize(("node_setup", "python", "text"), [
    (("test -d /no/such/disk",), None, "test -d /no/such/disk failed with status 1"),
    (("true", "(exit 7)", "true"), None, "(exit 7) failed with status 7"),
    (("nosuch-command 'a b'",), None, "nosuch-command 'a b' failed with status 127"),
    ((), "/no/such/python", "starting /no/such/python failed with status 127"),
    (("true",), "nosuch-python", "starting nosuch-python failed with status 127"),
])  # fmt: skip
def test_what_fails_before_the_ranks_is_left_for_the_other_nodes(
    node_setup: tuple[str, ...], python: str | None, text: str, tmp_path: Path
) -> None:
    wanted = in_run(tmp_path, nodes=2, python=python, node_setup=node_setup)
    with run(wanted, "-c", "print('not reached')", SLURM_RESTART_COUNT="2") as process:
        assert process.communicate()[0] == ""
    assert process.returncode == 1
    found = unfit_nodes(RunDir(wanted.run_dir), JobStart("7", 2))
    assert found == {"n1": f"before the ranks: {text}"}
    assert unfit_nodes(RunDir(wanted.run_dir), JobStart("7", 1)) == {}
    (file,) = (wanted.run_dir / "submitit").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def scratched(folder: Path, scratch: str, program: str = "pass", **environment: str) -> tuple[int, str]:
    """Run `program` with a scratch folder; returns the exit status and what was said."""
    with run(in_run(folder, scratch=scratch), "-c", program, **environment) as process:
        said = "".join(process.communicate())
    return process.returncode, said


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a file in it that no job may remove."""
    (tmp_path / "home/x").mkdir(parents=True)
    (tmp_path / "home/x/thesis").touch()
    return tmp_path / "home"


@pytest.mark.parametrize("sub", ["../../home/x", "../../home", "..", "a/../../home/x"])
def test_a_variable_of_the_node_leads_no_scratch_out_of_the_jobs_folder(sub: str, tmp_path: Path, home: Path) -> None:
    for scratch in (f"{tmp_path}/$SLURM_JOB_ID/$SUB", f"{tmp_path}/$SLURM_JOB_ID$SEPARATOR$SUB"):
        status, said = scratched(tmp_path / str(len(scratch)), scratch, SUB=sub, SEPARATOR="/")
        assert (status, "a path without .. failed" in said) == (1, True), said
        assert (home / "x/thesis").exists()


@pytest.mark.parametrize("below", ["", "/x", "/x/new"])
def test_a_link_leads_no_scratch_out_of_the_jobs_folder(below: str, tmp_path: Path, home: Path) -> None:
    (tmp_path / "7").symlink_to(home)
    status, said = scratched(tmp_path, f"{tmp_path}/$SLURM_JOB_ID{below}")
    assert (status, "which is not a folder of yours named after job 7" in said) == (1, True), said
    assert (home / "x/thesis").exists()


def test_a_rank_that_puts_a_link_in_its_place_removes_nothing_else(tmp_path: Path, home: Path) -> None:
    program = f"import os; os.rmdir('{tmp_path}/7/x'); os.rmdir('{tmp_path}/7'); os.symlink('{home}', '{tmp_path}/7')"
    status, said = scratched(tmp_path, f"{tmp_path}/$SLURM_JOB_ID/x", program)
    assert (status, "scratch is not removed" in said) == (0, True), said
    assert (home / "x/thesis").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make a folder of a second user")
def test_a_folder_of_another_user_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    os.chown(tmp_path / "7", 54321, -1)
    assert scratched(tmp_path, f"{tmp_path}/$SLURM_JOB_ID")[0] == 1
    assert (tmp_path / "7").exists()


def test_a_scratch_folder_below_a_link_or_made_by_the_site(tmp_path: Path) -> None:
    (tmp_path / "disk/7/tmp").mkdir(parents=True)
    (tmp_path / "disk/7/tmp/old").touch()
    (tmp_path / "local").symlink_to("disk")
    scratch = f"{tmp_path}/local/$SLURM_JOB_ID//tmp/./"
    said = scratched(
        tmp_path, scratch, "import os; print(os.environ['TMPDIR']); open(os.environ['TMPDIR'] + '/f', 'w')"
    )
    assert said == (0, f"{tmp_path}/local/7//tmp/./\n")
    assert (tmp_path / "disk/7").exists()
    assert not (tmp_path / "disk/7/tmp").exists()
