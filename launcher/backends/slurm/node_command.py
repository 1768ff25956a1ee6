"""Command of srun on each node: Python with the site's setup, scratch folder and container."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher.config.cluster import Container
from launcher.config.profile_checks import JOB_ID
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest
from launcher.request.spec import Plan


def command(plan: Plan) -> str:
    """The Python command of a node as one shell line, which submitit puts into the script unchanged.

    Raises:
        BadRequest: the profile's ``python`` is not a valid command.
    """
    slurm = plan.cluster.slurm
    # Without -P the working directory, which is the user's, is first on sys.path of submitit's process.
    words = shlex.join([*python(plan), "-P"])
    if not slurm.node_setup and not slurm.scratch and plan.placement.nodes + plan.spec.spare_nodes == 1:
        return words  # if it cannot be started, the batch script, on the same node, reports it
    # One eval per line, so that a comment or an open quote ends with its line.
    steps = [f"eval {shlex.quote(line)} || fail {shlex.quote(line)}" for line in slurm.node_setup]
    steps.append('command -v "$1" > /dev/null || fail "starting $1"')
    if slurm.scratch:
        # The shell remains, to remove the folder. It ignores the signals that are meant for the agent (stop, save).
        steps += [
            *_own_scratch(slurm.scratch),
            'mkdir -p -- "$made" || fail "mkdir $made"',
            f'own || fail "scratch ({LEADS_ELSEWHERE})"',
            'export TMPDIR="$made"',
            "trap : HUP INT TERM USR1 USR2 CONT",
            '"$@"',
            "status=$?",
            # Looked at again, since a rank could write there.
            f'if own; then cd / && rm -rf -- "$place"; else echo "launch: scratch is not removed: {LEADS_ELSEWHERE}" >&2; fi',
            "exit $status",
        ]
    else:
        steps.append('exec "$@"')
    return f"sh -c {shlex.quote('; '.join([_fail(plan), *steps]))} launch {words}"


UNFIT = ".unfit"
"""End of the name of a file in which a node's shell leaves what failed there before the ranks."""

LEADS_ELSEWHERE = "$made leads to $place, which is not a folder of yours named after job $SLURM_JOB_ID"


def _fail(plan: Plan) -> str:
    """The function of the shell that ends a node's start: it says what failed, and leaves that for the rest of the job.

    Without the agent of node 0, for which the others would wait, the step ends; so does that of a Ray, which needs all nodes.
    """
    unless = "" if plan.cluster.ray.inside else '[ "$SLURM_NODEID" != 0 ] || '
    file = (
        f"{shlex.quote(f'{plan.run_dir}/submitit/')}$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}.$SLURMD_NODENAME{UNFIT}"
    )
    return (
        'fail() { status=$?; echo "launch: on $SLURMD_NODENAME, before the ranks: $1 failed" >&2;'
        f' {{ umask 077; echo "before the ranks: $1 failed with status $status" > {file}; }} 2> /dev/null;'
        f' {unless}scancel --signal=KILL "$SLURM_JOB_ID.$SLURM_STEP_ID" 2> /dev/null; exit 1; }}'
    )


def _own_scratch(scratch: str) -> list[str]:
    """Statements that set `made` to the folder, and a function that looks whether it may be removed after the job.

    That is so if it is this user's and neither `..` nor a link leads out of the part of the path that begins with the
    job's own name. `place` is then where it lies.
    """
    parts = scratch.split("/")
    first = next(number for number, part in enumerate(parts) if JOB_ID.search(part))
    above, below = "/".join(parts[:first]) or "/", "/".join(part for part in parts[first:] if part not in ("", "."))
    return [
        f'above="{above}" below="{below}" made="{scratch}"',
        'case "/$below/" in */../*) false;; esac || fail "scratch $made: a path without .."',
        OWN,
    ]


OWN = (
    'own() { place=$(cd -P -- "$made" && pwd -P) && root=$(cd -P -- "$above" && pwd -P)'
    ' && [ "$place" = "${root%/}/${below%/}" ] && [ -O "$place" ]; }'
)


def check_setup(plan: Plan) -> None:
    """Have the shells parse the profile's setup lines; they are not run.

    Raises:
        BadRequest: one of them cannot be parsed, such as a line with an open quote.
    """
    slurm = plan.cluster.slurm
    texts = [("setup", "bash", "\n".join(slurm.setup))] if slurm.setup else []
    for name, shell, text in [*texts, *(("node_setup", "sh", line) for line in slurm.node_setup)]:
        with suppress(OSError):  # without the shell, the nodes report it
            done = subprocess.run(
                ["env", shell, "-n", "-c", text], capture_output=True, encoding="utf-8", errors="replace", check=False
            )
            if done.returncode:
                reason = re.sub(r"^\w+: (-c: )?(line )?\d+: ", "", done.stderr.strip().partition("\n")[0])
                raise BadRequest(
                    f"slurm.{name} in profile {plan.cluster.name!r}: {text!r} is not a shell line: {reason}."
                )


def python(plan: Plan) -> list[str]:
    """The words that start Python on a node, in the container unless srun starts that (pyxis)."""
    container = plan.cluster.slurm.container
    try:
        words = [os.path.expanduser(os.path.expandvars(word)) for word in shlex.split(plan.cluster.python or "")]
    except ValueError as error:
        raise BadRequest(f"python = {plan.cluster.python!r} in the cluster's profile: {error}.") from None
    words = words or ([sys.executable] if container is None else ["python3"])
    if container is None or container.runtime == "pyxis":
        return words
    gpus = ["--nv"] if plan.placement.device == "cuda" else []
    binds = [word for mount in mounts(plan, container) for word in ("--bind", mount)]
    return [container.runtime, "exec", *gpus, *binds, *container.options, container.image, *words]


def srun_args(plan: Plan) -> list[str]:
    """The arguments of srun: those needed on every site, then those of the profile."""
    slurm = plan.cluster.slurm
    # The agent assigns the node's GPUs to ranks; a site's default binding could give it one GPU.
    words = ["--gpu-bind=none"] if plan.placement.device == "cuda" else []
    # srun does not take it from the job, and a site's default binding (autobind) would give all ranks one core.
    if cpus := cpus_per_node(plan):
        words.append(f"--cpus-per-task={cpus}")
    # The agents handle the loss of one of them; srun must not end the others, whatever the site's default is.
    words.append("--kill-on-bad-exit=0")
    spare = bool(plan.spec.spare_nodes)
    words += [f"--wait={0 if spare or plan.cluster.ray.inside else TIMEOUTS.srun_wait}", *["--no-kill"] * spare]
    container = slurm.container
    if container is not None and container.runtime == "pyxis":
        pairs = [mount if ":/" in mount else f"{mount}:{mount}" for mount in mounts(plan, container)]
        words += [f"--container-image={container.image}", f"--container-mounts={','.join(pairs)}"]
        words += container.options
    return [*words, *slurm.srun_args]


def cpus_per_node(plan: Plan) -> int:
    """The CPU cores of a node's task, which are those of its ranks; 0: not known."""
    return plan.placement.cpus_per_rank * plan.placement.ranks_per_node


def mounts(plan: Plan, container: Container) -> Sequence[str]:
    """The container's mounts, including the runs folder."""
    inside = [Path(mount.split(":")[1 if ":/" in mount else 0]) for mount in container.mounts]
    runs = plan.run_dir.parent
    return container.mounts if {runs, *runs.parents} & set(inside) else (*container.mounts, str(runs))
