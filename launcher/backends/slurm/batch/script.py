"""The lines of the batch script around srun: modules and setup lines before it, recovery and the end of the job after it."""

from __future__ import annotations

import json
import shlex
from typing import Any

from launcher.backends.slurm import node_command, shell
from launcher.lifecycle import history
from launcher.lifecycle.run_dir import RunDir
from launcher.request import own_packages
from launcher.request.spec import Plan, State

KIND = "unfit node"
"""The kind of failure of a job that ends before its ranks (`launcher.lifecycle.policy.RULES`)."""

HINT = (
    "Correct `setup`, `modules` or `python` in the profile, then `launch resume`; a setup line that may fail ends in"
    " `|| true`. The job's own output is in the folder submitit of the run directory."
)

_ON_EXIT = """trap 'launch_failed $? "$BASH_COMMAND"' EXIT"""
_ON_ERROR = (
    # The command may be one inside of a function, such as `module`; LINENO is that of the script.
    "trap 'launch_status=$?; [ ${#BASH_SOURCE[@]} -gt 1 ]"
    """ || launch_failed $launch_status "$(sed -n "${LINENO}p" "$0" || echo "$BASH_COMMAND")"' ERR"""
)
TRAPS = (_ON_EXIT, _ON_ERROR, "trap launch_ended TERM")
"""A line fails as under `set -e`, but not inside of a file that it sources, whose own status counts."""

NO_TRAPS = "for trap in EXIT ERR TERM; do [[ $(trap -p $trap) != *launch_* ]] || trap - $trap; done; set +eu"
"""Traps of the profile's own stay; its `set -e` would end the script at a failure of srun."""


def before(plan: Plan) -> list[str]:
    """Return the lines before srun. A user signal is for the agents: a script that died of it would end the job."""
    slurm = plan.cluster.slurm
    modules = [f"module load {' '.join(map(shlex.quote, slurm.modules))}"] if slurm.modules else []
    lines = [*modules, *slurm.setup]
    return [
        shell.script_line(),
        "trap '' USR1 USR2",
        *_record(plan),
        *([*TRAPS, *lines, NO_TRAPS] if lines else []),
        # Agents of other nodes see by this file that the script runs (`launcher.backends.slurm.job.survive`).
        '(umask 077; while kill -0 $$; do touch "$launch_files.batch"; sleep 1; done) > /dev/null 2>&1 & launch_beat=$!',
    ]


def after(plan: Plan) -> list[str]:
    """Return the lines after srun: recover from a killed supervisor, and exit with the status of the run.

    If the slurmstepd of the script was killed, SLURM does not notice the exit of the script, so the script cancels its job.
    """
    python = shlex.join(node_command.python(plan))
    submission = max(1, history.submissions(RunDir(plan.run_dir).events()))  # a plan that is only shown: the first
    look = f"{python} -P -m launcher.backends.slurm.job {shlex.quote(str(plan.run_dir))} $status {submission}"
    if (clean := own_packages.python_path_without_others()) is not None:
        look = f"PYTHONPATH={shlex.quote(clean)} {look}"
    # From this shell's own entry in /proc, since other entries may be hidden.
    parent = "$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$$/status)"
    orphaned = f'[ "{parent}" = $PPID ] || scancel --state=RUNNING $SLURM_JOB_ID'
    container = plan.cluster.slurm.container
    # Under pyxis the Python of the ranks is in a container that srun alone can start.
    last = "" if container is not None and container.runtime == "pyxis" else f" || {NO_PYTHON}"
    return [
        "status=$?",
        "kill $launch_beat 2> /dev/null",
        f"[ $status = 0 ] || launch_answer=$({look}) || status=$?",
        f'[ $status = 0 ] || [ -n "$launch_answer" ]{last or " || :"}',
        REQUEUE,
        orphaned,
        "exit $status",
    ]


NO_PYTHON = 'launch_record "Python could not be started on $SLURMD_NODENAME: $(tail -n 1 "$launch_log" | LC_ALL=C tr -cd "\\40-\\176")"'

REQUEUE = (
    # Containers have no scontrol, so an agent in one leaves the request to this script, with the hosts to exclude.
    """[ ! -e "$launch_files.requeue" ] || { trap '' TERM; scontrol requeue $SLURM_JOB_ID; } &&"""
    ' { [ ! -s "$launch_files.requeue" ] || scontrol update JobId=$SLURM_JOB_ID ExcNodeList="$(cat "$launch_files.requeue")"; }'
    ' || launch_record "scontrol did not requeue job $SLURM_JOB_ID on $SLURMD_NODENAME"'
)


def _record(plan: Plan) -> list[str]:
    """The shell functions that record a failure of kind `KIND`. They do without Python, which may be what is missing."""
    run_dir = RunDir(plan.run_dir)
    failure = {"kind": KIND, "message": MESSAGE, "rank": None, "host": NODE}
    result: dict[str, Any] = {
        "state": State.FAILED.value,
        "time": TIME,
        "metrics": {},
        "steps": None,
        "attempts": ATTEMPTS,
        "seconds": 0,
        "world_size": plan.placement.world_size,
        "failure": {**failure, "advice": HINT, "traceback": "", "log": []},
    }
    failed = {"time": TIME, "event": "failed", "attempt": ATTEMPTS, "step": None, **failure}
    finished = {"time": TIME, "event": "finished", "attempt": ATTEMPTS, "state": State.FAILED.value}
    folder = shlex.quote(str(run_dir.path / "submitit"))
    logs, temporary = shlex.quote(str(run_dir.logs)), shlex.quote(str(run_dir.path / ".result.json.tmp"))
    target, events = shlex.quote(str(run_dir.result_file)), shlex.quote(str(run_dir.events_file))
    return [
        f"launch_files={folder}/$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}} launch_log={folder}/${{SLURM_JOB_ID}}_0_log.err",
        "launch_record() {",
        "    local text=$(printf %s \"$1\" | LC_ALL=C tr -d '\\0-\\37\\177') now=$(date +%s)",
        f"    local attempts=$(ls {logs} 2> /dev/null | grep -c '^[0-9]*$')",
        '    echo "launch: $text" >&2',
        '    text=${text//\\\\/\\\\\\\\} text=${text//\\"/\\\\\\"}',
        f"    [ ! -e {target} ] && [ ! -e {shlex.quote(str(run_dir.stop_file))} ] || return 0",
        f"    (umask 077; echo {_shell(result)} > {temporary} && mv {temporary} {target}",
        f"    echo {_shell(failed)} >> {events}; echo {_shell(finished)} >> {events})",
        "}",
        "launch_ended() { trap - EXIT ERR; exit 143; }",  # cancelled, or requeued by SLURM
        'launch_failed() { trap - EXIT ERR; launch_record "slurm.setup: $2 failed with status $1 on $SLURMD_NODENAME"; exit 1; }',
    ]


MESSAGE, NODE, TIME, ATTEMPTS = "@message@", "@node@", "@time@", "@attempts@"


def _shell(record: dict[str, Any]) -> str:
    """The word of a shell that is `record` as JSON, with the values of the function's variables."""
    word = shlex.quote(json.dumps(record))
    values = {MESSAGE: "$text", NODE: "$SLURMD_NODENAME"}
    for name, value in values.items():
        word = word.replace(name, f"'\"{value}\"'")
    for name, value in {TIME: "$now", ATTEMPTS: "$attempts"}.items():
        word = word.replace(f'"{name}"', f"'\"{value}\"'")
    return word
