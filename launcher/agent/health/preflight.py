"""Preflight: check every node before an attempt, and find those that are unfit.

Each node reports what it measured (`look`); the coordinator compares the reports of all nodes (`judge`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any, TypeVar

from launcher.agent.health import fabric, gpus, limits, node_facts
from launcher.agent.health.node_facts import Facts
from launcher.agent.protocol import NodeChecked
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.run_dir import RunDir

RUN_FOLDER_BYTES, SCRATCH_BYTES = 2**30, 2**28
"""Minimum free space: for a checkpoint in the run folder, for sockets and caches in ``TMPDIR``."""

T = TypeVar("T")
M = TypeVar("M")
Agent = TypeVar("Agent", int, str)
"""Who reports for a node: an agent by its number, a Ray node actor by the id of its node."""


async def look(run_dir: RunDir, attempt: int, node: int, device: str, visible: str | None) -> dict[str, Any]:
    """Check this node; the report is JSON data and takes little more than `Timeouts.node_check`.

    Each check gives a dict. A check that failed gives ``{"fault": the reason}``.

    Args:
        visible: the run's GPUs on this node, as CUDA_VISIBLE_DEVICES names them; None: all.
    """
    received_at = time.time()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "run folder": partial(run_folder, run_dir, attempt, node),
        "scratch": scratch,
        "versions": versions,
        "limits": limits.look,
    }
    if device == "cuda":
        parts |= {"gpus": lambda: gpus.report(visible) or {}, "network": fabric.look}
    waits = (
        asyncio.to_thread(node_facts.within, TIMEOUTS.node_check, partial(_checked, part)) for part in parts.values()
    )
    found = dict(zip(parts, await asyncio.gather(*waits), strict=True))
    late = {"fault": f"did not answer within {TIMEOUTS.node_check:g} s"}
    return {"received_at": received_at, "sent_at": time.time()} | {
        name: late if part is None else part for name, part in found.items()
    }


def _checked(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except OSError as error:
        return {"fault": f"fails: {error.strerror or error}"}


def run_folder(run_dir: RunDir, attempt: int, node: int) -> dict[str, Any]:
    """Check that the run folder is shared and writable; returns its free bytes.

    Raises:
        OSError: a file cannot be written.
    """
    if node_facts.appears(run_dir.logs / str(attempt)) < 0:
        return {"fault": f"does not show the folder of attempt {attempt}, which the first node made"}
    trial = run_dir.path / f".preflight-{node}"
    try:
        node_facts.renames(trial, 1)
    finally:
        trial.unlink(missing_ok=True)
    return {"free": shutil.disk_usage(run_dir.path).free}


def scratch() -> dict[str, Any]:
    """Check that ``TMPDIR`` is writable; returns its path and free bytes.

    Raises:
        OSError: a file cannot be written.
    """
    folder = os.environ.get("TMPDIR") or "/tmp"
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
    return {"path": folder, "free": shutil.disk_usage(folder).free}


@cache
def versions() -> dict[str, Any]:
    """`node_facts.versions`, computed once: what this process has imported does not change."""
    return node_facts.versions()


async def ask(
    attempt: int,
    agents: Sequence[Agent],
    send: Callable[[Agent], None],
    inbox: asyncio.Queue[tuple[Agent, M]],
    awaited: Callable[[Agent], bool],
    other: Callable[[Agent, M], None],
) -> dict[Agent, Facts]:
    """Collect the reports of all `agents` for `attempt`, with the times of question and answer.

    Args:
        send: sends the question to one agent.
        awaited: whether to keep waiting for an agent that has not answered.
        other: handles the other messages of the `inbox`.
    """
    asked = time.time()
    answers: dict[Agent, Facts] = {}
    for agent in agents:
        send(agent)
    with suppress(TimeoutError):
        async with asyncio.timeout(TIMEOUTS.node_answer):
            while any(awaited(agent) for agent in agents if agent not in answers):
                agent, message = await inbox.get()
                if isinstance(message, NodeChecked) and message.attempt == attempt:
                    answers[agent] = message.facts | {"asked": asked, "answered": time.time()}
                else:
                    other(agent, message)
    return answers


# ---- judgement ---------------------------------------------------------------------------------------------------


def judge(answers: Mapping[str, Facts], ranks: Mapping[str, int]) -> dict[str, str]:
    """The unfit hosts, each with its faults and their remedies.

    Clocks and versions are compared with those of the reference: the host that most others agree with, the first of several.

    Args:
        answers: host -> the report of `look`, with the times ``asked`` and ``answered`` by the coordinator's clock.
        ranks: host -> number of ranks that are to start there, for each host that was asked; node 0's host is the first.
    """
    there = {host: answers[host] for host in ranks if host in answers}
    faults: dict[str, list[str]] = {host: [] for host in ranks}
    for host, number in ranks.items():
        faults[host] += _own_faults(there[host], number) if host in there else [_SILENT]
    _compare_clocks(faults, there)
    known = {host: facts["versions"] for host, facts in there.items() if "fault" not in facts["versions"]}
    if known:
        reference = _most_agreed(known, lambda one, other: one == other)
        for host, local in known.items():
            if differ := node_facts.differences(local, known[reference], reference):
                faults[host].append(f"it {'; '.join(differ)} ({_ONE_ENVIRONMENT})")
    if any(facts.get("gpus") for facts in there.values()):  # otherwise the GPUs are not NVIDIA's
        for host in (host for host, facts in there.items() if facts.get("gpus") == {}):
            faults[host].append(f"it has no nvidia-smi, unlike the other nodes ({_REPORT})")
    return {host: "; ".join(texts) for host, texts in faults.items() if texts}


def warnings(answers: Mapping[str, Facts], ranks: Mapping[str, int]) -> dict[str, list[str]]:
    """Return what may break ranks later, and the hosts for which that holds; the arguments are those of `judge`."""
    found: dict[str, list[str]] = {}
    for host, facts in answers.items():
        own, network = (facts.get(part) or {"fault": ""} for part in ("limits", "network"))
        texts = limits.warnings(own, ranks[host], sum(ranks.values())) if "fault" not in own else []
        for text in [*texts, *(fabric.warnings(network) if "fault" not in network else ())]:
            found.setdefault(text, []).append(host)
    return found


_REPORT = "report it to the cluster administrators"
_SILENT = f"it did not answer the preflight check within {TIMEOUTS.node_answer:g} s ({_REPORT})"
_ONE_ENVIRONMENT = "use one environment for all nodes"
_MOUNT = "check its mounts; `runs` in the profile has to be a folder that all nodes share"


def _own_faults(facts: Facts, ranks: int) -> list[str]:
    """The faults of a node that need no comparison with others."""
    found = []
    folder, temporary = facts["run folder"], facts["scratch"]
    if "fault" in folder:
        found.append(f"its run folder {folder['fault']} ({_MOUNT})")
    elif folder["free"] < RUN_FOLDER_BYTES:
        found.append(f"{_mib(folder['free'])} are free in its run folder ({_minimum(RUN_FOLDER_BYTES)})")
    if "fault" in temporary:
        found.append(f"its TMPDIR {temporary['fault']} (clear it, or set slurm.scratch in the profile)")
    elif temporary["free"] < SCRATCH_BYTES:
        found.append(f"{_mib(temporary['free'])} are free in its {temporary['path']} ({_minimum(SCRATCH_BYTES)})")
    if "fault" in facts["versions"]:
        found.append(f"its Python environment {facts['versions']['fault']} ({_ONE_ENVIRONMENT})")
    cards = facts.get("gpus") or {}
    if "fault" in cards:
        found.append(f"nvidia-smi {cards['fault']} ({_REPORT})")
    elif cards.get("faults"):
        found.append(f"{'; '.join(cards['faults'])} ({_REPORT})")
    elif cards and cards["count"] < ranks:
        found.append(f"its driver shows {cards['count']} of {ranks} GPUs (run nvidia-smi there)")
    return found


def _compare_clocks(faults: Mapping[str, list[str]], answers: Mapping[str, Facts]) -> None:
    skews = {host: skew(facts) for host, facts in answers.items()}
    if not skews:
        return
    reference = _most_agreed(skews, lambda one, other: abs(one - other) <= TIMEOUTS.clock_skew)
    for host, seconds in skews.items():
        off = seconds - skews[reference]
        if abs(off) > TIMEOUTS.clock_skew:
            words = "ahead of" if off > 0 else "behind"
            faults[host].append(f"its clock is {abs(off):.1f} s {words} {reference}'s (check its time service)")


def skew(facts: Facts) -> float:
    """Lower bound of the seconds that a node's clock is ahead of the coordinator's; negative: behind.

    The node received the question after it was asked, and sent its report before that arrived. Only a violation of this
    order counts, so slow messages and slow checks on a busy node are not taken for a wrong clock.
    """
    return float(max(0.0, facts["sent_at"] - facts["answered"]) + min(0.0, facts["received_at"] - facts["asked"]))


def _most_agreed(values: Mapping[str, T], agree: Callable[[T, T], bool]) -> str:
    """The host that most others agree with; the first of several."""
    return max(values, key=lambda host: sum(agree(values[host], other) for other in values.values()))


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _minimum(size: int) -> str:
    return f"minimum {_mib(size)}: free some space"
