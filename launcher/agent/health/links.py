"""The links between the GPUs of a node, and the quick check of NVIDIA's Data Center GPU Manager if it is installed."""

from __future__ import annotations

import re
from collections import Counter

from launcher.agent.health.gpus import ask
from launcher.config.timeouts import TIMEOUTS

LINK = re.compile(r"\s*Link (\d+): ([0-9.]+) GB/s")
"""An active link in ``nvidia-smi nvlink --status``; ``<inactive>`` stands in place of the rate of another one."""

FAILED = re.compile(r"\|\s*(?P<test>[^|]+?)\s*\|\s*Fail\b\s*-?\s*(?P<why>[^|]*?)\s*\|")
"""A row of the table of ``dcgmi diag``."""


def nvlink_faults(limit: float = TIMEOUTS.gpu_driver) -> list[str]:
    """Return a sentence for each GPU with fewer active NVLinks than most of this node's GPUs; empty if they are all alike."""
    status, said = ask("nvidia-smi", "nvlink", "--status", limit=limit) or (1, "")
    active: dict[str, int] = {}
    for line in said.splitlines() if status == 0 else ():
        if line.startswith("GPU "):
            active[line.partition(":")[0]] = 0
        elif active and LINK.match(line):
            active[next(reversed(active))] += 1
    if not active:
        return []
    usual = max(Counter(active.values()).items(), key=lambda each: (each[1], each[0]))[0]
    return [
        f"{gpu} has {count} active NVLinks, and most GPUs of its node have {usual}"
        for gpu, count in active.items()
        if count < usual
    ]


def dcgm_faults(limit: float = TIMEOUTS.gpu_diagnosis) -> list[str]:
    """Return a sentence for each test that the quick level of ``dcgmi diag`` fails; empty without dcgmi or its service."""
    _, said = ask("dcgmi", "diag", "--run", "1", limit=limit) or (1, "")
    rows = [(row["test"], row["why"]) for row in FAILED.finditer(said)]
    return [f"dcgmi: {test} fails{f': {why}' if why else ''}" for test, why in rows]
