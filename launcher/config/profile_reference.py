"""``python -m launcher.config.profile_reference > docs/profiles.md``: the reference of profiles, written from the dataclasses themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing

from launcher.config.cluster import Cluster, Container, Node, NodeKind, Ray, Slurm
from launcher.config.profile_checks import TAKEN

TABLES: tuple[tuple[str, type, str], ...] = (
    ("The profile itself", Cluster, ""),
    ("`[node]`: one node, where all are alike", Node, "node."),
    ("`[[kinds]]`: the kinds of nodes, where they are not", NodeKind, "kinds."),
    ("`[slurm]`: SLURM submission options", Slurm, "slurm."),
    ("`[slurm.container]`: what agents and ranks run in", Container, "slurm.container."),
    ("`[ray]`: how this Ray is reached", Ray, "ray."),
)

HEAD = """\
# Profiles

<!-- Written by `python -m launcher.config.profile_reference > docs/profiles.md`; a test holds that it is current. -->

A profile is a TOML file that says what a cluster has and how jobs are submitted to it. `launch clusters` lists those that
were found: in `./cluster_configs`, in the user's configuration folder, and the ones shipped; the first of a name wins.
`launch clusters new NAME` inspects the available SLURM or Ray and writes a first one. What a profile leaves out is asked
of the engine. An unknown key is an error that lists the known ones.

`extends = "other"` builds on another profile, table by table; a key that is given replaces the other's. One level:

```toml
extends = "examples/network-infiniband"   # its [environment], and what follows
runs = "/scratch/me/runs"

[slurm]
partition = "gpu"
account = "nlp"
```

Line breaks and control characters are refused everywhere, so that no value can add a line to a job's script.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, cls, prefix in TABLES:
        parts.append(
            f"\n## {title}\n\n{_summary(cls)}\n\n| key | value | default | |\n|---|---|---|---|\n{_rows(cls, prefix)}"
        )
    taken = "\n".join(f"| `{name}` | {where} |" for name, where in TAKEN.items())
    parts.append(f"\n## Options of sbatch that are decided elsewhere\n\n| `slurm.sbatch` | use |\n|---|---|\n{taken}\n")
    return "".join(parts)


def _summary(cls: type) -> str:
    text = inspect.cleandoc(cls.__doc__ or "")
    return text.partition("\n\nAttributes:")[0].replace("\n", " ")


def _rows(cls: type, prefix: str) -> str:
    texts = attributes(cls)
    hints = typing.get_type_hints(cls)
    rows = ""
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(field.type) and not dataclasses.is_dataclass(hints[field.name]):
            rows += (
                f"| `{prefix}{field.name}` | {_kind(hints[field.name])} | {_default(field)} | {texts[field.name]} |\n"
            )
    return rows


def attributes(cls: type) -> dict[str, str]:
    """Field -> what the docstring's ``Attributes`` say of it."""
    _, _, text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    for match in re.finditer(r"^    (\w[\w, ]*): (.*(?:\n        .*)*)", text, re.MULTILINE):
        line = re.sub(r"\s+", " ", match[2]).replace("``", "`").replace("|", "\\|")
        found |= dict.fromkeys(re.split(r", ", match[1]), line)
    return found


def _kind(hint: object) -> str:
    arguments = [a for a in typing.get_args(hint) if a is not type(None)]
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{a}`" for a in arguments)
    if origin is tuple:
        return "tables" if dataclasses.is_dataclass(arguments[0]) else "list of strings"
    if origin is dict:
        return "table"
    if origin is not None:
        return _kind(arguments[0])
    if dataclasses.is_dataclass(hint):
        return "table"
    return {str: "string", int: "whole number", float: "number", bool: "true or false"}[typing.cast(type, hint)]


def _default(field: dataclasses.Field[typing.Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING else "empty"
    if field.default in (None, "", ()):
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


if __name__ == "__main__":
    print(page(), end="")
