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
    if not slurm.node_setup and not slurm.scratch:
        return words
    # One eval per line, so that a comment or an open quote ends with its line.
    steps = [f"eval {shlex.quote(line)} || fail {shlex.quote(line)}" for line in slurm.node_setup]
    if slurm.scratch:
        # The shell remains, to remove the folder. It ignores the signals that are meant for the agent (stop, save).
        steps += [
            f'export TMPDIR="{slurm.scratch}"',
            'mkdir -p "$TMPDIR" || fail "mkdir $TMPDIR"',
            "trap : HUP INT TERM USR1 USR2 CONT",
            '"$@"',
            "status=$?",
            'rm -rf -- "$TMPDIR"',
            "exit $status",
        ]
    else:
        steps.append('exec "$@"')
    fail = 'fail() { echo "launch: on $SLURMD_NODENAME, before the ranks: $1 failed" >&2; exit 1; }'
    return f"sh -c {shlex.quote('; '.join([fail, *steps]))} launch {words}"


def check_setup(plan: Plan) -> None:
    """Have the shells parse the profile's setup lines; they are not run.

    Raises:
        BadRequest: one of them cannot be parsed, such as a line with an open quote.
    """
    slurm = plan.cluster.slurm
    texts = [("setup", "bash", "\n".join(slurm.setup))] if slurm.setup else []
    for name, shell, text in [*texts, *(("node_setup", "sh", line) for line in slurm.node_setup)]:
        with suppress(OSError):  # without the shell, the nodes report it
            done = subprocess.run(["env", shell, "-n", "-c", text], capture_output=True, text=True, check=False)
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


def mounts(plan: Plan, container: Container) -> Sequence[str]:
    """The container's mounts, including the runs folder."""
    inside = [Path(mount.split(":")[1 if ":/" in mount else 0]) for mount in container.mounts]
    runs = plan.run_dir.parent
    return container.mounts if {runs, *runs.parents} & set(inside) else (*container.mounts, str(runs))
