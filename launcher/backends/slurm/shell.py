"""SLURM's variables of the shell: what its commands see of them, and which of them a plan uses."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.config.cluster import Cluster
from launcher.config.durations import MAX_DAYS
from launcher.errors import BadRequest

KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_KEY", "SLURM_SACK_JWKS", "SLURM_SACK_SOCKET")
"""Variables with which SLURM's commands find the controller and authenticate."""

COMMANDS = ("SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_", "SCANCEL_")
"""Prefixes of variables that are options of SLURM's commands, many of which change their output."""

PREFIXES = ("SLURM_", "SLURMD_", "SPANK_", "_SLURM_SPANK_OPTION_", *COMMANDS)
"""Also those of the job that this process runs in; sbatch would pass them on to the new job, where srun obeys them."""

STEP_OPTIONS = (
    *("SLURM_BCAST", "SLURM_CLUSTERS", "SLURM_CPU_BIND", "SLURM_DEBUG", "SLURM_DEBUG_FLAGS", "SLURM_EPILOG"),
    *("SLURM_EXCLUSIVE", "SLURM_EXIT_ERROR", "SLURM_EXIT_IMMEDIATE", "SLURM_EXPORT_ENV", "SLURM_IMMEDIATE"),
    *("SLURM_KILL_BAD_EXIT", "SLURM_LABELIO", "SLURM_PROLOG", "SLURM_REMOTE_CWD", "SLURM_STDERRMODE"),
    *("SLURM_STDINMODE", "SLURM_STDOUTMODE", "SLURM_TEST_EXEC", "SLURM_TIMELIMIT", "SLURM_TIME_FORMAT"),
    *("SLURM_UNBUFFEREDIO", "SLURM_WAIT", "SLURM_WORKING_DIR"),
)
"""Options of srun that are not the job's, by "INPUT ENVIRONMENT VARIABLES" of srun(1), and the format of times."""

USED = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_CONSTRAINT": "constraint",
}
"""Variables that say where a job runs, each with its key in the section ``[slurm]`` of a profile."""

TIME_LIMIT = "SBATCH_TIMELIMIT"

CLUSTERS = ("SLURM_CLUSTERS", "SBATCH_CLUSTERS")


def environment(inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of every SLURM command, at the submission and inside a job.

    It is `inherited` (default: this process's) without the options and the output of SLURM's commands, except those that
    lead to the controller. sbatch passes it on to the job.
    """
    inherited = os.environ if inherited is None else inherited
    return {name: value for name, value in inherited.items() if name in KEPT or not name.startswith(PREFIXES)}


def hidden() -> list[str]:
    """Return the variables of this process that `environment` leaves out."""
    return sorted(set(os.environ) - set(environment()))


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a SLURM command with `environment`; `options` are those of `subprocess.run`. Its output is captured as text."""
    return subprocess.run(
        command, env=environment(), capture_output=True, encoding="utf-8", errors="replace", check=False, **options
    )


def script_line() -> str:
    """Return the line of a batch script that removes what a login shell may have set again (``--export``, ``--get-user-env``).

    It stands before the modules and the setup lines of the profile, whose variables count.
    """
    # The other SLURM_ variables describe the job, and srun needs them.
    options = " ".join(f"${{!{prefix}@}}" for prefix in COMMANDS)
    return f"unset {options} {' '.join(STEP_OPTIONS)}"


def from_shell(
    cluster: Cluster, time: str | None = None, inherited: Mapping[str, str] | None = None
) -> tuple[Cluster, tuple[str, ...]]:
    """Return `cluster` with the shell's values for options that the profile leaves open, and a line for each variable.

    Args:
        cluster: as its profile describes it.
        time: ``--time``, which counts more than the variable.
        inherited: variables; default: this process's.

    Raises:
        BadRequest: a value cannot be used.
    """
    inherited = os.environ if inherited is None else inherited
    given = {name: value for name, value in inherited.items() if value and name in (*USED, TIME_LIMIT)}
    chosen: dict[str, Any] = {}
    lines: list[str] = []
    for name, key in USED.items():
        own = getattr(cluster.slurm, key)
        if (value := given.get(name)) is None or value == own:
            continue
        if own is not None:
            lines.append(f"{name}={value[:100]!r} is not used: the profile has slurm.{key} = {own!r}")
            continue
        _check_value(name, value)
        chosen[key] = value
        lines.append(f"slurm.{key} = {value!r}, from {name}")
    if TIME_LIMIT in given:
        own = f"--time {time}" if time else f"time = {cluster.time!r} of the profile" if cluster.time else None
        if own is None:
            cluster = replace(cluster, time=_minutes(given[TIME_LIMIT]))
            lines.append(f"--time {cluster.time}, from {TIME_LIMIT}")
        else:
            lines.append(f"{TIME_LIMIT}={given[TIME_LIMIT][:100]!r} is not used: {own} counts")
    return replace(cluster, slurm=replace(cluster.slurm, **chosen)), (*lines, *_unused(inherited))


def _unused(inherited: Mapping[str, str]) -> list[str]:
    """The line about variables that sbatch would obey and that a run does not use; none without any."""
    options = [n for n in inherited if re.fullmatch(r"SBATCH_[A-Z0-9_]{1,40}", n) and n not in (*USED, TIME_LIMIT)]
    clusters = [name for name in CLUSTERS if inherited.get(name)]
    lines = [f"{name} is not used: the job is sent to the cluster of this host, or of SLURM_CONF" for name in clusters]
    if options := sorted(set(options) - set(clusters)):
        verb = "is" if len(options) == 1 else "are"
        lines.append(f"{', '.join(options)} {verb} not used: `slurm.sbatch` of a profile has such options")
    return lines


def _check_value(name: str, value: str) -> None:
    # As in a profile: the value is written on one line of the script.
    if not value.isprintable() or len(value) > 1000:
        raise BadRequest(
            f"{name}={value[:40]!r}: a name of at most 1000 printable characters is needed. Correct or unset the variable."
        )


def _minutes(text: str) -> str:
    """Convert a time limit of sbatch, such as ``90``, ``1:30:00`` or ``2-12``, to ``90m``."""
    match = re.fullmatch(r"(?:([0-9]{1,9})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?", text)
    total = 0
    if match is not None:
        days, *numbers = (None if group is None else int(group) for group in match.groups())
        parts = [number for number in numbers if number is not None]
        # One number is minutes, two are minutes and seconds; after days they begin with hours.
        hours, minutes, seconds = (*parts, 0, 0)[:3] if days is not None or len(parts) == 3 else (0, *parts, 0)[:3]
        total = (((days or 0) * 24 + (hours or 0)) * 60 + (minutes or 0)) * 60 + (seconds or 0)
    if not 0 < total <= MAX_DAYS * 24 * 60 * 60:
        raise BadRequest(
            f"{TIME_LIMIT}={text[:40]!r}: a time limit of sbatch is needed, at most {MAX_DAYS} days, such as 90, 1:30:00 or 1-12."
            " Correct or unset the variable, or give --time."
        )
    return f"{-(-total // 60)}m"
