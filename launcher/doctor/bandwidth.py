"""Bandwidth between the nodes of an allocation: an all-reduce of all of them together, and one of each two of them.

Each two nodes are measured as in a round-robin tournament: in a round every node is in one pair, and all pairs of a round
measure at the same time: n nodes take n - 1 rounds, and no pair shares a link with a pair of another round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.config.timeouts import TIMEOUTS

if TYPE_CHECKING:
    from training.context import Context

BYTES, BYTES_ON_GPUS = 16 * 2**20, 256 * 2**20
"""Size of the large tensor; NCCL needs more than gloo to come near the rate of a fast network."""

TRIALS = 3

SMALL_BYTES = 2**20
"""The first, small measurement of a pair; over a broken link it takes so long (`Timeouts.slow_pair`) that it is the last."""

MOST_ROUNDS = 15
"""All rounds for up to 16 nodes; of more, so many spread evenly: then every node is measured with 15 others."""


def speed(ctx: Context) -> dict[str, float]:
    """All-reduce: seconds for 4 bytes, and bytes a second of a large tensor through each rank (2 (n-1)/n times its size)."""
    if ctx.world.world_size == 1:
        return {}
    ctx.group.barrier()
    share = 2 * (ctx.world.world_size - 1) / ctx.world.world_size
    size = BYTES_ON_GPUS if ctx.device.type == "cuda" else BYTES
    return {"latency": _seconds(ctx, 4, 20), "bytes_per_second": size * share / _seconds(ctx, size, 2)}


def pairs(ctx: Context) -> dict[str, Any]:
    """`speed` of each two nodes, one rank a node, on every rank.

    Returns:
        ``{"pairs": [{"nodes": [a, b], "latency": seconds, "bytes_per_second": ...}, ...], "rounds": of the tournament,
        "rounds_measured": ...}``; empty for one node.
    """
    import torch.distributed as dist

    ranks = ctx.group.gather((ctx.world.node_rank, ctx.world.local_rank))
    first = {node: rank for rank, (node, local) in enumerate(ranks) if local == 0}  # Ray may fill nodes unevenly
    if len(first) == 1:
        return {}
    everything = tournament(len(first))
    chosen, started = spread(everything, MOST_ROUNDS), time.monotonic()
    local_pairs: list[dict[str, Any]] = []
    done = 0
    for number, meetings in enumerate(chosen):
        # Every rank takes part in the making of every group, in one order: that is torch's rule.
        groups = [dist.new_group([first[a], first[b]]) for a, b in meetings]
        for pair, group in zip(meetings, groups, strict=True):
            if ctx.world.rank in (first[pair[0]], first[pair[1]]):
                latency, rate = _between(ctx, group)
                if ctx.world.rank == first[pair[0]]:
                    local_pairs.append({"nodes": list(pair), "latency": latency, "bytes_per_second": rate})
        ctx.group.barrier()
        for pair, group in zip(meetings, groups, strict=True):
            if ctx.world.rank in (first[pair[0]], first[pair[1]]):
                dist.destroy_process_group(group)
        done = number + 1
        if ctx.group.broadcast(time.monotonic() - started > TIMEOUTS.bandwidth_rounds):
            break
    found = [pair for each in ctx.group.gather(local_pairs) for pair in each]
    return {"pairs": found, "rounds": len(everything), "rounds_measured": done}


def tournament(nodes: int) -> list[list[tuple[int, int]]]:
    """The rounds in which each two of `nodes` meet once, by the circle method: one stays, the others move on by one place.

    Where their number is odd, one of them sits out in each round.
    """
    circle = list(range(nodes + nodes % 2))  # the last one of an odd number meets a node that is not there
    rounds = []
    for _ in range(len(circle) - 1):
        meetings = [(circle[n], circle[-1 - n]) for n in range(len(circle) // 2)]
        rounds.append([(min(pair), max(pair)) for pair in meetings if max(pair) < nodes])
        circle[1:] = [circle[-1], *circle[1:-1]]
    return rounds


def spread(rounds: Sequence[list[tuple[int, int]]], most: int) -> list[list[tuple[int, int]]]:
    """At most `most` of `rounds`, at equal distances."""
    count = min(most, len(rounds))
    return [rounds[n * len(rounds) // count] for n in range(count)]


def _between(ctx: Context, group: Any) -> tuple[float, float]:
    """Seconds for 4 bytes, and bytes a second, between the two ranks of `group`; both of them get the same."""
    latency = _seconds(ctx, 4, 10, group)
    small = _seconds(ctx, SMALL_BYTES, 1, group)
    if small > TIMEOUTS.slow_pair:
        return latency, SMALL_BYTES / small
    return latency, BYTES / _seconds(ctx, BYTES, 1, group)


def _seconds(ctx: Context, size: int, times: int, group: Any = None) -> float:
    """The seconds of an all-reduce of `size` bytes, on all ranks those of the slowest: the mean of `times` in a row.

    Of several such trials the best counts, since what else a machine does can only make them slower.
    """
    import torch
    import torch.distributed as dist

    tensor = torch.zeros(size // 4, device=ctx.device)

    def trial() -> float:
        started = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(tensor, group=group)
        tensor[0].item()  # waits for a GPU
        return (time.perf_counter() - started) / times

    trial()  # connects, and brings the ranks together
    agreed = torch.tensor([min(trial() for _ in range(TRIALS))], device=ctx.device)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
    return float(agreed.item())
