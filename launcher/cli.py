"""The command line: argv -> RunSpec; prints; the only place that exits."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from launcher import living
from launcher.errors import OURS, BadRequest, exit_status, nearest
from launcher.options import COMMANDS, SHOW_PARSER, Once, Parser, ShownParser, add_json, add_options, command, given
from launcher.spec import NOT_RESUMED, RunSpec, State
from launcher.version import Version

DESCRIPTION = """\
Send one train/eval function, or a script, to where the accelerators are.

  launch                                             a small BERT on bundled data, here and offline, in a minute
  launch --backend slurm --gpus 8                    the same on SLURM
  launch --backend ray --gpus 8                      the same on Ray
  launch --gpus 2 train.py --lr 3e-5                 a script written for torchrun or accelerate, unchanged
  launch mypackage.train:main --epochs 5             a function; the fields of its config dataclass are flags
  launch -- --model bert-base-uncased --dataset glue/mrpc      arguments of the default target follow --
"""

EPILOG = (
    """\
commands (launch COMMAND --help tells more):
"""
    + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    + """

exit status: 0 succeeded; 1 the run failed; 2 the request was wrong and nothing was sent; 3 stopped before the end,
and `launch resume` goes on
"""
)


def launch_parser() -> Parser:
    """The options of ``launch`` itself; the target and what follows it are split off before."""
    parser = Parser(
        prog="launch",
        usage="launch [OPTIONS] [TARGET] [ARGS]...",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    more = add_options(parser)["how"]
    more.add_argument("--dry-run", action="store_true", help="print all that would be sent, and send nothing")
    more.add_argument("--detach", action="store_true", help="return once it is submitted")
    add_json(more)  # type: ignore[arg-type]
    more.add_argument("--version", action=Version, help="print the versions of launch, Python and the engines")
    more.add_argument("-m", dest="module", action=Once, metavar="MODULE", help="run a module as a script")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="TARGET [ARGS]", help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command. Exits with the status that `launch --help` documents."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _COMMANDS[argv[0]](argv[1:]) if argv and argv[0] in COMMANDS else run_launch(argv)
    except OURS as error:
        status = _complain(error, exit_status(error), argv)
    except BrokenPipeError:
        # `launch logs | head`: nobody reads any more. Point stdout elsewhere, or its last flush would complain too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 0
    sys.exit(status)


def _complain(error: Exception, status: int, argv: Sequence[str]) -> int:
    kind = {1: "failed", 2: "bad request", 3: "stopped"}[status]
    if argv[:1] and argv[0] not in COMMANDS:
        with suppress(BadRequest):  # --json after the target is the target's own
            argv, _, _ = _split(launch_parser(), argv)
    text = re.sub(r"\S{500,}", lambda long: f"{long[0][:100]}...{long[0][-50:]}", str(error))
    if "--json" in argv:
        print(json.dumps({"error": text, "kind": kind}))
    else:
        print(f"launch: {text}", file=sys.stderr)
    return status


# ---- launch and resume ----------------------------------------------------------------------------------------------


def parse_request(argv: Sequence[str]) -> tuple[RunSpec, argparse.Namespace]:
    """Split argv into our options, the target, and the target's arguments.

    Raises:
        BadRequest: an unknown option, an option given twice, or a value of the wrong kind.
    """
    parser = launch_parser()
    options, rest, separated = _split(parser, argv)
    parsed = parser.parse_args(options)
    if parsed.module is not None:
        target = f"-m {parsed.module}"
    elif rest and not separated:
        target, rest = rest[0], rest[1:]
        if rest[:1] == ["--"]:
            rest = rest[1:]
    else:
        target = RunSpec.target
    return RunSpec(target, tuple(rest), **given(parsed)), parsed


def _split(parser: Parser, argv: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Return our options, what follows them, and whether ``--`` stood between."""
    takes_value = {s: a.nargs != 0 for a in parser._actions for s in a.option_strings}
    index = 0
    while index < len(argv):
        word = argv[index]
        if word == "--":
            return list(argv[:index]), list(argv[index + 1 :]), True
        if not word.startswith("-") or word == "-":
            return list(argv[:index]), list(argv[index:]), False
        name = word.split("=", 1)[0]
        if name not in takes_value:
            raise BadRequest(
                f"unknown option {name}{nearest(name, takes_value)}. `launch --help` lists them; options of the target"
                " come after it (or after -- where the target is left out)."
            )
        index += 2 if takes_value[name] and "=" not in word else 1
        if name == "-m":
            return list(argv[:index]), list(argv[index:]), True
    return list(argv), [], False


def run_launch(argv: Sequence[str]) -> int:
    """``launch [OPTIONS] [TARGET] [ARGS]...``."""
    if argv and argv[0] in ("-h", "--help"):
        launch_parser().print_help()
        return 0
    spec, options = parse_request(argv)
    if spec.args and spec.args[0] in ("-h", "--help") and ":" in spec.target:
        return target_help(spec)
    from launcher import backends
    from launcher.api import submit
    from launcher.plan import make_plan
    from launcher.records import to_data

    plan = make_plan(spec, Path.cwd())
    if options.dry_run:
        sent = backends.of(plan.cluster).render(plan)
        if options.json:
            print(json.dumps({"plan": to_data(plan), "sent": sent}, indent=2))
        else:
            print(describe(plan) + describe_ranks(plan) + "\n" + sent, end="")
        return 0
    if not (options.json or options.detach):
        print(describe(plan), flush=True)
    return _attend(submit(plan), options)


def run_resume(argv: Sequence[str]) -> int:
    """``launch resume RUN``."""
    parser = command(
        "resume", "With the code and arguments it was sent with; what is given here replaces its placement."
    )
    add_options(parser, NOT_RESUMED)
    parser.add_argument("--detach", action="store_true", help="return once it is submitted")
    options = parser.parse_args(list(argv))
    from launcher.api import resubmit
    from launcher.run import find

    return _attend(resubmit(find(options.run, Path(options.runs)), **given(options)), options)


def run_completion(argv: Sequence[str]) -> int:
    """``launch completion SHELL``."""
    from launcher.completion import SHELLS

    how = "`source <(launch completion bash)` in ~/.bashrc turns it on; `launch completion fish | source` in fish."
    parser = Parser(prog="launch completion", description=f"Print a completion script. {how}")
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    add_json(parser)
    options = parser.parse_args(list(argv))
    text = SHELLS[options.shell](parsers(), COMMANDS)
    print(json.dumps({"shell": options.shell, "script": text}) if options.json else text, end="\n" * options.json)
    return 0


def parsers() -> dict[str, Parser]:
    """Return the parser of each command, none of which is run; the empty name stands for ``launch`` itself."""
    found = {"": launch_parser()}
    for name, run in _COMMANDS.items():
        try:
            run([SHOW_PARSER])
        except ShownParser as shown:
            found[name] = shown.parser
    return found


def _attend(run: Any, options: argparse.Namespace) -> int:
    """Follow a run to its end, unless asked not to; report it; return the exit status."""
    if options.detach:
        print(json.dumps(run.status()) if options.json else f"{run.name}\nlaunch status {run.name} shows how it goes")
        return 0
    state = _follow(run, sys.stderr if options.json else sys.stdout)
    if state is None:
        return State.STOPPED.exit_status
    _drop_refused(run)
    if options.json:
        print(json.dumps(run.status()))
    else:
        print(summary(run))
    return state.exit_status


def _follow(run: Any, out: Any) -> State | None:
    """Follow; None when a cluster run was left to itself by Ctrl-C.

    Here, the first Ctrl-C asks for a checkpoint and the second ends at once; on a cluster it only stops watching.
    """
    from launcher import backends
    from launcher.view import Follower

    follower = Follower(run, out)
    try:
        return follower.follow()
    except KeyboardInterrupt:
        if not backends.of(run.dir.plan().cluster).capabilities.interrupt_stops:
            print(
                f"\nlaunch: no longer watching; {run.name} goes on. Come back with `launch logs -f {run.name}`, see"
                f" `launch status {run.name}`, end it with `launch cancel {run.name}`.",
                file=sys.stderr,
            )
            return None
    print(f"\nlaunch: {_how_it_stops(run)}; Ctrl-C again ends at once", file=sys.stderr)
    run.dir.request_stop("Ctrl-C")
    try:
        return follower.follow()
    except KeyboardInterrupt:
        killed: State = run.kill()
        return killed


def _how_it_stops(run: Any) -> str:
    """What a request to stop does to a run: only a program with a Context, which logs its steps, stops at a step."""
    plan = run.dir.plan()
    if run.dir.metrics_file.exists():
        return "stopping at the next step, with a checkpoint if the program saves one"
    return (
        f"stopping: SIGTERM goes to every rank, {plan.cluster.grace:g} seconds before those that still run are killed"
    )


def _drop_refused(run: Any) -> None:
    """A run whose target refused its input at the start leaves nothing: it counts as never sent.

    Raises:
        BadRequest: with the target's words.
    """
    failure = (run.dir.result() or {}).get("failure")
    if failure and failure["kind"] == "bad request" and run.dir.last_attempt() <= 1 and not run.dir.metrics():
        import shutil

        shutil.rmtree(run.path, ignore_errors=True)
        raise BadRequest(failure["message"])


def describe(plan: Any) -> str:
    """The plan in a few lines for a person."""
    from launcher import backends

    limited = backends.of(plan.cluster).capabilities.time_limit
    where = plan.backend if plan.cluster.name == plan.backend else f"{plan.backend} ({plan.cluster.name})"
    arguments = " ".join(plan.target.args)
    return (
        f"launch: {plan.spec.target} {arguments}".rstrip()
        + f"\n  on     {where}: {plan.placement.why}"
        + f"\n  run    {_short(plan.run_dir)}"
        + (f"\n  limit  {plan.time_minutes} min" if limited else "")
        + (f"\n  start  {plan.start}" if plan.start else "")
    )


def describe_ranks(plan: Any) -> str:
    """What every rank gets besides: the part of a plan that only a dry run shows."""
    code = f"\n  code   {plan.target.path[0]}, a copy of the project as it is" if plan.target.path else ""
    return code + "".join(f"\n  env    {name}={value}" for name, value in plan.environment.items())


def summary(run: Any) -> str:
    """The end of a run: its result or its failure, and where to look."""
    state, result = run.state(), run.dir.result() or {}
    if state is State.SUCCEEDED:
        metrics = {k: v for k, v in result.get("metrics", {}).items() if isinstance(v, int | float | str)}
        shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        lines = [f"launch: succeeded in {result['seconds']:.1f} s", *([f"  {shown}"] if shown else [])]
    elif state is State.STOPPED:
        lines = [f"launch: stopped before the end; {run.resumption()}"]
        if result.get("failure"):
            lines.append(f"  {run.explain(shown_rank=0)}")
    else:
        lines = [f"launch: failed: {run.explain(shown_rank=0)}"]
    return "\n".join(
        [*lines, f"  run in {_short(run.path)}", f"  look: launch status {run.name}, launch logs {run.name}"]
    )


def target_help(spec: RunSpec) -> int:
    """``launch module:function --help``: the flags of the function's config dataclass."""
    from launcher.resolve import resolve
    from launcher.target import load, signature
    from training.flags import usage

    resolve(spec.target, (), Path.cwd())
    sys.path.insert(0, str(Path.cwd()))
    takes_context, config = signature(load(spec.target))
    if config is not None:
        print(f"launch [OPTIONS] {spec.target} [ARGS]...\n\n{usage(config)}")
    else:
        print(f"{spec.target} takes {'a Context and reads its arguments itself' if takes_context else 'no arguments'}.")
    return 0


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "list": living.run_list,
    "status": living.run_status,
    "logs": living.run_logs,
    "cancel": living.run_cancel,
    "resume": run_resume,
    "clusters": living.run_clusters,
    "doctor": living.run_doctor,
    "completion": run_completion,
}
