"""Questions to SLURM about the states of jobs: squeue, then sacct for jobs that squeue does not list."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence

from launcher.backends.slurm import query, shell
from launcher.errors import BadRequest
from launcher.lifecycle.trust import SLURM_ID, check_id
from launcher.request.spec import State

STATES: dict[str, State] = {
    **dict.fromkeys(
        ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
        State.QUEUED,
    ),
    **dict.fromkeys(
        ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"), State.RUNNING
    ),
    **dict.fromkeys(
        [
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
            "REVOKED",
            "TIMEOUT",
        ],
        State.LOST,
    ),
}
"""SLURM's job states. Source: "JOB STATE CODES" of squeue(1). Any other state is UNKNOWN."""

MOST_NAMED = 1000
"""Jobs that one command names; its arguments have a limit."""


def identity() -> str:
    """Return the path of squeue and the variables by which it finds its cluster."""
    return ":".join([shutil.which("squeue") or "", *(os.environ.get(name, "") for name in shell.KEPT[:2])])


def poll_all(job_ids: Sequence[str]) -> dict[str, State]:
    """Return the states of the jobs `job_ids`, and of all jobs of this user; UNKNOWN if SLURM does not answer.

    One question gives all jobs of this user, and slurmctld sends no others. Jobs that are missing there, such as ended
    ones or those of other users, are named in a second one; those that it does not list, in one to the accounting.
    Without accounting such a job is LOST.

    Raises:
        BadRequest: an id has not the form of SLURM's.
    """
    for job_id in job_ids:
        check_id(SLURM_ID, job_id)
    try:
        found = _listed("--me")
        if missing := [job_id for job_id in job_ids if job_id not in found]:
            found |= _named(missing)
    except BadRequest:
        return dict.fromkeys(job_ids, State.UNKNOWN)  # the controller does not answer
    if missing := [job_id for job_id in job_ids if job_id not in found]:
        found |= dict.fromkeys(missing, State.LOST) | _accounted(missing)
    return found


def _listed(which: str) -> dict[str, State]:
    lines = query.ask("squeue", "--noheader", "--states=all", "--array", which, "--format=%i %T").splitlines()
    return _states(line.partition(" ") for line in lines)


def _named(job_ids: Sequence[str]) -> dict[str, State]:
    found: dict[str, State] = {}
    for start in range(0, len(job_ids), MOST_NAMED):
        try:
            found |= _listed(f"--jobs={','.join(job_ids[start : start + MOST_NAMED])}")
        except query.Unreachable:
            raise
        except BadRequest as error:
            if "Invalid job id" not in str(error):
                raise
    return found


def _accounted(job_ids: Sequence[str]) -> dict[str, State]:
    """The states in the accounting; none without it."""
    options = ("--noheader", "--allocations", "--parsable2", "--format=JobID,State")
    found: dict[str, State] = {}
    for start in range(0, len(job_ids), MOST_NAMED):
        named = job_ids[start : start + MOST_NAMED]
        try:
            lines = query.ask("sacct", *options, f"--jobs={','.join(named)}").splitlines()
        except BadRequest:
            continue
        accounted = _states(line.partition("|") for line in lines)
        found |= {job_id: accounted[job_id] for job_id in named if job_id in accounted}
    return found


def _states(fields: Iterable[tuple[str, str, str]]) -> dict[str, State]:
    """The states in lines of a job and its state; "CANCELLED by 1000" is one state."""
    return {job.strip(): _state(state) for job, _, state in fields if job.strip()}


def _state(text: str) -> State:
    words = text.split()
    return STATES.get(words[0].rstrip("+"), State.UNKNOWN) if words else State.LOST
