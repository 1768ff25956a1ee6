"""``launch diff``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cli.parser import command
from launcher.errors import BadRequest

if TYPE_CHECKING:
    from launcher.client.run import Run
    from launcher.client.sent.compare import Difference

WIDEST = 48
"""Characters of a value in the table."""

MOST_FILES = 30
"""Files of code in the table."""


def run_diff(argv: Sequence[str]) -> int:
    """``launch diff RUN RUN``."""
    about = (
        "The exit status is 0 if nothing differs, and 1 if something does. Values of secret variables are not shown."
    )
    options = command("diff", about, nargs="+").parse_args(list(argv))
    if len(options.run) != 2:
        raise BadRequest(f"diff: two runs are compared, {len(options.run)} given.")
    from launcher.client.run import find
    from launcher.client.sent.compare import diff

    a, b = (find(name, Path(options.runs)) for name in options.run)
    found = diff(a, b)
    if options.json:
        runs = {key: {"name": run.name, "run_dir": str(run.path)} for key, run in (("a", a), ("b", b))}
        print(json.dumps({**runs, "differences": [vars(each) for each in found]}))
    elif not found:
        print(f"{_shown(a.name)} and {_shown(b.name)} do not differ")
    else:
        print("\n".join(_table(a, b, found)))
    return 1 if found else 0


def _table(a: Run, b: Run, found: Sequence[Difference]) -> Iterator[str]:
    rows = [(each.part, _shown(each.name), _shown(each.a), _shown(each.b)) for each in found]
    titles = (_shown(a.name), _shown(b.name)) if a.name != b.name else (_shown(a.path), _shown(b.path))
    first = max(14, *(len(name) for _, name, _, _ in rows))
    second = max(len(titles[0]), *(len(value) for _, _, value, _ in rows))
    yield f"  {'':<{first}}  {titles[0]:<{second}}  {titles[1]}"
    part, files = "", 0
    for each, name, left, right in rows:
        if each != part:
            part = each
            yield part
        files += part == "code"
        if part != "code" or files <= MOST_FILES:
            yield f"  {name:<{first}}  {left:<{second}}  {right}".rstrip()
        elif files == MOST_FILES + 1:
            yield f"  ... and {sum(row[0] == 'code' for row in rows) - MOST_FILES} more"


def _shown(value: Any) -> str:
    """A value in one line."""
    from launcher.client.tail import printable

    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    line = printable(" ".join(text.split()))
    return line if len(line) <= WIDEST else f"{line[: WIDEST - 16]}...{line[-13:]}"
