"""The engines. Each is one module with the five functions of `Backend`, imported when it is first used."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from launcher.cluster import BACKENDS, Cluster
from launcher.errors import BadRequest, nearest
from launcher.spec import Plan, State


class Backend(Protocol):
    """What an engine does. Logs, metrics and results are files of the run directory, so no engine has a say in them."""

    def survey(self, cluster: Cluster) -> Cluster:
        """Fill in what the profile left open and this engine can tell: nodes, and a node's devices."""

    def render(self, plan: Plan) -> str:
        """Return all that would be sent, word for word. Sends nothing and needs no engine at hand."""

    def submit(self, plan: Plan) -> str:
        """Send what `render` shows and return the job id.

        Raises:
            BadRequest: the engine cannot be reached, or it refuses the request.
        """

    def poll(self, job_id: str) -> State:
        """Say what the engine knows of the job. LOST means that it has ended; the run directory says how."""

    def cancel(self, job_id: str) -> None:
        """End the job now. What should end with a checkpoint is asked through the run directory before."""


POLL_SECONDS = {"local": 0.0, "slurm": 5.0, "ray": 0.0, "ray_on_slurm": 5.0}
"""How long an answer of `Backend.poll` is good for. Looking for a process of this machine costs nothing; a question to
slurmctld is shared by all who watch the run, so that their number does not matter to it."""


KEEPS_SPARE_NODES = ("slurm",)
"""Engines that give a run an allocation of its own, in which a node can wait until it is needed."""


def get(name: str) -> Backend:
    """Import and return the backend called `name`, or the engine that a cluster names (`Cluster.engine`).

    Raises:
        BadRequest: there is no such backend.
    """
    if name not in POLL_SECONDS:
        raise BadRequest(f"--backend {name!r}: no such backend{nearest(name, BACKENDS)}. Known: {', '.join(BACKENDS)}.")
    return cast(Backend, importlib.import_module(f"launcher.backends.{name}"))


def check(plan: Plan) -> str:
    """Ask the engine whether it would take the plan, where it can tell beforehand; return when it would start, if known.

    Raises:
        BadRequest: it would refuse the plan, or never start it.
    """
    ask = getattr(get(plan.cluster.engine), "check", None)
    return str(ask(plan)) if ask else ""


def unusable_gpus(cluster: Cluster) -> str:
    """Say why torch cannot use the GPUs that the engine lists; empty if it can, or if the engine cannot try it from here."""
    ask = getattr(get(cluster.engine), "unusable_gpus", None)
    return str(ask()) if ask else ""
