"""Ray backend: a detached driver process on this machine runs a `TorchTrainer` on the cluster."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.backends import detached
from launcher.backends.base import Backend, Capabilities, this_machine
from launcher.config.check import Check
from launcher.config.cluster import Cluster
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir, tail
from launcher.lifecycle.trust import PROCESS_ID, check_id
from launcher.request.placement.devices import Placement
from launcher.request.placement.tpu import SINGLE_HOST_CHIPS, Topology, pod_type
from launcher.request.spec import Plan, State
from training.flags.typed import brief


def address(cluster: Cluster) -> str | None:
    """Address of the cluster, from the profile or RAY_ADDRESS; None: start a Ray on this machine.

    Raises:
        BadRequest: it is neither ``host:port`` nor one of Ray's words.
    """
    where = cluster.ray.address or os.environ.get("RAY_ADDRESS") or None
    if where == "local":  # Ray's own word for that
        return None
    if where is not None and where != "auto":
        match = re.fullmatch(r"(?:ray://)?(?:[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+(?:%\w+)?\]?):([0-9]{1,5})", where)
        if match is None or not 0 < int(match[1]) < 65536:
            name = "ray.address" if cluster.ray.address else "RAY_ADDRESS"
            raise BadRequest(f"{name} = {brief(where, 60)}: write host:port, such as head:6379, or auto.")
    return where


def trainer(
    plan: Plan, number: int = 1, ranks: int | None = None, excluded: Sequence[str] = (), marked: bool = True
) -> dict[str, Any]:
    """The arguments of Ray's ScalingConfig and RunConfig as plain data, for `render` and for the driver.

    Args:
        number: of the request; the requests of a run count from 1.
        ranks: world size if the run continues with fewer ranks.
        excluded: ids of excluded nodes.
        marked: whether hosts have the resource of `whole_host`.

    Raises:
        BadRequest: several TPU chips without a topology.
    """
    placement, ray = plan.placement, plan.cluster.ray
    resources: dict[str, float] = {"CPU": max(1, placement.cpus_per_rank)}
    scaling: dict[str, Any] = {"num_workers": ranks or placement.world_size, "placement_strategy": _strategy(plan)}
    if placement.device == "cuda":
        resources["GPU"] = 1
        # Ray's accelerator types are upper case and are compared exactly.
        kind = placement.accelerator.upper() if placement.accelerator and ray.address else None
        scaling |= {"use_gpu": True, "accelerator_type": kind}
    elif placement.on_tpu:
        if placement.topology is None and placement.world_size > 1:
            raise BadRequest(f"--tpus {placement.world_size}: Ray reserves whole slices; add --topology, such as 4x4.")
        resources["TPU"] = 1
        # Ray uses the older name of v5e.
        generation = f"TPU-{(placement.accelerator or '').upper()}".replace("V5E", "V5LITEPOD")
        scaling |= {"use_tpu": True, "topology": placement.topology, "accelerator_type": generation}
        scaling.pop("placement_strategy")  # not allowed with a topology, which reserves whole slices
        resources |= whole_host(placement) if marked else {}
    scaling["resources_per_worker"] = resources
    if excluded:
        scaling["label_selector"] = {"ray.io/node-id": f"!in({','.join(excluded)})"}
    return {
        "address": ray.address or ("a Ray inside the job" if ray.inside else "a Ray started on this machine"),
        "scaling_config": {key: value for key, value in scaling.items() if value is not None},
        "run_config": {
            # Unique, because Ray resumes a trainer of the same name from its own state; runs resume from checkpoints.
            "name": f"{plan.name}-{number}",
            "storage_path": str(RunDir(plan.run_dir).path / "ray"),
            # The driver decides on restarts (launcher.lifecycle.policy): it distinguishes a user's error from a lost node. By
            # default Ray would retry without limit if a request does not fit, and after a preemption.
            "failure_config": {"max_failures": 0, "controller_failure_limit": 0, "max_preemption_failures": 0},
        },
        "settings": settings(plan),
    }


def whole_host(placement: Placement) -> dict[str, float]:
    """Extra resources of a rank, so that Ray reserves whole single-host TPU slices; else empty.

    Ray 2.60 reserves whole slices of several hosts, but takes chips of any single-host slices. The first host of a named
    slice has one unit of a resource named after its pod type; each rank takes an equal share of it.
    """
    if placement.topology is None or placement.accelerator not in SINGLE_HOST_CHIPS:
        return {}
    chips = Topology.parse(placement.topology).chips
    one = chips in SINGLE_HOST_CHIPS[placement.accelerator]
    return {f"TPU-{pod_type(placement.accelerator, chips)}-head": 1 / chips} if one else {}


def settings(plan: Plan) -> dict[str, str]:
    """Environment variables of Ray Train, for options without a config field; set in the driver alone."""
    return {
        # The start and the end of an attempt wait for the next poll of Ray's controller; the default interval is 2 s.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        # The driver watches for drained nodes itself, which saves an actor in each attempt.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{min(60.0, max(15.0, plan.cluster.ray.wait)):g}",
        # Workers keep the user's working directory, as on the other engines; by default Ray changes to its trial folder.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }


def _strategy(plan: Plan) -> str:
    """Placement strategy: one node for all ranks, one for each rank, or the profile's strategy."""
    nodes, world_size = plan.spec.nodes, plan.placement.world_size
    if nodes == 1:
        return "STRICT_PACK"
    if nodes == world_size:
        return "STRICT_SPREAD"
    return plan.cluster.ray.placement_strategy


def _await_acceptance(plan: Plan, job_id: str) -> None:
    run_dir = RunDir(plan.run_dir)
    deadline = time.monotonic() + TIMEOUTS.ray_accept
    while time.monotonic() < deadline:
        result = run_dir.result()
        failure = (result or {}).get("failure")
        if failure and failure["kind"] == "bad request":
            raise BadRequest(failure["message"])
        newest = next((e["event"] for e in reversed(run_dir.events()) if e["event"] in ("submitted", "accepted")), "")
        if newest == "accepted":  # of this submission, not of an earlier one
            return
        if detached.poll(job_id) is not State.RUNNING:
            lines = tail(run_dir.agent_log(0), 5)
            raise BadRequest(
                "the Ray driver exited before it reached the cluster. Its last lines:\n" + "\n".join(lines)
            )
        time.sleep(0.1)
    raise BadRequest(f"Ray at {plan.cluster.ray.address} did not answer within {TIMEOUTS.ray_accept:.0f} s.")


class RayBackend(Backend):
    """Ray: each run is a driver process on this machine that requests workers from the cluster."""

    name = "ray"
    capabilities = Capabilities(elastic=True)

    def survey(self, cluster: Cluster) -> Cluster:
        """Set the address; without one, count this machine's devices. The driver checks a real cluster."""
        where = address(cluster)
        cluster = replace(cluster, ray=replace(cluster.ray, address=where))
        return cluster if where else this_machine(cluster)

    def render(self, plan: Plan) -> str:
        """The arguments of TorchTrainer, and the address of the cluster."""
        return json.dumps(trainer(plan), indent=2) + "\n"

    def submit(self, plan: Plan) -> str:
        """Start the driver and wait until it has accepted the run."""
        run_dir = RunDir(plan.run_dir)
        trainer(plan)  # refuses before anything starts
        job_id = detached.start("launcher.backends.ray.driver", plan.run_dir, run_dir.agent_log(0))
        try:
            _await_acceptance(plan, job_id)
        except BaseException:
            detached.kill(job_id)  # also on Ctrl-C: a run that was not accepted does not start later
            raise
        return job_id

    def check_id(self, job_id: str) -> None:
        check_id(PROCESS_ID, job_id)

    def poll(self, job_id: str) -> State:
        return detached.poll(job_id)

    def cancel(self, job_id: str) -> None:
        """Kill the driver; Ray then ends its job, with the controller and the workers."""
        detached.kill(job_id)

    def diagnose(self, cluster: Cluster, cwd: Path) -> Iterator[Check]:
        """Connect to the head."""
        try:
            yield reachable(address(cluster))
        except BadRequest as error:
            yield Check("ray", False, str(error), "correct the address")

    def at_hand(self) -> bool:
        return address(Cluster("new", self.name)) is not None

    def new_profile(self) -> str:
        """Write a profile of the Ray at RAY_ADDRESS (default: ``auto``) from its nodes."""
        where = address(Cluster("new", self.name)) or "auto"
        return profile_text(where, nodes_at(where))


def reachable(where: str | None) -> Check:
    """Whether the head at the address `where` accepts connections."""
    if where is None:
        return Check("ray", True, "no address: a Ray is started on this machine for each run")
    try:
        _connect(where)
        return Check("ray", True, f"{where} answers")
    except (OSError, ValueError) as error:
        return Check("ray", False, f"{where}: {error}", "is the head running, and is this its GCS port?")


def _connect(where: str) -> None:
    """Open a connection to ``host:port`` and close it; ``auto`` and ``ray://`` addresses are left to Ray."""
    host, _, port = where.rpartition(":")
    if where != "auto" and "://" not in where:
        socket.create_connection((host, int(port)), timeout=TIMEOUTS.ray_head).close()


def nodes_at(where: str) -> list[Mapping[str, Any]]:
    """The resources of each living node of the Ray at the address `where`.

    Raises:
        BadRequest: it cannot be reached.
    """
    import ray

    try:
        _connect(where)
        ray.init(where, log_to_driver=False, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise BadRequest(f"Ray at {where} cannot be reached: {error}") from None
    try:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def profile_text(where: str, nodes: Sequence[Mapping[str, float]]) -> str:
    """A profile of a Ray at the address `where` whose nodes have these resources."""
    with_gpus = [node for node in nodes if node.get("GPU")]
    of = with_gpus or list(nodes)
    gpus = int(min((node.get("GPU", 0) for node in of), default=0))
    cpus = int(min((node.get("CPU", 0) for node in of), default=0))
    types = sorted({key.partition(":")[2] for node in of for key in node if key.startswith("accelerator_type:")})
    alike = len({(node.get("GPU", 0), node.get("CPU", 0)) for node in of}) < 2
    return "\n".join(
        [
            "# Written by `launch clusters new`; docs/profiles.md lists all keys.",
            'description = "this Ray cluster"',
            'backend = "ray"',
            "",
            "# Run directories, at the same path on all nodes. If `shared` is set, `runs` has to be in one of its folders.",
            '# runs = "/mnt/shared/runs"',
            '# shared = ["/mnt/shared"]',
            "",
            f"# {len(nodes)} nodes are up, {len(with_gpus)} of them with GPUs"
            + ("." if alike else "; they differ, and these are the numbers of the smallest."),
            f"nodes = {len(of)}",
            "[node]",
            f"gpus = {gpus}",
            f"cpus = {cpus}",
            *([f"accelerator = {_quoted(types[0])}"] if len(types) == 1 else []),
            "",
            "[ray]",
            f"address = {_quoted(where)}",
            "# autoscales = true                  # the cluster grows on demand: accept runs larger than its present size",
            "",
        ]
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
