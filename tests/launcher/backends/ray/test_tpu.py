"""TPU slices on Ray: raylets with the resources of slice hosts, without chips; Ray places the ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.ray import capacity
from launcher.backends.ray.cluster import RayNode as Seen
from launcher.backends.ray.node_actor import NodeActors
from launcher.backends.ray.worker_group import Member, WorkerGroup
from launcher.client.plan import make_plan
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import RunSpec
from tests.launcher.engines import Project, make_project
from tests.testbed.ray import RayCluster, RayNode

slow = pytest.mark.slow
ray = pytest.mark.ray

SHOW = """
import json, os
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
shown = {k: v for k, v in os.environ.items() if k in names or k.startswith(("TPU_", "TORCH_TPU_", "MEGASCALE_"))}
print(json.dumps(shown), flush=True)
"""


def host(name: str, worker: int, topology: str, pod: str) -> RayNode:
    """Host number `worker` of the slice `name`, as the Ray of a TPU VM reports it; Ray reads TPU_NAME on a host."""
    resources = {"TPU": 4.0, name: 1.0, "accelerator_type:TPU-V4": 1.0}
    if worker == 0:
        resources[f"TPU-{pod}-head"] = 1.0
    labels = {"slice-name": name, "worker-id": str(worker), "topology": topology, "pod-type": pod}
    environment = {"TPU_NAME": name, "TPU_WORKER_ID": str(worker)}
    return RayNode(4, resources=resources, labels={f"ray.io/tpu-{k}": v for k, v in labels.items()}, env=environment)


@pytest.fixture(scope="module")
def slices() -> Iterator[RayCluster]:
    """A slice of two hosts, and two slices of one host."""
    hosts = [host("deep", 0, "2x2x2", "v4-16"), host("deep", 1, "2x2x2", "v4-16")]
    with RayCluster([*hosts, host("left", 0, "2x2x1", "v4-8"), host("right", 0, "2x2x1", "v4-8")]) as cluster:
        yield cluster


@pytest.fixture
def project(slices: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    for name, value in slices.environment().items():
        monkeypatch.setenv(name, value)
    project = make_project(tmp_path, "ray")
    (project.folder / "show.py").write_text(SHOW)
    return project


def shown(project: Project, run: str) -> list[dict[str, Any]]:
    """Rank -> its environment variables."""
    rows = [json.loads(line.split("] ", 1)[1]) for line in project.logs(run)]
    return sorted(rows, key=lambda row: int(row["RANK"]))


@slow
@ray
@pytest.mark.timeout(900)
def test_runs_land_on_whole_slices_with_a_rank_on_each_chip(project: Project) -> None:
    project.launch("--tpus", "8", "--accelerator", "v4", "--topology", "2x2x2", "--name", "one", "show.py")
    rows = shown(project, "one")
    assert [(row["TPU_WORKER_ID"], row["LOCAL_RANK"]) for row in rows] == [(h, c) for h in "01" for c in "0123"]
    assert [row["TPU_VISIBLE_CHIPS"] for row in rows] == [*"0123", *"0123"]
    hosts = {e["hosts"][0].split()[0] for e in project.events("one") if e["event"] == "started"}
    assert len(hosts) == 1, "one machine plays them all"
    for row in rows:
        assert row["TORCH_TPU_TOPOLOGY"] == "2,2,2"
        assert len(row["TORCH_TPU_SLICEBUILDER_ADDRESSES"].split(",")) == 8
        assert not [name for name in row if name.startswith("MEGASCALE")]

    project.launch("--tpus", "8", "--accelerator", "v4", "--topology", "2x2x1", "--name", "two", "show.py")
    rows = shown(project, "two")
    assert [row["MEGASCALE_SLICE_ID"] for row in rows] == [*"0000", *"1111"]
    assert {row["MEGASCALE_NUM_SLICES"] for row in rows} == {"2"}
    assert len({row["MEGASCALE_COORDINATOR_ADDRESS"] for row in rows}) == 1
    assert [row["TPU_VISIBLE_CHIPS"] for row in rows] == [*"0123", *"0123"]

    done = project.launch(
        "--tpus", "16", "--accelerator", "v4", "--topology", "2x2x4", "--name", "no", "show.py", status=2
    )
    assert "need 1 whole TPU slice of 2x2x4, but this Ray cluster has 0" in done.stderr
    assert "2x2x2 with 8 chips up" in done.stderr


def test_a_slice_that_nobody_makes_is_refused_at_once(tmp_path: Path) -> None:
    project = make_project(tmp_path, "ray")
    done = project.launch("--tpus", "27", "--accelerator", "v4", "--topology", "3x3x3", "steps:main", status=2)
    assert "v4 has no slices of that shape; it has 2x2x1" in done.stderr


@pytest.mark.parametrize("marked", [True, False])
def test_hosts_that_do_not_say_what_kind_of_slice_they_are(
    marked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some clusters mark the hosts of multi-host slices only; there, Ray's default placement has to suffice."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    spec = RunSpec("launcher:launch", (), backend="ray", tpus=8, accelerator="v4", topology="2x2x1", name="m")
    plan = make_plan(spec, tmp_path)
    run_dir = RunDir(plan.run_dir)
    run_dir.create()
    resources = {"CPU": 8.0, "TPU": 4.0} | ({"TPU-v4-8-head": 1.0} if marked else {})
    hosts = [Seen(name, resources=resources, labels={"ray.io/tpu-topology": "2x2x1"}) for name in ("left", "right")]
    monkeypatch.setattr(capacity, "look", lambda: hosts)
    room = capacity.ClusterCapacity(run_dir, plan, NodeActors(run_dir, lambda node, message: None))
    each = room.request(1, 8)["scaling_config"]["resources_per_worker"]
    assert each == {"CPU": 1, "TPU": 1} | ({"TPU-v4-8-head": 0.25} if marked else {})
    assert room.ranks_for(room.nodes()) == 8


class _Plan:
    """The fields of a plan that a worker group needs for its environment."""

    name = "t"

    class placement:
        device, topology, threads, on_tpu = "tpu", "2x2x2", 0, True


def test_two_slices_of_two_hosts() -> None:
    """Ranks are ordered by slice, host and chip, in any order of Ray's workers."""
    worker_group = WorkerGroup(_Plan, 1, 16)  # type: ignore[arg-type]
    members = [
        Member(
            worker,
            Seen(f"{name}{number}", f"10.0.{'ab'.index(name)}.{number}", labels=_labels(name, number)),
            {"TPU_VISIBLE_CHIPS": str(chip)},
        )
        for worker, (chip, number, name) in enumerate((c, h, s) for c in range(4) for h in (1, 0) for s in "ba")
    ]
    for member in members:
        worker_group.register(member)
    assert [(m.node.id, m.environment["TPU_VISIBLE_CHIPS"]) for m in worker_group.members] == [
        (host, chip) for host in ("a0", "a1", "b0", "b1") for chip in "0123"
    ]
    assert not worker_group.misplaced()
    worlds = worker_group.worlds(attempt=1, port=1)
    assert [(w.node_rank, w.local_rank) for w in worlds] == [(n, c) for n in range(4) for c in range(4)]
    variables = worker_group.environment(13)
    assert variables["MEGASCALE_SLICE_ID"] == "1"
    assert variables["MEGASCALE_COORDINATOR_ADDRESS"] == "10.0.0.0:8081"
    assert variables["MEGASCALE_PORT"] == "8082"
    assert variables["TPU_WORKER_ID"] == "1"
    assert variables["TPU_WORKER_HOSTNAMES"] == "10.0.1.0,10.0.1.1"
    assert variables["TORCH_TPU_SLICEBUILDER_ADDRESSES"].split(",")[4] == "10.0.1.1:8070"


def test_chips_of_other_slices_are_not_taken_for_those_asked_for() -> None:
    worker_group = WorkerGroup(_Plan, 1, 8)  # type: ignore[arg-type]
    for worker in range(8):
        labels = _labels("deep", worker // 4) | {"ray.io/tpu-topology": "2x2x4"}
        worker_group.register(Member(worker, Seen(f"deep{worker // 4}", "10.0.0.1", labels=labels), {}))
    assert worker_group.misplaced()
    assert str(worker_group.cause) == "Ray gave 8 chips of slice deep, which is a 2x2x4, for a 2x2x2"


def _labels(name: str, number: int) -> dict[str, str]:
    return {"ray.io/tpu-slice-name": name, "ray.io/tpu-worker-id": str(number)}
