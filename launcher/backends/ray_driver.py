"""The Ray driver: a detached process that connects to the cluster, runs the trainer, and leaves the result.

``python -m launcher.backends.ray_driver RUN_DIR``. It is to Ray what the coordinator is to the other engines, with the
same policy; Ray Train's own restarts are off, since they cannot tell a user's error from a lost node.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from launcher.backends.ray import trainer
from launcher.coordinator import end_run, note_failure
from launcher.errors import BadRequest
from launcher.policy import ADVICE, Action, Failure, Outcome, decide
from launcher.rundir import BEAT_SECONDS, RunDir
from launcher.spec import State


class Driver:
    """Brings one submission of a run to its end."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.plan = run_dir.plan()
        self.started = time.time()

    def run(self) -> State:
        """Connect, check, train; returns the state in which the run ended."""
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            self._connect()
            self._check()
        except BadRequest as error:
            failure = Failure("bad request", str(error), advice=ADVICE["bad request"])
            return end_run(self.run_dir, self.plan, State.FAILED, 0, self.started, failure)
        self.run_dir.event("accepted")
        return self._attempts()

    def _beat(self) -> None:
        """Touch the heartbeat; when a stop was asked for and its grace is over, end without asking again."""
        deadline: float | None = None
        while True:
            self.run_dir.beat()
            if deadline is None and self.run_dir.stop_file.exists():
                # A script cannot be asked: no signal reaches a Ray worker.
                asks = self.plan.target.kind in ("function", "value")
                deadline = time.monotonic() + (self.plan.cluster.grace if asks else 0.0)
                self.run_dir.event("stopping", reason="the file stop")
            if deadline is not None and time.monotonic() > deadline and self.run_dir.result() is None:
                end_run(self.run_dir, self.plan, State.STOPPED, self.run_dir.last_attempt(), self.started)
                os._exit(State.STOPPED.exit_status)  # Ray ends the job of a driver that is gone
            time.sleep(BEAT_SECONDS / 4)

    # ---- the cluster ----------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        # Workers stay where the user is, as on the other engines; Ray would move them to its own trial folder.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        import ray

        address = self.plan.cluster.ray.address
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if address is None:
            # Its CPUs are only numbers: CPU ranks are for debugging, and more of them than cores are allowed.
            cpus = self.plan.placement.world_size * max(1, self.plan.placement.cpus_per_rank)
            cpus = max(cpus, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **common)
            return
        _reach(address)
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise BadRequest(f"Ray at {address} cannot be reached: {error}") from None

    def _check(self) -> None:
        """Refuse what this cluster can never run, and a run directory that a node does not see."""
        import ray

        wanted = trainer(self.plan)["scaling_config"]
        have = ray.cluster_resources()
        if not self.plan.cluster.ray.autoscales:
            for resource, each in wanted["resources_per_worker"].items():
                total, there = each * wanted["num_workers"], have.get(resource, 0)
                if total > there:
                    shown = ", ".join(f"{have[k]:g} {k}" for k in ("CPU", "GPU", "TPU") if k in have)
                    raise BadRequest(
                        f"{wanted['num_workers']} ranks need {total:g} {resource}, but this Ray cluster has {there:g}"
                        f" (in all: {shown}). Ask for at most {int(there // each)} ranks; if the cluster grows on"
                        " demand, set ray.autoscales = true in its profile."
                    )
        blind = self._nodes_without(self.run_dir.plan_file)
        if blind:
            raise BadRequest(
                f"the run directory {self.run_dir.path} is not visible on the nodes {', '.join(blind)}. All nodes have to"
                " share it: set `runs` in the cluster's profile to a shared folder."
            )

    def _nodes_without(self, path: Path) -> list[str]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        sees = ray.remote(num_cpus=0)(_sees)
        nodes = [n for n in ray.nodes() if n["Alive"]]
        asked = [
            sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote(str(path))
            for n in nodes
        ]
        return [n["NodeManagerAddress"] for n, answer in zip(nodes, ray.get(asked), strict=True) if not answer]

    # ---- attempts -------------------------------------------------------------------------------------------------

    def _attempts(self) -> State:
        restarts_left = self.plan.spec.max_restarts
        while True:
            outcome = self._attempt()
            attempt = self.run_dir.last_attempt()
            action, failure = decide(outcome, restarts_left)
            match action:
                case Action.RESTART:
                    restarts_left -= 1
                    note_failure(self.run_dir, attempt, failure, restarts_left)
                case Action.FINISH:
                    return end_run(self.run_dir, self.plan, State.SUCCEEDED, attempt, self.started)
                case Action.STOP:
                    return end_run(self.run_dir, self.plan, State.STOPPED, attempt, self.started)
                case Action.FAIL:
                    return end_run(self.run_dir, self.plan, State.FAILED, attempt, self.started, failure)

    def _attempt(self) -> Outcome:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer

        from launcher.backends.ray_worker import RankConfig, train_rank

        plan, asked = self.plan, trainer(self.plan, self.run_dir.last_attempt() + 1)
        failures = FailureConfig(**asked["run_config"]["failure_config"])
        config = {
            "run_dir": str(plan.run_dir),
            "name": plan.name,
            "device": plan.placement.device,
            "threads": plan.placement.threads,
        }
        fit = TorchTrainer(
            train_rank,
            train_loop_config=config,
            torch_config=RankConfig(run_dir=str(plan.run_dir)),
            scaling_config=ScalingConfig(**asked["scaling_config"]),
            run_config=RunConfig(**asked["run_config"] | {"failure_config": failures}),
        )
        stop = "stop" if self.run_dir.stop_file.exists() else ""
        try:
            result = fit.fit()
        except TrainingFailedError as error:
            attempt = self.run_dir.last_attempt()
            return Outcome(_exits(error), self.run_dir.errors(attempt), stop)
        return Outcome({0: result.return_value}, stop=stop)


def _exits(error: Any) -> dict[int, int]:
    """The exit codes of the ranks that Ray says failed; a worker that died counts as killed."""
    failures = getattr(error, "worker_failures", {}) or {0: error}
    return {rank: getattr(_cause(each), "status", -9) for rank, each in failures.items()}


def _cause(error: BaseException) -> BaseException:
    """Unwrap Ray's exceptions down to a `RankEnded`, where one is inside."""
    for name in ("_base_exc", "cause", "__cause__"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException) and not hasattr(error, "status"):
            return _cause(inner)
    return error


def _sees(path: str) -> bool:
    return Path(path).is_file()


def _reach(address: str) -> None:
    """Refuse an address where nobody listens, at once; Ray itself would try for a minute."""
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"Ray at {address} cannot be reached: {error}. Is its head running, and is this its GCS port (6379 unless"
            " changed)?"
        ) from None


def main() -> None:
    """``python -m launcher.backends.ray_driver RUN_DIR``."""
    run_dir = RunDir(Path(sys.argv[1]))
    state = Driver(run_dir).run()
    sys.exit(state.exit_status)


if __name__ == "__main__":
    main()
