"""Before each attempt, where the profile asks for it: every node looks around, and the coordinator says which are unfit.

A node only tells what it found (`look`): which of several is the odd one out is seen by who has heard them all (`judge`).
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

from launcher.agent.health import gpus, node_facts
from launcher.agent.health.node_facts import Facts
from launcher.agent.protocol import NodeChecked
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.run_dir import RunDir

RUN_FOLDER_BYTES, SCRATCH_BYTES = 2**30, 2**28
"""The least that has to be free: room for a checkpoint in the run folder, for sockets and caches in ``TMPDIR``."""

T = TypeVar("T")
M = TypeVar("M")
Agent = TypeVar("Agent", int, str)
"""What answers for a node: an agent by its number, a steward of Ray's by the id of its node."""


async def look(run_dir: RunDir, attempt: int, node: int, device: str, visible: str | None) -> dict[str, Any]:
    """What this node says of itself, as JSON can hold it; takes `Timeouts.node_check` and a moment at most.

    `visible`: the run's GPUs there, as CUDA_VISIBLE_DEVICES names them; None: all.
    Each thing that it looked at is a dict; one with a ``fault`` could not be found out, and that is the sentence about it.
    """
    heard = time.time()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "run folder": partial(run_folder, run_dir, attempt, node),
        "scratch": scratch,
        "versions": versions,
    }
    if device == "cuda":
        parts["gpus"] = lambda: gpus.report(visible) or {}
    waits = (asyncio.to_thread(node_facts.within, TIMEOUTS.node_check, partial(_told, part)) for part in parts.values())
    found = dict(zip(parts, await asyncio.gather(*waits), strict=True))
    late = {"fault": f"did not answer within {TIMEOUTS.node_check:g} s"}
    return {"heard": heard, "said": time.time()} | {
        name: late if part is None else part for name, part in found.items()
    }


def _told(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except OSError as error:
        return {"fault": f"fails: {error.strerror or error}"}


def run_folder(run_dir: RunDir, attempt: int, node: int) -> dict[str, Any]:
    """Whether this node sees what the coordinator just made, and can write a file that lasts; bytes free. Raises OSError."""
    if node_facts.appears(run_dir.logs / str(attempt)) < 0:
        return {"fault": f"does not show the folder of attempt {attempt}, which the first node made"}
    trial = run_dir.path / f".preflight-{node}"
    try:
        node_facts.renames(trial, 1)
    finally:
        trial.unlink(missing_ok=True)
    return {"free": shutil.disk_usage(run_dir.path).free}


def scratch() -> dict[str, Any]:
    """``TMPDIR`` and the bytes that are free there. Raises OSError where nothing can be written."""
    folder = os.environ.get("TMPDIR") or "/tmp"
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
    return {"path": folder, "free": shutil.disk_usage(folder).free}


@cache
def versions() -> dict[str, Any]:
    """As `launcher.doctor.node_facts.versions`, found out once a process: what it has loaded does not change any more."""
    return node_facts.versions()


async def ask(
    attempt: int,
    agents: Sequence[Agent],
    send: Callable[[Agent], None],
    inbox: asyncio.Queue[tuple[Agent, M]],
    awaited: Callable[[Agent], bool],
    other: Callable[[Agent, M], None],
) -> dict[Agent, Facts]:
    """Ask all `agents` to look around for `attempt`; what each that answered in time said, and when by this clock.

    Args:
        tell: asks one of them.
        awaited: whether an agent that has not answered yet is still waited for.
        other: takes in whatever else comes into the `inbox`.
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


# ---- what it means ------------------------------------------------------------------------------------------------


def judge(answers: Mapping[str, Facts], ranks: Mapping[str, int]) -> dict[str, str]:
    """Which hosts are unfit, each with what is wrong and what to do about it.

    Clocks and versions are held against those of the host that most others agree with; of two, the first is believed.

    Args:
        answers: what `look` returned on each host, and by the coordinator's clock when it was ``asked`` and ``answered``.
        ranks: how many are to start on each host that was asked, node 0's first.
    """
    there = {host: answers[host] for host in ranks if host in answers}
    faults: dict[str, list[str]] = {host: [] for host in ranks}
    for host, number in ranks.items():
        faults[host] += _of_itself(there[host], number) if host in there else [_SILENT]
    _hold_clocks(faults, there)
    known = {host: facts["versions"] for host, facts in there.items() if "fault" not in facts["versions"]}
    if known:
        measure = _most_agreed(known, lambda mine, other: mine == other)
        for host, mine in known.items():
            if differ := node_facts.differences(mine, known[measure], measure):
                faults[host].append(f"it {'; '.join(differ)} ({_ONE_ENVIRONMENT})")
    if any(facts.get("gpus") for facts in there.values()):  # else they are not NVIDIA's
        for host in (host for host, facts in there.items() if facts.get("gpus") == {}):
            faults[host].append(f"it has no nvidia-smi, which the others have ({_KEEPERS})")
    return {host: "; ".join(texts) for host, texts in faults.items() if texts}


_KEEPERS = "tell the cluster's keepers"
_SILENT = f"it did not say within {TIMEOUTS.node_answer:g} s how it is ({_KEEPERS})"
_ONE_ENVIRONMENT = "use one environment for all nodes"
_MOUNT = "look at its mounts; `runs` in the profile has to be a folder that all nodes share"


def _of_itself(facts: Facts, ranks: int) -> list[str]:
    """What is wrong with a node whatever the others are like."""
    found = []
    folder, temporary = facts["run folder"], facts["scratch"]
    if "fault" in folder:
        found.append(f"its run folder {folder['fault']} ({_MOUNT})")
    elif folder["free"] < RUN_FOLDER_BYTES:
        found.append(f"{_mib(folder['free'])} are free in its run folder ({_least(RUN_FOLDER_BYTES)})")
    if "fault" in temporary:
        found.append(f"its TMPDIR {temporary['fault']} (have it cleared, or set slurm.scratch in the profile)")
    elif temporary["free"] < SCRATCH_BYTES:
        found.append(f"{_mib(temporary['free'])} are free in its {temporary['path']} ({_least(SCRATCH_BYTES)})")
    if "fault" in facts["versions"]:
        found.append(f"its Python environment {facts['versions']['fault']} ({_ONE_ENVIRONMENT})")
    cards = facts.get("gpus") or {}
    if "fault" in cards:
        found.append(f"nvidia-smi {cards['fault']} ({_KEEPERS})")
    elif cards.get("faults"):
        found.append(f"{'; '.join(cards['faults'])} ({_KEEPERS})")
    elif cards and cards["count"] < ranks:
        found.append(f"its driver shows {cards['count']} of {ranks} GPUs (look at nvidia-smi there)")
    return found


def _hold_clocks(faults: Mapping[str, list[str]], answers: Mapping[str, Facts]) -> None:
    ahead = {host: skew(facts) for host, facts in answers.items()}
    if not ahead:
        return
    measure = _most_agreed(ahead, lambda mine, other: abs(mine - other) <= TIMEOUTS.clock_skew)
    for host, seconds in ahead.items():
        off = seconds - ahead[measure]
        if abs(off) > TIMEOUTS.clock_skew:
            words = "ahead of" if off > 0 else "behind"
            faults[host].append(f"its clock is {abs(off):.1f} s {words} {measure}'s (have its time service seen to)")


def skew(facts: Facts) -> float:
    """Seconds that a node's clock is ahead of the coordinator's (negative: behind), at the least.

    The node heard the question after it was asked and said its answer before that came in. So what messages and the look
    itself took, on a busy node many seconds, is never taken for a clock that is off.
    """
    return float(max(0.0, facts["said"] - facts["answered"]) + min(0.0, facts["heard"] - facts["asked"]))


def _most_agreed(values: Mapping[str, T], agree: Callable[[T, T], bool]) -> str:
    """The host whose value most others agree with; of several such, the first."""
    return max(values, key=lambda host: sum(agree(values[host], other) for other in values.values()))


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _least(size: int) -> str:
    return f"{_mib(size)} are the least: free some"
