"""Nodes and partitions as parsed from SLURM's output, and requests that they cannot meet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends.slurm import query
from launcher.backends.slurm.backend import SlurmBackend
from launcher.backends.slurm.limits import check_limits
from launcher.backends.slurm.query import (
    Partition,
    gpus_of,
    minutes,
    node_kinds,
    parse_partition,
    refusal_text,
)
from launcher.client.run import Run
from launcher.config.cluster import Cluster, Node, NodeKind, Slurm
from launcher.errors import BadRequest
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, Target
from tests.launcher.plans import planned_run


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:8", {None: 8}),
        ("gpu:h100:8", {"h100": 8}),
        ("gpu:a100:8(S:0-1)", {"a100": 8}),
        ("gpu:nvidia_h100_80gb_hbm3:4(S:0),shard:16", {"nvidia_h100_80gb_hbm3": 4}),
        ("gpu:a100:2,gpu:1g.5gb:14", {"a100": 2, "1g.5gb": 14}),
        ("gpu:a100:4(S:0),gpu:a100:4(S:1)", {"a100": 8}),
        ("gpu:tesla:no_consume:2", {"tesla": 2}),
        ("lustre:1,craynetwork:4", {}),
        ("(null)", {}),
        ("", {}),
    ],
)
def test_gpus_in_generic_resources(gres: str, gpus: dict[str | None, int]) -> None:
    assert gpus_of(gres) == gpus


def node(name: str, state: str = "IDLE", gres: str = "gpu:h100:8", cpus: int = 96, **more: str) -> str:
    fields = {"ActiveFeatures": "ib,new", "RealMemory": "1024000", "Partitions": "gpu,all"} | more
    rest = " ".join(f"{key}={value}" for key, value in fields.items())
    return (
        f"NodeName={name} Arch=x86_64 CoresPerSocket=48  CPUAlloc=0 CPUTot={cpus} CPULoad=0.1 Gres={gres}"
        f" OS=Linux 6.1 #1 SMP State={state} {rest} Reason=says Gres=gpu:1 [root@2026-11-22T10:00:00]\n"
    )


def kind(count: int, down: int = 0, **more: object) -> NodeKind:
    base = NodeKind(count, 8, 96, 1000.0, "h100", ("ib", "new"), down=down)
    return replace(base, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "state", ["IDLE", "MIXED", "ALLOCATED", "COMPLETING", "IDLE+CLOUD+POWERED_DOWN", "IDLE+PLANNED"]
)
def test_a_node_that_takes_jobs_sooner_or_later(state: str) -> None:
    (found,) = node_kinds(node("n1", state), "gpu")
    assert (found.count, found.down, found.names) == (1, 0, "n1")


@pytest.mark.parametrize(
    "state", ["DOWN", "DOWN*", "IDLE+DRAIN", "MIXED+DRAIN", "DOWN*+DRAIN", "FUTURE", "FAIL", "UNKNOWN"]
)
def test_a_node_that_takes_none(state: str) -> None:
    (found,) = node_kinds(node("n1", state), "gpu")
    assert (found.count, found.down, found.names) == (0, 1, "")


def test_nodes_that_are_alike_are_one_kind() -> None:
    listed = (
        node("a1")
        + node("a2", "MIXED")
        + node("a3", "DOWN")
        + node("b1", gres="gpu:a100:4", cpus=64)
        + node("c1", gres="(null)", Partitions="all")
        + node("d1", ActiveFeatures="(null)", Partitions="other")
        + node("e1", gres="gpu:a100:1,gpu:1g.5gb:3", CPUEfctv="92", MemSpecLimit="24000")
    )
    assert node_kinds(listed, "gpu") == (
        kind(2, 1, names="a1,a2"),
        kind(1, gpus=4, cpus=64, accelerator="a100", names="b1"),
        kind(1, gpus=3, cpus=69, memory_gb=1_000_000 / 1024 * 0.75, accelerator="1g.5gb", names="e1"),
        kind(1, gpus=1, cpus=23, memory_gb=1_000_000 / 1024 * 0.25, accelerator="a100", names="e1"),
    )
    assert [k.names for k in node_kinds(listed, "all")] == ["a1,a2", "b1", "e1", "e1", "c1"]
    assert [k.names for k in node_kinds(listed, "other,gpu")] == ["a1,a2,d1", "b1", "e1", "e1"]
    assert [k.names for k in node_kinds(listed, "gpu", "ib")] == ["a1,a2", "b1", "e1", "e1"]
    assert node_kinds(listed, "gpu", "old") == ()
    assert len(node_kinds(listed, "gpu", "ib&old")) == 4, "SLURM's own language is left to SLURM"
    assert len(node_kinds(listed, None)) == 5


def test_small_differences_do_not_make_kinds() -> None:
    """Small differences (racks, memory, reserved cores) do not split a kind of nodes."""
    listed = (
        node("a1", ActiveFeatures="ib,rack1")
        + node("a2", ActiveFeatures="ib,rack2", RealMemory="512000")
        + node("a3", cpus=92, ActiveFeatures="ib,rack2")
        + node("c1", gres="(null)", cpus=64)
        + node("c2", gres="(null)", cpus=64, RealMemory="256000")
        + node("c3", gres="(null)", cpus=32)
    )
    assert node_kinds(listed, "gpu") == (
        kind(3, cpus=92, memory_gb=500.0, features=("ib",), names="a1,a2,a3"),
        kind(2, gpus=0, cpus=64, memory_gb=250.0, accelerator=None, names="c1,c2"),
        kind(1, gpus=0, cpus=32, accelerator=None, names="c3"),
    )


@pytest.mark.parametrize("feature", ["a100", "H100", "l40s", "rtx6000", "mi250x", "tesla_v100", "gpu-gh200"])
def test_features_that_name_a_type_do_where_the_gpus_do_not(feature: str) -> None:
    listed = node("a1", gres="gpu:8", ActiveFeatures=f"ib,{feature}") + node("b1", gres="gpu:8", ActiveFeatures="ib,t4")
    assert [k.features for k in node_kinds(listed, "gpu")] == [("ib", feature), ("ib", "t4")]
    typed = node("a1", ActiveFeatures=f"ib,{feature}") + node("b1", ActiveFeatures="ib,t4")
    assert [k.features for k in node_kinds(typed, "gpu")] == [("ib",)]


@pytest.mark.parametrize("feature", ["rack12", "cpu_gen10", "row-3", "avx512"])
def test_features_that_name_no_type(feature: str) -> None:
    listed = node("a1", gres="gpu:8", ActiveFeatures=f"ib,{feature}") + node("b1", gres="gpu:8", ActiveFeatures="ib")
    assert [k.features for k in node_kinds(listed, "gpu")] == [("ib",)]


def test_a_reason_that_talks_of_other_things_is_not_read() -> None:
    (found,) = node_kinds(node("n1", "IDLE"), "gpu")
    assert (found.gpus, found.accelerator) == (8, "h100")


LINE = (
    "PartitionName=short AllowGroups=ALL AllowAccounts=ml,nlp DenyQos=low AllowNodes=ALL Default=YES MaxNodes=2 MaxTime=1-12:30:00"
    " MinNodes=0 Nodes=big[1-2] State=UP TRES=cpu=64,mem=125G"
)


def test_a_partition_is_read() -> None:
    assert parse_partition(LINE) == Partition(
        "short", True, "UP", 36 * 60 + 30, 2, accounts=("ml", "nlp"), denied_qos=("low",)
    )
    free = parse_partition(
        "PartitionName=x AllowAccounts=ALL AllowQos=ALL MaxTime=UNLIMITED MaxNodes=UNLIMITED State=DOWN"
    )
    assert free == Partition("x", state="DOWN")


@pytest.mark.parametrize(
    ("text", "expected"), [("00:30:00", 30), ("2-00:00:00", 2880), ("UNLIMITED", None), ("", None)]
)
def test_limits_in_minutes(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


LONG = Partition("long", max_minutes=2880)
SHORT = Partition("short", True, max_minutes=30, max_nodes=1)
CLUBS = Partition("club", accounts=("ml",), denied_qos=("low",), min_nodes=2)
CLOSED = Partition("closed", state="DOWN")
ALL = [LONG, SHORT, CLUBS, CLOSED]


def plan(minutes: int = 60, nodes: int = 1, ranks: int = 8, spare: int = 0, **slurm: str) -> Plan:
    site = Cluster("site", "slurm", slurm=Slurm(**slurm))  # type: ignore[arg-type]
    folder, target = Path("/runs/x"), Target("script", "x.py")
    spec = RunSpec("x.py", spare_nodes=spare)
    return Plan("x", folder, spec, "slurm", site, Placement(nodes, ranks, "cuda"), target, folder, minutes)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (plan(), "--time 60m: partition 'short' ends jobs after 30 min. Try --time 30m, or set slurm.partition to long or club"),
        (plan(30, nodes=2), "2 nodes: partition 'short' allows a job 1 node. Try --gpus 8 --nodes 1 (8 on each)."),
        (plan(30, nodes=1, spare=1), "1 node and the spare ones: partition 'short' allows a job 1 node. Leave out --spare-nodes."),
        (plan(3000, partition="long"), "ends jobs after 2880 min. Try --time 2880m, or set slurm.partition to club."),
        (plan(partition="closed"), "partition 'closed' is DOWN: nothing starts there. Set slurm.partition to one of lo"),
        (plan(partition="shrot"), "slurm.partition = 'shrot' in profile 'site': this cluster has no such partition (did you"),
        (plan(partition="x"), "no such partition. It has long, short, club, closed."),
        (plan(partition="club"), "1 node: partition 'club' is for jobs of at least 2."),
        (plan(nodes=2, partition="club", account="bio"), "slurm.account = 'bio': partition 'club' does not take jobs of that a"),
        (plan(nodes=2, partition="club", account="bio"), "Use one of ml."),
        (plan(nodes=2, partition="club", qos="low"), "slurm.qos = 'low': partition 'club' does not take jobs of that qos."),
        (plan(4000, partition="short,long"), "--time 4000m: partition 'long' ends"),
    ],
)  # fmt: skip
def test_what_a_partition_refuses(wanted: Plan, words: str) -> None:
    with pytest.raises(BadRequest) as refused:
        check_limits(wanted, ALL)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "wanted",
    [
        plan(30),
        plan(2880, nodes=9, partition="long"),
        plan(nodes=2, partition="club", account="ml", qos="high"),
        plan(nodes=2, partition="club"),
        plan(2000, partition="short,long"),
    ],
)
def test_what_a_partition_takes(wanted: Plan) -> None:
    check_limits(wanted, ALL)


def test_a_cluster_without_a_default_partition_is_left_to_sbatch() -> None:
    check_limits(plan(), [LONG, CLOSED])


def test_sbatch_in_sentences() -> None:
    said = "sbatch: error: invalid number of nodes (-N 2-1)\nallocation failure: Requested node configuration is not available"
    assert refusal_text(said) == "invalid number of nodes (-N 2-1). Requested node configuration is not available."


FOUND = (NodeKind(2, 8, 96, 1000.0, "h100"), NodeKind(4, 4, 64, 500.0, "a100", down=1), NodeKind(9, 0, 32, 100.0))


@pytest.mark.parametrize(
    ("profile", "nodes", "kinds"),
    [
        (Cluster("x", "slurm"), 15, FOUND),
        (Cluster("x", "slurm", node=Node(gpus=4)), 4, FOUND[1:2]),
        (Cluster("x", "slurm", node=Node(gpus=0)), 9, FOUND[2:]),
        (Cluster("x", "slurm", node=Node(gpus=16)), 0, ()),
        (Cluster("x", "slurm", nodes=1, node=Node(gpus=8, accelerator="H100")), 1, (replace(FOUND[0], count=1, accelerator="H100"),)),
        (Cluster("x", "slurm", node=Node(gpus=8, cpus=48, memory_gb=9.0)), 2, (replace(FOUND[0], cpus=48, memory_gb=9.0),)),
    ],
)  # fmt: skip
def test_what_a_profile_says_wins_over_what_was_found(
    profile: Cluster, nodes: int, kinds: tuple[NodeKind, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query, "kinds", lambda _: FOUND)
    site = SlurmBackend().survey(profile)
    assert (site.nodes, site.kinds) == (nodes, kinds)
    assert site.node.gpus == (profile.node.gpus if profile.node.gpus is not None else 8)


def test_a_profile_that_says_all_is_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for said in (Cluster("x", "slurm", nodes=2, node=Node(8, 96)), Cluster("x", "slurm", kinds=FOUND)):
        assert SlurmBackend().survey(said) is said
    some = Cluster("x", "slurm", node=Node(gpus=8))
    assert SlurmBackend().survey(some) is some, "enough for a dry run"
    with pytest.raises(BadRequest, match=r"the command scontrol is missing.*plan with --dry-run"):
        SlurmBackend().survey(Cluster("x", "slurm"))


def answers(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put commands on the path that answer as those of SLURM do."""
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_what_is_hidden_from_this_user_is_left_to_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PrivateData=nodes,partitions, which `tests/launcher/backends/slurm/test_sites.py` sets in a real SLURM."""
    hidden = "echo 'slurm_load_node error: Access/permission denied' >&2; exit 1"
    tested = "echo 'sbatch: Job 7 to start at 2026-11-27T10:00:00 using 8 processors on nodes n1 in partition gpu' >&2"
    answers(tmp_path, monkeypatch, scontrol=hidden, sbatch=tested)
    site = Cluster("site", "slurm", slurm=Slurm(partition="gpu"))
    assert SlurmBackend().survey(site) == site
    assert query.partitions() == []
    assert SlurmBackend().check(plan(partition="gpu")) == "2026-11-27 10:00:00 on n1, if submitted now"
    answers(tmp_path, monkeypatch, sbatch="echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(BadRequest, match="sbatch refused the job: invalid partition specified: gpu"):
        SlurmBackend().check(plan(partition="gpu"))


HELD_BY_A_PROLOG = (
    "SLURM holds the job; a node failed to start it (such as by its prolog); `scontrol release 7` lets it start"
)


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("Resources", "Resources"),
        ("None", ""),
        ("", ""),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "ReqNodeNotAvail, UnavailableNodes:n[1-2]"),
        ("JobHeldUser", "JobHeldUser: SLURM holds the job; `scontrol release 7` lets it start"),
        ("JobHeldAdmin", "JobHeldAdmin: SLURM holds the job; an administrator has to release it"),
        ("launch failed requeued held", f"launch failed requeued held: {HELD_BY_A_PROLOG}"),
        ("job_requeued_in_held_state", "job_requeued_in_held_state: SLURM holds the job; `scontrol release 7` lets it start"),
    ],
)  # fmt: skip
def test_what_a_queued_job_waits_for(reason: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(tmp_path, monkeypatch, squeue=f"echo '{reason}'")
    assert SlurmBackend().waits_for("7") == text
    answers(tmp_path, monkeypatch, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert SlurmBackend().waits_for("7") == ""
    with pytest.raises(BadRequest, match="is not a job id"):
        SlurmBackend().waits_for("--me")


@pytest.mark.parametrize(
    ("squeue", "sacct", "words"),
    [
        ("OUT_OF_MEMORY", "", "SLURM ended it as OUT_OF_MEMORY: the job used more memory than it asked for"),
        ("", "CANCELLED by 1000", "SLURM ended it as CANCELLED: somebody cancelled it"),
        ("", "OUT_OF_ME+", "SLURM ended it as OUT_OF_ME"),
        ("FAILED", "", "SLURM ended it as FAILED"),
        ("", "", ""),
    ],
)
def test_how_a_job_ended_that_left_no_result(
    squeue: str, sacct: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(tmp_path, monkeypatch, squeue=f"echo '{squeue}'", sacct=f"echo '{sacct}'")
    run = planned_run(tmp_path / "lost", "slurm")
    run.event("submitted", format=2)
    run.write_job("slurm", "7")
    assert SlurmBackend().ended_as("7").lstrip().startswith(words)
    assert f"(job 7, slurm).{' ' * bool(words)}{words}" in Run(run).explain()


@pytest.mark.parametrize(
    ("setting", "kept"),
    [("accounting_storage/slurmdbd", True), ("accounting_storage/none", False), ("(null)", False)],
)
def test_whether_slurm_keeps_accounts(
    setting: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(
        tmp_path,
        monkeypatch,
        scontrol=f"echo 'AccountingStorageTRES   = cpu'; echo 'AccountingStorageType   = {setting}'",
    )
    assert query.keeps_accounts() is kept
