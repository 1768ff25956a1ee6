"""Variables that are given for one run: ``--env NAME=VALUE``, ``--env NAME`` and ``--env-file FILE``."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.config.profile_checks import check_variable
from launcher.errors import BadRequest
from training.flags.typed import brief

MOST_BYTES = 1 << 20

SECRET = re.compile(
    r"TOKEN(?!IZ|S)|SECRET|PASS(?!IVE)|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY|AUTH(?!OR)|(^|_)(PW|PWD|KEY|PAT|DSN|SAS|JWT|COOKIE)(_|$)",
    re.IGNORECASE,
)
"""Names of variables that hold secrets."""

PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
"""An address with a password."""


def is_secret(name: str, value: str) -> bool:
    """Whether a variable's value has to stay out of what is recorded and shown."""
    return SECRET.search(name) is not None or PASSWORD.search(value) is not None


def read(
    given: Sequence[str], files: Sequence[str], cwd: Path, shell: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the variables of ``--env-file`` and ``--env``; the latter count where both have a name.

    Args:
        given: ``NAME=VALUE``, or ``NAME`` for the value that the `shell` has.
        files: paths of files with a ``NAME=VALUE`` on each line.

    Raises:
        BadRequest: a name is none, or is set by `launch`; the shell has no such variable; a file cannot be read.
    """
    found: dict[str, str] = {}
    for file in files:
        found |= dict(_of_file(cwd / file))
    for entry in given:
        name, equals, value = entry.partition("=")
        check_variable(name, f"--env {brief(name, 80)}")
        if not equals and name not in shell:
            raise BadRequest(
                f"--env {name}: this shell has no such variable. Write --env {name}=VALUE, or export it first."
            )
        found[name] = value if equals else shell[name]
    return found


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BadRequest(f"--env-file {brief(str(path), 200)}: {getattr(error, 'strerror', None) or error}.") from None
    if len(text) > MOST_BYTES:
        raise BadRequest(f"--env-file {path}: more than {MOST_BYTES >> 20} MiB.")
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip().removeprefix("export ").lstrip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        where = f"--env-file {path}, line {number}"
        check_variable(name.rstrip(), where)
        if not equals:
            raise BadRequest(f"{where}: write NAME=VALUE.")
        yield name.rstrip(), _unquoted(value.strip(), where)


def _unquoted(value: str, where: str) -> str:
    if not value.startswith(("'", '"')):
        return value.partition(" #")[0].rstrip()
    try:
        words = shlex.split(value, comments=True)
    except ValueError as error:
        raise BadRequest(f"{where}: {error}.") from None
    return words[0] if words else ""
