"""Living with runs: the commands that look at runs and at clusters, from any shell."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import BadRequest, LaunchError
from launcher.options import Once, Parser, add_json, command, whole
from launcher.spec import State, refuse_empty

if TYPE_CHECKING:
    from launcher.config_check import Check
    from launcher.run import Run


def run_list(argv: Sequence[str]) -> int:
    """``launch list``."""
    options = command("list", run=False).parse_args(list(argv))
    from launcher.run import runs

    found = runs(options.runs)
    if options.json:
        print(json.dumps([_listed(run) for run in found]))
        return 0
    if not found:
        print(f"no runs in {options.runs}")
    for run in found:
        status = _listed(run)
        if "error" in status:
            print(f"{run.name:<32} unreadable: {status['error']}")
            continue
        progress = status["progress"]
        step = f"{progress['step']}/{progress['total_steps']}" if "total_steps" in progress else ""
        shown = "  ".join(f"{k} {v:.4f}" for k, v in status["evaluation"].items() if isinstance(v, float))
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.dir.plan_file.lstat().st_mtime))
        print(f"{run.name:<32} {status['state']:<10} {status['backend']:<6} {started}  {step:<12} {shown}".rstrip())
    return 0


def _listed(run: Run) -> dict[str, Any]:
    """Its status; a run that cannot be read does not hide the others."""
    try:
        return run.status()
    except LaunchError as error:
        return {"name": run.name, "state": State.UNKNOWN.value, "error": str(error)}


def run_status(argv: Sequence[str]) -> int:
    """``launch status RUN``."""
    options = command("status").parse_args(list(argv))
    from launcher.run import find

    run = find(options.run, Path(options.runs))
    status = run.status()
    if options.json:
        print(json.dumps(status))
        return 0
    placement = status["placement"]
    print(f"{run.name}: {status['state']}")
    print(f"  target      {status['target']}")
    print(f"  on          {status['backend']} ({status['cluster']}), job {status['job_id']}: {placement['why']}")
    if commit := status["code"].get("commit"):
        print(f"  code        {commit[:12]}{' and uncommitted changes' if status['code'].get('dirty') else ''}")
    print(f"  attempt     {status['attempt']}{_setbacks(status['setbacks'])}")
    if status["excluded_nodes"]:
        print(f"  nodes       stays away from {', '.join(status['excluded_nodes'])}, which failed it")
    for title in ("progress", "evaluation", "metrics"):
        if status[title]:
            print(
                f"  {title:<11} "
                + "  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in status[title].items())
            )
    print(f"  run dir     {status['run_dir']}")
    if status["state"] in ("failed", "lost"):
        print(run.explain())
    return 0


def _setbacks(setbacks: Sequence[Mapping[str, Any]]) -> str:
    """Why there were attempts before, in brackets."""
    told = [each["kind"] + (f" on {each['host']}" if each["host"] else "") for each in setbacks]
    return f" ({', '.join(told)} before)" if told else ""


def run_logs(argv: Sequence[str]) -> int:
    """``launch logs RUN``."""
    parser = command("logs")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    parser.add_argument("--rank", action=Once, type=whole, metavar="R", help="only this rank (default: all; 0 with -f)")
    parser.add_argument(
        "--attempt", action=Once, type=whole, metavar="N", help="an earlier attempt (default: the newest)"
    )
    options = parser.parse_args(list(argv))
    from launcher.run import find

    run = find(options.run, Path(options.runs))
    size = run.dir.plan().placement.world_size
    if options.rank is not None and not 0 <= options.rank < size:
        raise BadRequest(f"--rank {options.rank}: the ranks of {run.name} are 0 to {size - 1}.")
    if options.follow:
        from launcher.run import reading
        from launcher.view import follow

        try:
            with reading(run.path):
                follow(run, sys.stdout, options.rank or 0)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        return 0
    lines = run.logs(options.rank, options.attempt)
    if options.json:
        print(json.dumps(list(lines)))
        return 0
    for line in lines:
        print(line)
    return 0


def run_cancel(argv: Sequence[str]) -> int:
    """``launch cancel RUN``."""
    parser = command("cancel", "It ends by itself within the cluster's grace, or is killed.")
    parser.add_argument("--now", action="store_true", help="kill it without a checkpoint")
    options = parser.parse_args(list(argv))
    from launcher.run import find

    run = find(options.run, Path(options.runs))
    state = run.kill() if options.now else run.cancel()
    print(json.dumps({"name": run.name, "state": state.value}) if options.json else f"{run.name}: {state.value}")
    return 0


def run_clusters(argv: Sequence[str]) -> int:
    """``launch clusters`` and ``launch clusters new [NAME]``."""
    if argv[:1] == ["new"]:
        return _new_cluster(argv[1:])
    options = command("clusters", "`launch clusters new [NAME]` writes a first one.", run=False).parse_args(list(argv))
    from launcher import profiles

    rows = []
    for profile in profiles.profiles(Path.cwd()):
        try:
            site = profiles.load(profile.name, Path.cwd())
            backend, text = str(site.backend), site.description
        except BadRequest as error:
            backend, text = "?", f"unusable: {error}"
        rows.append(
            {
                "name": profile.name,
                "backend": backend,
                "where": profile.where,
                "path": str(profile.path),
                "description": text,
            }
        )
    if options.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(f"{row['name']:<24} {row['backend']:<6} {row['where']:<8} {row['description']}")
    print("\nlooked in: " + ", ".join(f"{folder} ({where})" for where, folder in profiles.folders(Path.cwd())))
    return 0


def _new_cluster(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="launch clusters new",
        description="Look at the SLURM or Ray at hand and write ./cluster_configs/NAME.toml.",
    )
    parser.add_argument("name", nargs="?", default="mine", metavar="NAME", help="of the profile (default: mine)")
    parser.add_argument("--backend", action=Once, metavar="NAME", help="slurm or ray (default: the one at hand)")
    add_json(parser)
    options = parser.parse_args(list(argv))
    from launcher.first_profile import create

    path = create(options.name, options.backend, Path.cwd())
    print(
        json.dumps({"name": options.name, "path": str(path)})
        if options.json
        else f"{path}: look at it, then use it with --cluster {options.name}"
    )
    return 0


def run_doctor(argv: Sequence[str]) -> int:
    """``launch doctor``."""
    parser = Parser(
        prog="launch doctor", description="Check this machine and an engine; exit status 1 if something is wrong."
    )
    parser.add_argument("--backend", action=Once, metavar="NAME", help="local (default), slurm or ray")
    parser.add_argument("--cluster", action=Once, metavar="NAME|PATH", help="a profile (see `launch clusters`)")
    nodes = parser.add_argument_group("on the nodes")
    nodes.add_argument("--on-nodes", action="store_true", help="send a short run that looks around there")
    nodes.add_argument("--nodes", action=Once, type=whole, metavar="N", help="on how many (default 2; 1 if local)")
    nodes.add_argument("--gpus", action=Once, type=whole, metavar="N", help="with so many GPUs in all (default: none)")
    nodes.add_argument("--accelerator", action=Once, metavar="TYPE", help="of this type")
    nodes.add_argument(
        "--wait", action=Once, type=whole, default=120, metavar="S", help="seconds for the nodes to find each other"
    )
    add_json(parser)
    options = parser.parse_args(list(argv))
    if not 0 <= options.wait <= 7 * 24 * 3600:
        raise BadRequest(f"--wait {options.wait}: seconds are needed, 0 to 604800 (7 days).")
    refuse_empty({"backend": options.backend, "cluster": options.cluster})
    from launcher import backends, profiles
    from launcher.doctor import examine
    from launcher.records import to_data

    site = profiles.choose(options.cluster, options.backend, Path.cwd())
    multi_node = backends.of(site).capabilities.multi_node
    checks = []
    for check in itertools.chain(examine(site, Path.cwd()), _on_nodes(options, multi_node)):
        checks.append(check)
        if not options.json:
            word = "FAIL" if not check.ok else "note" if check.note else "ok"
            print(f"{word:<4}  {check.name:<12} {check.found}", flush=True)
            if check.remedy and (not check.ok or check.note):
                print(f"      -> {check.remedy}")
    if options.json:
        print(json.dumps(to_data(checks)))
    return 0 if all(check.ok for check in checks) else 1


def _on_nodes(options: argparse.Namespace, multi_node: bool) -> Iterator[Check]:
    if not options.on_nodes:
        return
    from launcher.on_nodes import examine
    from launcher.spec import RunSpec

    nodes = (2 if multi_node else 1) if options.nodes is None else options.nodes
    spec = RunSpec(
        "launcher.probe:main",
        backend=options.backend,
        cluster=options.cluster,
        cpus=nodes if options.gpus is None else None,
        gpus=options.gpus,
        nodes=nodes,
        accelerator=options.accelerator,
        name=f"doctor-{time.strftime('%Y%m%d-%H%M%S')}",
        time="10m",
        max_restarts=0,
    )
    yield from examine(spec, Path.cwd(), options.wait, lambda text: print(f"      {text}", file=sys.stderr, flush=True))
