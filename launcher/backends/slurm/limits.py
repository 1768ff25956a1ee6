"""Check a plan against the limits of its partition.

SLURM accepts most jobs that exceed a limit, and never starts them.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.backends.slurm.query import Partition, default_partition
from launcher.errors import BadRequest, nearest
from launcher.request.placement.devices import many
from launcher.request.spec import Plan


def check_limits(plan: Plan, found: Sequence[Partition]) -> None:
    """Check `plan` against the limits of its partition, one of those `found`.

    Raises:
        BadRequest: a limit is exceeded; the message has the limit and the option to change.
    """
    slurm = plan.cluster.slurm
    name = slurm.partition or default_partition(found)
    for each in (name or "").split(","):
        refusals = [_refusal(plan, partition, found) for partition in found if partition.name == each]
        if not refusals and each:
            known = [partition.name for partition in found]
            raise BadRequest(
                f"slurm.partition = {each!r} in profile {plan.cluster.name!r}: this cluster has no such"
                f" partition{nearest(each, known)}. It has {', '.join(known)}."
            )
        if not any(refusals):
            return  # of several partitions, one suffices
    if name:
        raise BadRequest(refusals[0])


def _refusal(plan: Plan, partition: Partition, found: Sequence[Partition]) -> str:
    """Why `partition` refuses `plan`; empty if it does not."""
    slurm, where, placement = plan.cluster.slurm, f"partition {partition.name!r}", plan.placement
    nodes, spare = placement.nodes + plan.spec.spare_nodes, " and the spare ones" * (plan.spec.spare_nodes > 0)
    if partition.state != "UP":
        others = ", ".join(p.name for p in found if p.state == "UP")
        return f"{where} is {partition.state}: nothing starts there. Set slurm.partition to one of {others}."
    if partition.max_minutes is not None and plan.time_minutes > partition.max_minutes:
        up = [p for p in found if p.state == "UP"]
        longer = [p.name for p in up if p.max_minutes is None or p.max_minutes >= plan.time_minutes]
        other = f", or set slurm.partition to {' or '.join(longer)}" if longer else ""
        return (
            f"--time {plan.time_minutes}m: {where} ends jobs after {partition.max_minutes} min. Try --time"
            f" {partition.max_minutes}m{other}. A run that needs longer is requeued and resumes."
        )
    if partition.max_nodes is not None and nodes > partition.max_nodes:
        most = partition.max_nodes - plan.spec.spare_nodes
        option = {"cuda": "gpus", "cpu": "cpus"}.get(placement.device, "tpus")
        each = placement.ranks_per_node
        hint = (
            f" Try --{option} {each * most} --nodes {most} ({each} on each)."
            if most > 0
            else " Leave out --spare-nodes."
        )
        return (
            f"{many(placement.nodes, 'node')}{spare}: {where} allows a job {many(partition.max_nodes, 'node')}.{hint}"
        )
    if nodes < partition.min_nodes:
        return f"{many(nodes, 'node')}: {where} is for jobs of at least {partition.min_nodes}. Try --nodes."
    for key, value, allowed, denied in (
        ("account", slurm.account, partition.accounts, partition.denied_accounts),
        ("qos", slurm.qos, partition.qos, partition.denied_qos),
    ):
        # If the profile names none, SLURM uses the user's default, which is unknown.
        if value is not None and ((allowed and value not in allowed) or value in denied):
            only = f" Use one of {', '.join(allowed)}." if allowed else ""
            return f"slurm.{key} = {value!r}: {where} does not take jobs of that {key}.{only}"
    return ""
