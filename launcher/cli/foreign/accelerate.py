"""``accelerate launch`` and its configuration file: accelerate itself says what its options mean.

Its parser is asked in a process of its own, since it imports torch. A line with the few options of `ACCELERATE`, and without a
configuration file, is translated from that table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.cli.foreign.accelerate_config import default_file
from launcher.cli.foreign.options import Translation
from launcher.errors import BadRequest

OF_RANKS = frozenset(
    (
        *(
            "MASTER_ADDR",
            "MASTER_PORT",
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "NODE_RANK",
            "GROUP_RANK",
        ),
        *("PYTHONPATH", "PATH", "ACCELERATE_USE_CPU"),
    )
)
"""Variables that accelerate sets and that `launch` sets by itself; ACCELERATE_USE_CPU follows from the kind of device."""


@dataclass(frozen=True)
class Line:
    """What accelerate makes of a line.

    Attributes:
        environment: the variables that it would set for the program, without those of the ranks.
        processes, machines: numbers that the line or the file says; None: neither.
        cpu: the ranks use no GPU.
        program: the script or ``-m`` and a module, and its arguments.
        file: the configuration file that was read; empty without one.
    """

    environment: dict[str, str]
    processes: int | None
    machines: int | None
    cpu: bool
    program: list[str]
    file: str


def needs_accelerate(words: Sequence[str]) -> bool:
    """Whether a line needs accelerate itself: it names a configuration file, or there is the default one."""
    named = any(word.partition("=")[0] in ("--config_file", "--config-file") for word in words)
    return named or default_file().is_file()


def translate_line(words: Sequence[str], done: Translation) -> list[str]:
    """Translate the words behind ``accelerate launch``; return the program with its arguments.

    Raises:
        BadRequest: accelerate refuses the line, or it asks for what has no place here.
    """
    line = ask(words)
    for name, value in line.environment.items():
        done.words += ["--set", f"environment.{name}={value}"]
    if line.machines is not None and line.machines > 1 and "--nodes" not in done.words:
        done.words += ["--nodes", str(line.machines)]
    counted = ("--gpus", "--cpus", "--tpus", "--ranks", "--ranks-per-node", "--gpus-per-node")
    if line.processes is not None and not any(word in counted for word in done.words):
        done.words += ["--cpus" if line.cpu else "--ranks", str(line.processes)]
    if line.file:
        done.notes.append(f"{line.file} is read, as accelerate does; the addresses in it are not used")
    return line.program


def ask(words: Sequence[str]) -> Line:
    """Ask accelerate what the words behind ``accelerate launch`` mean.

    Raises:
        BadRequest: with accelerate's own words.
    """
    command = [sys.executable, "-m", "launcher.cli.foreign.accelerate"]
    # The folder of the user's program must not hide a library.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, input=json.dumps(list(words)), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise BadRequest(f"accelerate launch: {said[-1] if said else 'it ended without a word'}")
    return Line(**json.loads(done.stdout))


def main() -> None:
    """Parse the words on standard input as ``accelerate launch`` does; print a `Line` as JSON."""
    from accelerate.commands import launch as command
    from accelerate.utils import launch as prepare

    words = json.load(sys.stdin)
    output, sys.stdout = sys.stdout, sys.stderr
    args = command.launch_command_parser().parse_args(words)
    asked = {name: getattr(args, name) for name in ("num_processes", "num_machines")}
    args, defaults, from_config = command._validate_launch_command(args)
    found: dict[str, Any] = {name: asked[name] or getattr(defaults, name, None) for name in asked}
    cpu = bool(args.cpu or args.use_cpu)
    if args.tpu or args.no_python:
        raise SystemExit("--tpu and --no_python have no place here; write `launch --tpus N train.py`")
    # Where the ranks meet is the launcher's, and accelerate would look for a free port.
    args.num_machines, args.main_process_ip, args.main_process_port = 1, None, 0
    args.same_network = True
    if args.use_deepspeed and not cpu:
        fields = list(defaults.deepspeed_config) if defaults else []
        args.deepspeed_fields_from_accelerate_config = ",".join(fields + ["mixed_precision"] * from_config)
        _, environment = prepare.prepare_deepspeed_cmd_env(args)
    elif (args.use_fsdp or args.use_megatron_lm or args.multi_gpu) and not cpu:
        environment = prepare.prepare_multi_gpu_env(args)
    else:
        _, environment = prepare.prepare_simple_launcher_cmd_env(args)
    changed = {k: v for k, v in environment.items() if os.environ.get(k) != v and k not in OF_RANKS}
    program = [*(["-m"] if args.module else []), args.training_script, *args.training_script_args]
    file = str(args.config_file or default_file()) if defaults is not None else ""
    json.dump(
        {
            "environment": changed,
            "processes": found["num_processes"],
            "machines": found["num_machines"],
            "cpu": cpu,
            "program": program,
            "file": file,
        },
        output,
    )


if __name__ == "__main__":
    main()
