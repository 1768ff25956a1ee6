"""``launch doctor``: check this machine, an engine and, on request, the nodes."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.parser import Once, Parser, add_json, whole
from launcher.errors import BadRequest
from launcher.request.spec import RunSpec, refuse_empty

if TYPE_CHECKING:
    from launcher.config.check import Check


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
    from launcher import backends
    from launcher.config import profiles
    from launcher.config.codec import to_data
    from launcher.doctor.checks import examine

    site = profiles.choose(options.cluster, options.backend, Path.cwd())
    multi_node = backends.of(site).capabilities.multi_node
    probe = _probe(options, multi_node)
    checks = []
    for check in itertools.chain(examine(site, Path.cwd()), _on_nodes(probe, options.wait)):
        checks.append(check)
        if not options.json:
            word = "FAIL" if not check.ok else "note" if check.note else "ok"
            print(f"{word:<4}  {check.name:<12} {check.found}", flush=True)
            if check.remedy and (not check.ok or check.note):
                print(f"      -> {check.remedy}")
    if options.json:
        print(json.dumps(to_data(checks)))
    return 0 if all(check.ok for check in checks) else 1


def _probe(options: argparse.Namespace, multi_node: bool) -> RunSpec | None:
    """The run of ``--on-nodes``; None without that option.

    Raises:
        BadRequest: its size is none that a run can have, or is given without ``--on-nodes``.
    """
    if not options.on_nodes:
        given = [name for name in ("nodes", "gpus", "accelerator") if getattr(options, name) is not None]
        if given:
            raise BadRequest(
                f"--{given[0]} is for --on-nodes, which sends a run to the nodes. Add that, or leave it out."
            )
        return None

    nodes = (2 if multi_node else 1) if options.nodes is None else options.nodes
    return RunSpec(
        "launcher.doctor.probe:main",
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


def _on_nodes(spec: RunSpec | None, wait: float) -> Iterator[Check]:
    if spec is None:
        return
    from launcher.doctor.on_nodes import examine

    yield from examine(spec, Path.cwd(), wait, lambda text: print(f"      {text}", file=sys.stderr, flush=True))
