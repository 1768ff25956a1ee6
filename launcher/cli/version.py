"""``launch --version``: the versions of this package, of Python and of the engines."""

from __future__ import annotations

import argparse
import sys
from typing import Any

ENGINES = ("torch", "ray", "submitit")


class Version(argparse.Action):
    """Print the versions and exit with status 0."""

    def __init__(self, option_strings: Any, dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(versions())
        parser.exit()


def versions() -> str:
    """Return one line such as ``launch 0.2.0 (Python 3.11.7, torch 2.13.0, ray 2.60.0, submitit 1.5.4)``.

    The numbers come from the installed distributions, so nothing of them is imported.
    """
    found = [f"Python {sys.version.split()[0]}", *(f"{name} {installed(name)}" for name in ENGINES)]
    return f"launch {installed('launch')} ({', '.join(found)})"


def installed(name: str) -> str:
    """Return the version of the distribution `name`, or ``not installed``."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
