"""Devices asked for, and where ranks run: the two values on either side of `place`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True)
class Devices:
    """Devices asked for: a total, and whatever the user pinned of its shape."""

    kind: Kind
    count: int
    nodes: int | None = None
    accelerator: str | None = None
    topology: str | None = None


@dataclass(frozen=True)
class Placement:
    """Where ranks run.

    Attributes:
        nodes: number of nodes (hosts).
        ranks_per_node: ranks on each node; one device each.
        device: the ranks' device type: ``cpu``, ``cuda``, or of a TPU ``tpu`` (torch_tpu) or ``xla`` (torch_xla).
        cpus_per_rank: CPU cores reserved for a rank; 0 where the cluster does not say.
        threads: intra-op CPU threads of a rank; 0 leaves the library's default.
        accelerator, topology: as asked, or what the cluster has.
        why: one sentence for the reader of the plan.
        memory_gb: memory of a node that its ranks' share comes to; 0 where the cluster does not say.
        gpu_type: the type to ask the scheduler for by name; None where any will do.
        feature: the node feature that stands for the type where the GPUs have no name of their own.
    """

    nodes: int
    ranks_per_node: int
    device: Literal["cpu", "cuda", "tpu", "xla"]
    cpus_per_rank: int = 0
    threads: int = 0
    accelerator: str | None = None
    topology: str | None = None
    why: str = ""
    memory_gb: float = 0.0
    gpu_type: str | None = None
    feature: str | None = None

    @property
    def on_tpu(self) -> bool:
        return self.device in ("tpu", "xla")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


class Refused(Exception):
    """Why a request cannot be placed, requests nearby that may work, and others for when none of those does."""

    def __init__(self, text: str, *nearby: Devices, others: Sequence[Devices] = ()) -> None:
        super().__init__(text)
        self.nearby, self.others = nearby, others


def many(number: int, what: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {what}{'s' * (number != 1)}"
