"""Placement on a real SLURM cluster of mixed nodes: two with 8 GPUs, two with 4 of another type, one with none."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.client.plan import make_plan
from launcher.errors import BadRequest
from launcher.request.spec import Plan, RunSpec
from tests.conftest import require
from tests.launcher.engines import COMMAND, Project, make_project, until
from tests.testbed import slurm
from tests.testbed.slurm import SlurmCluster
from tests.testbed.slurm_conf import Node

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

NODES = (
    *(Node(f"big{n}", 8, "nvidia_h100", 32, 64000) for n in (1, 2)),
    *(Node(f"small{n}", 4, "a100", 16, 32000) for n in (1, 2)),
    Node("plain1", 0, "", 16, 20000),
)
PARTITIONS = """
PartitionName=short Nodes=big[1-2] MaxTime=00:30:00 MaxNodes=1 State=UP AllowAccounts=ml
PartitionName=closed Nodes=big[1-2] State=DOWN
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    require("SLURM", slurm.missing())
    with SlurmCluster(NODES, accounting=False, extra=PARTITIONS) as cluster:
        yield cluster


@pytest.fixture
def mixed(cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield make_project(tmp_path, "slurm")
    cluster.reset()


def profile(name: str, text: str) -> str:
    Path("cluster_configs").mkdir(exist_ok=True)
    Path(f"cluster_configs/{name}.toml").write_text(f'backend = "slurm"\n{text}')
    return name


def plan(cluster: str | None = None, **options: object) -> Plan:
    return make_plan(RunSpec("steps:main", backend="slurm", cluster=cluster, **options), Path.cwd())  # type: ignore[arg-type]


@pytest.mark.usefixtures("mixed")
def test_a_plan_says_which_nodes_and_when() -> None:
    found = plan(gpus=8)
    assert found.placement.why == (
        "8 GPUs = 1 node x 8 ranks (whole nodes; on nvidia_h100: the fewest nodes; --accelerator a100 chooses the others)"
    )
    assert (found.placement.cpus_per_rank, found.placement.memory_gb) == (4, 62.5)
    assert found.start.startswith(time.strftime("%Y-"))
    assert " on big" in found.start
    assert " on small[1-2]" in plan(gpus=8, accelerator="a100").start
    assert plan(gpus=4, accelerator="H100").placement.gpu_type == "nvidia_h100"
    assert " on big[1-2],small[1-2]" in plan(gpus=16, nodes=4).start


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {"gpus": 12}, "Try --gpus 8 or --gpus 16 or --gpus 12 --nodes 2 (6 on each)."),
        ("", {"gpus": 8, "accelerator": "v100"}, "the nodes of cluster 'site' have a100 and nvidia_h100."),
        ("[slurm]\npartition = 'short'", {"gpus": 8}, "--time 60m: partition 'short' ends jobs after 30 min. Try --time 30m"),
        ("[slurm]\npartition = 'short'", {"gpus": 16, "time": "9m"}, "allows a job 1 node. Try --gpus 8 --nodes 1 (8 on each)"),
        ("[slurm]\npartition = 'short'\naccount = 'bio'", {"gpus": 8, "time": "9m"}, "not take jobs of that account. Use one of ml."),
        ("[slurm]\npartition = 'closed'", {"gpus": 8}, "partition 'closed' is DOWN: nothing starts there."),
        ("[slurm]\npartition = 'shrot'", {"gpus": 8}, "no such partition (did you mean 'short'?). It has debug,"),
        ("[slurm]\nconstraint = 'infiniband'", {"cpus": 1}, "sbatch refused the job: Invalid feature specification."),
        ("[slurm]\nnodelist = 'nosuch1'", {"cpus": 2}, "sbatch refused the job: "),
        ("[slurm]\nreservation = 'course'", {"cpus": 1}, "sbatch refused the job: Requested reservation is invalid."),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_said_at_once(text: str, options: dict[str, object], words: str) -> None:
    site = profile("site", text)
    with pytest.raises(BadRequest) as refused:
        plan(site, **options)
    assert words in str(refused.value)


def test_nodes_that_are_down_are_not_counted(mixed: Project, cluster: SlurmCluster) -> None:
    cluster.set_node("big1", "down")
    done = mixed.launch("--dry-run", "--gpus", "16", "--accelerator", "h100", "steps:main", status=2)
    assert "16 GPUs on 2 nodes: cluster 'slurm' has 1 node and 8 GPUs (1 more is down or drained)." in done.stderr
    assert "Try --gpus 8." in done.stderr


def test_a_controller_that_does_not_answer(mixed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/dev/null")
    done = mixed.launch("--dry-run", "--gpus", "8", "steps:main", status=2)
    assert "SLURM cannot be reached from here" in done.stderr
    assert "describe the nodes in a profile" in done.stderr
    assert "no GPUs" not in done.stderr
    said = profile("said", "nodes = 2\nnode = {gpus = 8, cpus = 32}")
    assert "--gpus-per-node=8" in mixed.call("--cluster", said, "--dry-run", "--gpus", "8", "steps:main").stdout


def test_a_first_profile_and_a_run_from_within_a_job(mixed: Project) -> None:
    """Submitted from an interactive job with another memory option; the new job inherits nothing from it."""
    written = mixed.call("clusters", "new", "first").stdout
    assert written.endswith("cluster_configs/first.toml: look at it, then use it with --cluster first\n")
    (mixed.folder / "tiny.py").write_text("import os\nprint('ran as', os.environ['SLURM_JOB_NAME'])\n")
    outer = ["salloc", "--quiet", "--nodelist=plain1", "--mem-per-cpu=100", "--cpus-per-task=2", "--ntasks=1"]
    command = [*COMMAND, "--cluster", "first", "--gpus", "2", "--name", "inner", "tiny.py"]
    done = subprocess.run([*outer, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(mixed.logs("inner")) == ["[0] ran as inner", "[1] ran as inner"]


SHOW = """
import os, time
names = ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "MASTER_PORT", "SLURMD_NODENAME", "SLURM_JOB_ID")
print(*(os.environ[name] for name in names), os.environ.get("PREPARED"), os.environ.get("TMPDIR"), flush=True)
while not os.path.exists("go"):
    time.sleep(0.1)
"""


def test_every_rank_has_a_device_of_its_own(mixed: Project) -> None:
    """Three jobs at once, two of them on one node, one with GPUs bound to tasks by default."""
    (mixed.folder / "show.py").write_text(SHOW)
    scratch = f"{mixed.folder}/local-$SLURM_JOB_ID"
    profile(
        "bound",
        f"""[slurm]
            nodelist = 'big1'
            node_setup = ['export PREPARED=$SLURM_NODEID  # a "comment"']
            scratch = '{scratch}'
            sbatch = {{gpu-bind = 'single:1'}}""",
    )
    profile("plain", "[slurm]\nnodelist = 'big1'")
    mixed.call("--detach", "--cluster", "bound", "--gpus", "4", "--accelerator", "h100", "--name", "a", "show.py")
    mixed.call("--detach", "--cluster", "plain", "--gpus", "4", "--accelerator", "h100", "--name", "b", "show.py")
    mixed.launch("--detach", "--gpus", "8", "--accelerator", "a100", "--name", "c", "show.py")

    def rows(run: str) -> list[list[str]]:
        return [line.split("] ")[1].split() for line in mixed.logs(run)]

    until(lambda: [len(rows(run)) for run in "abc"] == [4, 4, 8], "all ranks to have said what they see")
    found = {run: rows(run) for run in "abc"}
    owned = [(node, devices.split(",")[int(local)]) for run in "abc" for local, devices, _, node, *_ in found[run]]
    assert sorted(owned) == sorted(
        [("big1", str(n)) for n in range(8)] + [(node, str(n)) for node in ("small1", "small2") for n in range(4)]
    )
    assert len({port for run in "ab" for _, _, port, *_ in found[run]}) == 2, "each job has a port of its own"
    job = found["a"][0][4]
    assert {(row[5], row[6]) for row in found["a"]} == {("0", f"{mixed.folder}/local-{job}")}
    assert (mixed.folder / f"local-{job}").is_dir()
    cores = [allocated(found[run][0][4]) for run in "ab"]
    assert [len(each) for each in cores] == [16, 16], "half of the node's 32 cores each"
    assert cores[0].isdisjoint(cores[1])
    (mixed.folder / "go").touch()
    until(lambda: all(mixed.status(run)["state"] == "succeeded" for run in "abc"), "all three to end")
    until(lambda: not (mixed.folder / f"local-{job}").exists(), "the scratch folder to be removed")


def allocated(job: str) -> set[int]:
    """The cores of a running job on its first node."""
    from launcher.rank.affinity import cpus_in

    shown = subprocess.run(["scontrol", "show", "job", "-d", job], capture_output=True, text=True, check=True).stdout
    return set(cpus_in(shown.split("CPU_IDs=")[1].split()[0]))
