"""Order the nodes of a job by the network switches that they are connected to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def switches_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the switches or blocks above this node, from the top; empty if SLURM's topology plug-in is not active.

    Source: SLURM_TOPOLOGY_ADDR (``s0.s1.n7``) and SLURM_TOPOLOGY_ADDR_PATTERN (``switch.switch.node``) in "OUTPUT ENVIRONMENT
    VARIABLES" of sbatch(1).
    """
    levels = environment.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    names = environment.get("SLURM_TOPOLOGY_ADDR", "").split(
        ".", len(levels) - 1
    )  # the name of a node may have a point
    if levels[-1] != "node" or len(names) != len(levels):
        return ()
    return tuple(names[:-1])


def by_switches(agents: Sequence[int], switches: Mapping[int, Sequence[str]]) -> list[int]:
    """Return `agents` with those below the same switch together, at every level; unchanged if not all switches are known.

    Switches are in the order of their first agent, and agents keep their order below a switch; so the first stays first.
    """
    if not all(switches.get(agent) for agent in agents):
        return list(agents)
    first: dict[tuple[str, ...], int] = {}
    for place, agent in enumerate(agents):
        for level in range(len(switches[agent])):
            first.setdefault(tuple(switches[agent][: level + 1]), place)
    places = {agent: place for place, agent in enumerate(agents)}

    def key(agent: int) -> list[int]:
        above = switches[agent]
        return [*(first[tuple(above[: level + 1])] for level in range(len(above))), places[agent]]

    return sorted(agents, key=key)
