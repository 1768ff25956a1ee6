"""Ray, through Ray Train: a driver, detached on this machine, that runs one `TorchTrainer` on the cluster."""

from __future__ import annotations

import json
import os
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
from launcher.lifecycle.run_dir import RunDir
from launcher.lifecycle.trust import PROCESS_ID, check_id
from launcher.request.placement.devices import Placement
from launcher.request.placement.tpu import SINGLE_HOST_CHIPS, Topology, pod_type
from launcher.request.spec import Plan, State


def address(cluster: Cluster) -> str | None:
    """Where the cluster is; None for a Ray that the run starts on this machine. The only place that reads RAY_ADDRESS."""
    return cluster.ray.address or os.environ.get("RAY_ADDRESS") or None


def trainer(
    plan: Plan, number: int = 1, ranks: int | None = None, away: Sequence[str] = (), marked: bool = True
) -> dict[str, Any]:
    """The arguments of Ray's ScalingConfig and RunConfig, as plain data: what `render` prints is what the driver uses.

    `number` counts the requests of a run, `ranks` is how many it goes on with where the cluster has become smaller, `away`
    are the ids of nodes that it stays away from, and `marked` says whether hosts have the resource of `whole_host`.

    Raises:
        BadRequest: several TPU chips without the shape of their slice, which Ray needs to reserve it.
    """
    placement, ray = plan.placement, plan.cluster.ray
    resources: dict[str, float] = {"CPU": max(1, placement.cpus_per_rank)}
    scaling: dict[str, Any] = {"num_workers": ranks or placement.world_size, "placement_strategy": _strategy(plan)}
    if placement.device == "cuda":
        resources["GPU"] = 1
        # Ray's names of types are in capitals, and it matches them to the letter.
        kind = placement.accelerator.upper() if placement.accelerator and ray.address else None
        scaling |= {"use_gpu": True, "accelerator_type": kind}
    elif placement.on_tpu:
        if placement.topology is None and placement.world_size > 1:
            raise BadRequest(f"--tpus {placement.world_size}: Ray reserves whole slices; add --topology, such as 4x4.")
        resources["TPU"] = 1
        # Ray knows v5e by the older of its names.
        generation = f"TPU-{(placement.accelerator or '').upper()}".replace("V5E", "V5LITEPOD")
        scaling |= {"use_tpu": True, "topology": placement.topology, "accelerator_type": generation}
        scaling.pop("placement_strategy")  # whole slices are reserved instead
        resources |= whole_host(placement) if marked else {}
    scaling["resources_per_worker"] = resources
    if away:
        scaling["label_selector"] = {"ray.io/node-id": f"!in({','.join(away)})"}
    return {
        "address": ray.address or ("a Ray inside the job" if ray.inside else "a Ray started on this machine"),
        "scaling_config": {key: value for key, value in scaling.items() if value is not None},
        "run_config": {
            # Ray resumes a trainer of the same name from a state of its own; ours is in the checkpoints.
            "name": f"{plan.name}-{number}",
            "storage_path": str(RunDir(plan.run_dir).path / "ray"),
            # Restarts are decided by the driver (launcher.lifecycle.policy), which knows a user's error from a lost node. Two of
            # these would otherwise be tried for ever: a request that does not fit, and nodes that are taken away.
            "failure_config": {"max_failures": 0, "controller_failure_limit": 0, "max_preemption_failures": 0},
        },
        "settings": settings(plan),
    }


def whole_host(placement: Placement) -> dict[str, float]:
    """What a rank takes besides its chip, so that slices of one host are whole ones of the right shape; empty for others.

    Ray 2.60 sees to that where a slice has several hosts, and would else take the chips of any. Where a slice has a name,
    its first host has one of a resource that is called after its kind; here every rank takes its share of that.
    """
    if placement.topology is None or placement.accelerator not in SINGLE_HOST_CHIPS:
        return {}
    chips = Topology.parse(placement.topology).chips
    one = chips in SINGLE_HOST_CHIPS[placement.accelerator]
    return {f"TPU-{pod_type(placement.accelerator, chips)}-head": 1 / chips} if one else {}


def settings(plan: Plan) -> dict[str, str]:
    """The variables by which Ray Train is told what its configs have no fields for; set in the driver alone."""
    return {
        # An attempt's start and end both wait for a look of Ray's controller; by itself it looks every two seconds.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        # The driver watches for drained nodes itself, which saves an actor in each attempt.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{min(60.0, max(15.0, plan.cluster.ray.wait)):g}",
        # Workers stay where the user is, as on the other engines; Ray would move them to its own trial folder.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }


def _strategy(plan: Plan) -> str:
    """Ray chooses the nodes; what it can be held to is one node for all ranks, or one for each."""
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
        if newest == "accepted":  # this time, not when the run was sent before
            return
        if detached.poll(job_id) is not State.RUNNING:
            lines = run_dir.agent_log(0).read_text().splitlines()[-5:]
            raise BadRequest("the Ray driver ended before it reached the cluster. Its last lines:\n" + "\n".join(lines))
        time.sleep(0.1)
    raise BadRequest(f"Ray at {plan.cluster.ray.address} did not answer within {TIMEOUTS.ray_accept:.0f} s.")


class RayBackend(Backend):
    """Ray: each run is a driver process on this machine, which asks the cluster for workers."""

    name = "ray"
    capabilities = Capabilities(elastic=True)

    def survey(self, cluster: Cluster) -> Cluster:
        """Without a cluster this machine is it; a real one is looked at by the driver, which has to connect anyway."""
        where = address(cluster)
        cluster = replace(cluster, ray=replace(cluster.ray, address=where))
        return cluster if where else this_machine(cluster)

    def render(self, plan: Plan) -> str:
        """The arguments of TorchTrainer, and where the cluster is."""
        return json.dumps(trainer(plan), indent=2) + "\n"

    def submit(self, plan: Plan) -> str:
        """Start the driver and wait until it has the cluster's word that the request can be met."""
        run_dir = RunDir(plan.run_dir)
        trainer(plan)  # refuses before anything starts
        job_id = detached.start("launcher.backends.ray.driver", plan.run_dir, run_dir.agent_log(0))
        try:
            _await_acceptance(plan, job_id)
        except BaseException:
            detached.kill(job_id)  # Ctrl-C while waiting included: what was not accepted was not sent
            raise
        return job_id

    def check_id(self, job_id: str) -> None:
        check_id(PROCESS_ID, job_id)

    def poll(self, job_id: str) -> State:
        return detached.poll(job_id)

    def cancel(self, job_id: str) -> None:
        """Kill the driver: Ray ends the job of a driver that is gone, with its controller and workers."""
        detached.kill(job_id)

    def diagnose(self, cluster: Cluster, cwd: Path) -> Iterator[Check]:
        """Connect to the head."""
        yield reachable(address(cluster))

    def at_hand(self) -> bool:
        return address(Cluster("new", self.name)) is not None

    def new_profile(self) -> str:
        """Ask the Ray at RAY_ADDRESS, or the one of this machine, for its nodes."""
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
            'description = "the Ray cluster at hand"',
            'backend = "ray"',
            "",
            "# Run directories. All nodes have to see them under the same path; with `shared`, others are refused.",
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
            "# autoscales = true                  # the cluster grows on demand: do not refuse what is larger than it is now",
            "",
        ]
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
