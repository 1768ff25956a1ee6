"""``launch clusters``: list the cluster profiles, or write a first one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.parser import Once, Parser, add_json, command
from launcher.errors import BadRequest


def run_clusters(argv: Sequence[str]) -> int:
    """``launch clusters`` and ``launch clusters new [NAME]``."""
    if argv[:1] == ["new"]:
        return _new_cluster(argv[1:])
    options = command("clusters", "`launch clusters new [NAME]` writes a first one.", run=False).parse_args(list(argv))
    from launcher.config import profiles

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
        description="Inspect the available SLURM or Ray and write ./cluster_configs/NAME.toml.",
    )
    parser.add_argument("name", nargs="?", default="mine", metavar="NAME", help="of the profile (default: mine)")
    parser.add_argument("--backend", action=Once, metavar="NAME", help="slurm or ray (default: the available one)")
    add_json(parser)
    options = parser.parse_args(list(argv))
    from launcher.doctor.new_profile import create

    path = create(options.name, options.backend, Path.cwd())
    print(
        json.dumps({"name": options.name, "path": str(path)})
        if options.json
        else f"{path}: look at it, then use it with --cluster {options.name}"
    )
    return 0
