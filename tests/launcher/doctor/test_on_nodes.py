"""``launch doctor --on-nodes``: verdicts from findings, and real faults on a real cluster."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.health.node_facts import within
from launcher.config.check import Check
from launcher.doctor.on_nodes import missing, of_each, verdicts
from launcher.lifecycle.run_dir import RunDir
from tests.launcher.engines import Project
from tests.testbed.slurm import SlurmCluster


def node(number: int, **more: Any) -> dict[str, Any]:
    """The findings of a healthy node."""
    return {
        "node": number,
        "host": f"n{number}",
        "address": f"10.0.0.{number}",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "ranks": 8,
        "device": "cpu",
        "devices": {},
        "network": {},
        "hub": {"cache": "/hub", "chosen": True, "there": True, "reached": None},
        "seen": 0.01,
        "renames": 0.002,
        "clock": 0.004 * number,
        "unreached": [],
        "unresolved": [],
    } | more


def checks(*nodes: dict[str, Any], **more: Any) -> dict[str, Check]:
    return {check.name: check for check in verdicts({"nodes": [node(0), *nodes], **more})}


def test_a_cluster_in_order() -> None:
    found = checks(node(1), latency=0.0005, bytes_per_second=2**30)
    assert all(check.ok and not check.note for check in found.values())
    assert found["nodes"].found == "n0 (10.0.0.0), n1 (10.0.0.1)"
    assert found["all-reduce"].found == "1024 MiB/s through each rank, 0.50 ms for 4 bytes"
    assert found["clocks"].found == "at most 4 ms apart"
    assert found["run folder"].found == "seen by all within 0.01 s; a durable rename takes 2.0 ms on n0, the slowest"


GPUS: dict[str, Any] = {"device": "cuda", "devices": {"count": 7, "names": ["H100"], "driver": "570.1"}}
CARDS = {"count": 8, "names": ["H100"], "driver": "570.1"}
SICK: dict[str, Any] = {"device": "cuda", "devices": CARDS | {"faults": ["GPU 0 (GPU-a) could not remap a row"]}}


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        ({"versions": {"python": "3.11.7", "torch": "2.12.1"}}, "versions", "n1 has torch 2.12.1, n0 has 2.13.0"),
        ({"versions": {"python": "3.11.7", "torch": "missing"}}, "versions", "n1 lacks torch"),
        ({"seen": -1.0}, "run folder", "n1 does not see it"),
        ({"clock": 90.0}, "clocks", "n1 is 90.0 s ahead of n0"),
        ({"clock": -2.5}, "clocks", "n1 is 2.5 s behind n0"),
        ({"unreached": ["n0 (10.0.0.0)"]}, "ports", "n1 cannot reach n0 (10.0.0.0)"),
        (GPUS, "devices", "n1: 7 of 8 GPUs can be used ['H100'], driver 570.1"),
        (SICK, "GPU health", "n1: GPU 0 (GPU-a) could not remap a row"),
        ({"hub": {"cache": "/hub", "chosen": True, "there": False, "reached": None}}, "hub", "/hub: absent on n1"),
    ],
)
def test_a_fault_and_no_other_is_found(fault: dict[str, Any], name: str, words: str) -> None:
    found = checks(node(1, **fault))
    assert [check.name for check in found.values() if not check.ok] == [name]
    assert words in found[name].found
    assert found[name].remedy


@pytest.mark.parametrize(
    ("ranks", "count", "visible", "enough", "words"),
    [
        (8, 8, "0,1,2,3,4,5,6,7", True, "8 of 8 GPUs can be used"),
        (2, 8, "0,1,2,3,4,5,6,7", True, "8 GPUs can be used, 2 are needed"),
        (1, 4, None, True, "4 GPUs can be used, 1 are needed"),
        (7, 1, "MIG-5d5b", True, "each of 7 ranks can use a MIG instance of its own"),
        (1, 1, "MIG-5d5b", True, "1 of 1 GPUs can be used"),
        (4, 1, "GPU-5d5b", True, "each of 4 ranks can use a GPU of its own"),
        (2, 0, "MIG-5d5b", False, "0 of 2 GPUs can be used"),
        (2, 1, "0,1", False, "1 of 2 GPUs can be used"),
        (2, 1, None, False, "1 of 2 GPUs can be used"),
        (2, 0, "", False, "0 of 2 GPUs can be used"),
    ],
)
def test_exclusive_nodes_and_mig_instances_are_in_order(
    ranks: int, count: int, visible: str | None, enough: bool, words: str
) -> None:
    devices = {"visible": visible, "count": count, "names": ["H100"], "driver": "580.1"}
    found = {c.name: c for c in verdicts({"nodes": [node(0, device="cuda", ranks=ranks, devices=devices)]})}
    assert (found["devices"].ok, found["devices"].found) == (enough, f"n0: {words} ['H100'], driver 580.1")


def test_what_is_worth_knowing_is_a_note() -> None:
    hub = {"cache": "/home/me/hub", "chosen": False, "there": False, "reached": False}
    found = {c.name: c for c in verdicts({"nodes": [node(0, hub=hub), node(1, hub=hub, unresolved=["n0"])]})}
    assert [check.name for check in found.values() if check.note] == ["names", "hub"]
    assert all(check.ok for check in found.values())
    assert found["names"].found == "n0 cannot be looked up on the nodes"
    assert "huggingface.co cannot be reached from n0, n1" in found["hub"].found


NDR: dict[str, Any] = {
    "kind": "infiniband",
    "adapters": {"mlx5_0": 400.0},
    "down": [],
    "plugin": False,
    "gpudirect": True,
}


@pytest.mark.parametrize(
    ("network", "device", "rate", "notes"),
    [
        (NDR, "cuda", 45e9, {}),
        (NDR, "cuda", 5e9, {"all-reduce": "10% of what 1 x InfiniBand 400 Gbit/s can give"}),
        (NDR, "cpu", 5e9, {}),
        (
            NDR | {"adapters": {"mlx5_0": 100.0}},
            "cuda",
            12e9,
            {"network": "n0: 1 x InfiniBand 400 Gbit/s; n1: 1 x InfiniBand 100"},
        ),
        ({}, "cuda", 5e9, {"network": "n0: 1 x InfiniBand 400 Gbit/s; n1: no network card"}),
    ],
)
def test_an_all_reduce_is_held_against_the_network(
    network: dict[str, Any], device: str, rate: float, notes: dict[str, str]
) -> None:
    gpus: dict[str, Any] = {"device": device, "devices": CARDS}
    nodes = [node(0, network=NDR, **gpus), node(1, network=network, **gpus)]
    found = {c.name: c for c in verdicts({"nodes": nodes, "latency": 1e-4, "bytes_per_second": rate})}
    assert all(check.ok for check in found.values())
    assert {name: check.found for name, check in found.items() if check.note}.keys() == notes.keys()
    assert all(words in found[name].found for name, words in notes.items())


def test_what_keeps_nccl_from_the_network_is_a_note_with_its_nodes() -> None:
    nodes = [node(n, device="cuda", devices=CARDS, network=NDR | {"gpudirect": n == 2}) for n in range(3)]
    first, second = (check for check in verdicts({"nodes": nodes}) if check.name == "network")
    assert (first.found, first.note) == ("1 x InfiniBand 400 Gbit/s", False)
    assert (second.ok, second.note) == (True, True)
    assert second.found.startswith("n0, n1: InfiniBand cannot read the memory of GPUs")


def meetings(**rates: float) -> dict[str, Any]:
    """Measurements between nodes in MiB/s; `ab` is the pair of n0 and n1."""
    found = [
        {"nodes": ["abcd".index(node) for node in pair], "latency": 0.0004, "bytes_per_second": rate * 2**20}
        for pair, rate in rates.items()
    ]
    return {"pairs": found, "rounds": 3, "rounds_measured": 3}


def pairs(nodes: int, **rates: float) -> Check:
    return checks(*(node(number) for number in range(1, nodes)), **meetings(**rates))["pairs"]


def test_two_nodes_that_are_slow_with_each_other_are_named() -> None:
    found = pairs(4, ab=900, ac=800, ad=850, bc=1000, bd=820, cd=90)
    assert not found.ok
    assert found.found == "slowest of 6 pairs: n2 - n3 90 MiB/s and 0.40 ms; the median: 850 MiB/s and 0.40 ms"
    assert found.remedy.startswith("look at the links between them")
    assert found.table[5] == {"nodes": ["n2", "n3"], "latency": 0.0004, "bytes_per_second": 90 * 2**20}


def test_a_node_that_is_slow_with_all_others_is_named() -> None:
    found = pairs(4, ab=900, ac=800, ad=80, bc=1000, bd=82, cd=90)
    assert not found.ok
    assert "n0 - n3 80 MiB/s and 0.40 ms, n1 - n3 82 MiB/s and 0.40 ms, n2 - n3 90 MiB/s" in found.found
    assert found.remedy.startswith("look at the links of n3, which they have in common")


def test_of_three_nodes_a_slow_one_is_a_note() -> None:
    found = pairs(3, ab=900, ac=80, bc=85)
    assert (found.ok, found.note) == (True, True)
    assert found.remedy.startswith("look at the links of n2,")


def test_pairs_that_are_alike_or_few_are_in_order() -> None:
    for found in (pairs(2, ab=900), pairs(3, ab=900, ac=400, bc=300), pairs(4, ab=9, ac=9, ad=9, bc=9, bd=9, cd=3)):
        assert (found.ok, found.note) == (True, False)
    assert "pairs" not in checks(node(1))


def test_it_is_told_where_not_all_pairs_were_measured() -> None:
    found = checks(node(1), **meetings(ab=900) | {"rounds": 63, "rounds_measured": 15})["pairs"]
    assert found.found.endswith(" (measured: 15 of 63 rounds, each node once in each)")


def test_what_nodes_without_findings_left(tmp_path: Path) -> None:
    (tmp_path / "doctor").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "submitit").mkdir()
    (tmp_path / "doctor" / "0.json").write_text("{}")
    (tmp_path / "logs" / "agent-1.log").touch()
    (tmp_path / "rendezvous.json").write_text(json.dumps({"address": "10.0.0.9"}))
    (tmp_path / "submitit" / "7_2_log.err").write_text("slurmstepd: x\nNo such file: /runs/x\n\n")
    first, second = missing(RunDir(tmp_path), 3)
    assert (first.name, second.name) == ("node 1", "node 2")
    assert "did not get in touch with node 0" in first.found
    assert "10.0.0.9" in first.remedy
    assert "Its last words: No such file: /runs/x" in second.found


def test_low_limits_and_slow_gpus_are_notes() -> None:
    shm, slow = "/dev/shm has 1 MiB", "GPU 0 (GPU-a) is slowed down because it is too hot"
    sick = {"device": "cuda", "devices": CARDS | {"warnings": [slow, "GPU at PCI 0000:3b:00 had Xid 79"]}}
    found = checks(node(1, limits=[shm], **sick), node(2, limits=[shm]), node(3, limits=[]))
    assert [check.name for check in found.values() if check.note] == ["GPU health", "limits"]
    assert all(check.ok for check in found.values())
    assert found["limits"].found == f"n1, n2: {shm}"
    assert found["GPU health"].found == f"n1: {slow}; GPU at PCI 0000:3b:00 had Xid 79"


def test_what_nodes_said_before_the_run_failed(tmp_path: Path) -> None:
    assert list(of_each(RunDir(tmp_path))) == []
    (tmp_path / "doctor").mkdir()
    faults: tuple[dict[str, Any], ...] = ({}, {"versions": {"torch": "1"}}, GPUS)
    for number, more in enumerate(faults):
        (tmp_path / "doctor" / f"{number}.json").write_text(json.dumps(node(number, **more)))
    assert [check.name for check in of_each(RunDir(tmp_path))] == ["versions", "devices"]


def test_what_hangs_is_given_up() -> None:
    import time

    def fails() -> None:
        raise OSError("no route")

    assert within(5, lambda: 3) == 3
    assert within(5, fails) is None
    assert within(0.05, lambda: time.sleep(0.5)) is None


# ---- on the real cluster ----------------------------------------------------------------------------------------


def doctor(project: Project, *argv: str, slurm: dict[str, Any] | None = None) -> dict[str, Check]:
    """``launch doctor --on-nodes``; the last check of a name counts."""
    (project.folder / "cluster_configs").mkdir(exist_ok=True)
    lines = [f"{key} = {json.dumps(value)}" for key, value in (slurm or {}).items()]
    (project.folder / "cluster_configs/site.toml").write_text("\n".join(['backend = "slurm"', "[slurm]", *lines]))
    done = project.call("doctor", "--cluster", "site", "--on-nodes", "--json", *argv, status=None)
    found = [Check(**each) for each in json.loads(done.stdout)]
    assert done.returncode == (0 if all(check.ok for check in found) else 1)
    return {check.name: check for check in found}


def failing(found: dict[str, Check]) -> list[str]:
    return [check.name for check in found.values() if not check.ok]


def only_on_node_1(line: str) -> str:
    return f'[ "$SLURM_NODEID" != 1 ] || {line}'


@pytest.mark.slow
@pytest.mark.slurm
def test_nodes_in_order_and_names_that_do_not_resolve(slurm_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of the test cluster's nodes cannot be resolved."""
    monkeypatch.setenv("HF_HOME", str(slurm_project.folder))
    found = doctor(slurm_project)
    assert failing(found) == []
    assert found["nodes"].found == "node1 (127.0.0.1), node2 (127.0.0.1)"
    assert (found["names"].note, found["names"].found) == (True, "node1, node2 cannot be looked up on the nodes")
    assert "MiB/s through each rank" in found["all-reduce"].found
    assert list((slurm_project.folder / "runs").glob("doctor-*")) == [], (
        "nothing is left of a run in which all was found"
    )


@pytest.mark.slow
@pytest.mark.slurm
def test_each_two_of_four_nodes_are_measured(slurm_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(slurm_project.folder))
    found = doctor(slurm_project, "--nodes", "4")
    told = found["pairs"]  # on one busy machine a pair may be slow
    assert [name for name in failing(found) if name != "pairs"] == []
    assert told.found.startswith("slowest of 6 pairs: node")
    nodes = ["node1", "node2", "node3", "node4"]
    assert sorted(tuple(pair["nodes"]) for pair in told.table) == list(combinations(nodes, 2))
    assert all(pair["bytes_per_second"] > 0 and 0 < pair["latency"] < 5 for pair in told.table)


@pytest.mark.slow
@pytest.mark.slurm
def test_another_version_and_another_clock_on_one_node(slurm_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a missing model cache."""
    monkeypatch.setenv("HF_HOME", str(slurm_project.folder / "absent"))
    odd = slurm_project.folder / "odd"
    (odd / "accelerate-0.0.1.dist-info").mkdir(parents=True)
    (odd / "accelerate-0.0.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: accelerate\nVersion: 0.0.1\n"
    )
    (odd / "sitecustomize.py").write_text("import time\nright = time.time\ntime.time = lambda: right() + 90\n")
    found = doctor(slurm_project, slurm={"node_setup": [only_on_node_1(f"export PYTHONPATH='{odd}'")]})
    assert failing(found) == ["versions", "clocks", "hub"]
    assert found["versions"].found.startswith("node2 has accelerate 0.0.1, node1 has 1.")
    assert found["clocks"].found.startswith("node2 is 90.0 s ahead of node1")


@pytest.mark.slow
@pytest.mark.slurm
def test_a_run_folder_that_is_not_the_same_on_all_nodes(slurm_project: Project) -> None:
    """One node has another mount in its place."""
    runs = slurm_project.folder / "runs"
    inside = f"mount -t tmpfs none '{runs}' && exec \"$@\""
    line = f'exec unshare --mount sh -c {json.dumps(inside)} launch "$@"'.replace('\\"$@\\"', '\\"\\$@\\"')
    found = doctor(slurm_project, "--wait", "10", slurm={"node_setup": [only_on_node_1(line)]})
    assert failing(found) == ["node 1", "run"]
    assert f"nothing of it appeared in {runs}" in found["node 1"].found
    assert "is the runs folder the same one there?" in found["node 1"].remedy


@pytest.mark.slow
@pytest.mark.slurm
def test_gpus_without_a_driver(slurm_project: Project) -> None:
    """The test cluster's GPUs have no driver, so ranks cannot use them."""
    found = doctor(slurm_project, "--gpus", "2", "--nodes", "1", "--wait", "60")
    assert failing(found) == ["devices", "run"]
    assert found["devices"].found == "node1: 0 of 2 GPUs can be used [], driver "


@pytest.mark.slow
@pytest.mark.slurm
def test_ports_that_are_blocked(slurm_project: Project) -> None:
    """One node is in a network namespace: it is up and shares the files, but reaches no other node."""
    line = 'exec unshare --net sh -c \'ip link set lo up && exec "$@"\' launch "$@"'
    found = doctor(slurm_project, "--wait", "10", slurm={"node_setup": [only_on_node_1(line)]})
    assert failing(found) == ["node 1", "run"]
    assert "did not get in touch with node 0" in found["node 1"].found
    assert "TCP ports" in found["node 1"].remedy


@pytest.mark.slow
@pytest.mark.slurm
def test_what_is_known_before_anything_is_sent(slurm_project: Project, on_slurm: SlurmCluster) -> None:
    """Nodes that are drained, and a partition whose limit is below the request."""
    for name in ("node2", "node3"):
        on_slurm.set_node(name, "drain")  # a node that is down returns when its slurmd next registers
    found = doctor(slurm_project, "--nodes", "3")
    assert failing(found) == ["request"]
    assert found["nodes"].found.endswith(", 2 down or drained")
    assert (
        "3 CPUs on 3 nodes: cluster 'site' has 2 nodes and 32 CPUs (2 more are down or drained)"
        in found["request"].found
    )
    on_slurm.run("scontrol", "update", "partitionname=urgent", "maxtime=5")
    try:
        found = doctor(slurm_project, "--nodes", "1", slurm={"partition": "urgent"})
    finally:
        on_slurm.run("scontrol", "update", "partitionname=urgent", "maxtime=unlimited")
    assert failing(found) == ["request"]
    assert "--time 10m: partition 'urgent' ends jobs after 5 min" in found["request"].found
    assert not list((slurm_project.folder / "runs").glob("doctor-*"))
