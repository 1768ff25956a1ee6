"""Local backend: one detached node agent on this machine, which outlives the shell that started it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.backends import detached
from launcher.backends.base import Backend, Capabilities, FreeGpu, this_machine
from launcher.config.check import Check
from launcher.config.cluster import Cluster
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir
from launcher.lifecycle.trust import PROCESS_ID, check_id
from launcher.request import own_packages
from launcher.request.spec import Plan, State
from training.distributed.missing import UNUSABLE
from training.distributed.visible import visible_devices


def try_gpus(gpu: FreeGpu | None = None) -> tuple[bool, str]:
    """Test `gpu`, or the first GPU, with torch in a subprocess.

    Returns:
        Whether it can be used, and what was found or why not.
    """
    command = own_packages.command("training.distributed.missing")
    own = {"CUDA_VISIBLE_DEVICES": gpu.name} if gpu else {}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=TIMEOUTS.gpu_trial,
            env={**os.environ, **own},
        )
    except subprocess.TimeoutExpired:
        return False, f"{gpu.name if gpu else 'the first GPU'} does not answer within {TIMEOUTS.gpu_trial:g} s"
    if done.returncode == 0:
        return True, done.stdout.strip()
    lines = (done.stdout if done.returncode == UNUSABLE else done.stderr).strip().splitlines()
    return False, lines[-1] if lines else f"torch exited with {done.returncode} when it used a GPU"


class LocalBackend(Backend):
    """This machine: ranks start at once and report errors of their target, so no precheck is needed."""

    name = "local"
    capabilities = Capabilities(interrupt_stops=True, attaches=True, queue=False, precheck=False, multi_node=False)

    def survey(self, cluster: Cluster) -> Cluster:
        """Count the GPUs and cores of this machine, without importing torch."""
        return this_machine(cluster)

    def render(self, plan: Plan) -> str:
        """The processes that would start, and their environments."""
        from launcher.agent.protocol import AgentInfo, Start
        from launcher.rank.environment import complete_environment

        run_dir = RunDir(plan.run_dir)
        lines = [f"agent: python -m launcher.agent.main {plan.run_dir}"]
        start = Start.of(plan, attempt=1, node=0, hosts=[AgentInfo().address], port=1)
        for world in start.worlds:
            environment = complete_environment({}, plan, run_dir, world, start.environments)
            environment["MASTER_PORT"] = "<a free port>"
            lines.append(f"rank {world.rank}: {plan.target.kind} {plan.target.name} {plan.target.listed()}")
            lines += [f"    {key}={value}" for key, value in sorted(environment.items())]
        return "\n".join(lines) + "\n"

    def free_gpu(self, cluster: Cluster) -> FreeGpu | None:
        """Choose the GPU with the most free memory, unless CUDA_VISIBLE_DEVICES or the profile chooses."""
        chosen = "CUDA_VISIBLE_DEVICES" in os.environ or "CUDA_VISIBLE_DEVICES" in cluster.variables()
        if chosen or (cluster.node.gpus or 0) < 2:
            return None
        from launcher.agent.health import gpus

        found = gpus.freest()
        return FreeGpu(found.uuid, str(found)) if found else None

    def unusable_gpus(self, gpu: FreeGpu | None = None) -> str:
        """Test `gpu`, or the first one, with torch in a subprocess."""
        works, found = try_gpus(gpu)
        return "" if works else found

    def check(self, plan: Plan) -> str:
        """Refuse ranks on several MIG instances of one card, which NCCL cannot connect."""
        ranks = plan.placement.ranks_per_node
        visible = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES")) or []
        instances = [name for name in visible[:ranks] if name.startswith("MIG-")]
        if plan.placement.device == "cuda" and len(instances) > 1:
            from launcher.agent.health.gpus import shared_cards

            for card, slices in shared_cards(instances).items():
                raise BadRequest(
                    f"{ranks} ranks would use {len(slices)} MIG instances of one card ({card}), and NCCL connects no two"
                    " instances of a card. Ask for --gpus 1, or have CUDA_VISIBLE_DEVICES name instances of different"
                    " cards, or whole GPUs."
                )
        return ""

    def submit(self, plan: Plan) -> str:
        """Start the agent."""
        return self.attach(plan)

    def attach(self, plan: Plan, kind: str = "", passed: Sequence[tuple[int, int]] = ()) -> str:
        """Start the agent with the streams of a foreground command; see `launcher.client.terminal.Attachment`."""
        if plan.placement.nodes != 1:
            raise BadRequest(
                "the local backend has one node, this machine. For more nodes use --backend slurm or --backend ray."
            )
        words = (kind,) if kind else ()
        log = RunDir(plan.run_dir).agent_log(0)
        return detached.start("launcher.agent.main", plan.run_dir, log, *words, passed=passed)

    def check_id(self, job_id: str) -> None:
        check_id(PROCESS_ID, job_id)

    def poll(self, job_id: str) -> State:
        return detached.poll(job_id)

    def cancel(self, job_id: str) -> None:
        detached.kill(job_id)

    def diagnose(self, cluster: Cluster, cwd: Path) -> Iterator[Check]:
        """Count the devices, try the GPUs, and look at the limits of ranks."""
        from launcher.agent.health import gpus, limits
        from launcher.agent.health.kernel_log import xid_errors

        cluster = this_machine(cluster)
        node = cluster.node
        yield Check("devices", True, f"{node.gpus or 'no'} GPUs, {node.cpus} cores")
        if node.gpus:
            gpu = self.free_gpu(cluster)
            works, found = try_gpus(gpu)
            found += f"; tried: {gpu.why}" if gpu else ""
            yield Check("gpu", works, found, "" if works else "a default run uses the CPU until then")
            if text := "; ".join([*gpus.slowed(os.environ.get("CUDA_VISIBLE_DEVICES")), *xid_errors()]):
                yield Check("GPU health", True, text, "have the machine looked at if it stays", note=True)
        ranks = max(1, node.gpus or 0)
        for text in limits.warnings(limits.look(), ranks, ranks):
            yield Check("limits", True, text, "raise the limit before a long run", note=True)
