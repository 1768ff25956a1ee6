"""Generate wrong requests from the parsers, the reference of profiles and the signatures."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.cli.main import parsers
from launcher.cli.parser import COMMANDS
from launcher.config.cluster import Cluster, Container, Node, NodeKind, Ray, Slurm
from launcher.config.profile_checks import OWN_VARIABLES, TAKEN
from launcher.request.spec import flag_of, options

LONG, MANY, HUGE = "x" * 5000, "9" * 5000, "9" * 20

NO_NUMBERS = (
    *(
        "",
        " ",
        "٣",
        "³",
        "½",
        "１",
        "1e3",
        "nan",
        "inf",
        "-inf",
        "0x10",
        "1_000",
        "1.0",
        "+",
        "-",
        "--",
        "1,2",
        "true",
        "None",
    ),
    *(HUGE, f"-{HUGE}", MANY, f"-{MANY}", "1 ", " 1", "1\n", "\u200b1", "\u06611", "1\u0085", "\udcff", LONG),
)
NO_TEXTS = {
    "ranks_per_node": (
        "",
        " ",
        "0",
        "-1",
        "1.5",
        "many",
        "GPU",
        "gpus",
        "1 ",
        " 1",
        "٣",
        HUGE,
        MANY,
        LONG,
        "1\n",
        "\udcff",
        "--",
    ),
    "env": (
        *("", " ", "=", "=1", "NOT_SET_HERE", "a b", "RANK=1", "WORLD_SIZE", "MASTER_ADDR=n1", "TORCHELASTIC_RUN_ID=1"),
        *("\x1b[2J", "\udcff", LONG, "--", "LOCAL_RANK="),
    ),
    "env_file": ("", " ", "nosuch", ".", "/dev/null/x", "~nosuch", LONG, "\udcff", "--"),
    "settings": (
        *(
            "",
            " ",
            "=",
            "=1",
            "grace",
            "grace=",
            "grace=nan",
            "grace=-1",
            "grace=inf",
            "nosuch=1",
            "node=1",
            "node.nosuch=1",
        ),
        *(
            "slurm=1",
            "slurm.partition=gpu",
            "ray.wait=5",
            "name=x",
            "backend=slurm",
            "extends=local",
            "kinds=[]",
            "runs=",
        ),
        *(
            "environment.RANK=1",
            "environment.=1",
            ".=1",
            "a..b=1",
            "node.gpus=many",
            "preflight=maybe",
            "time=soon",
            LONG,
        ),
        *(f"grace={MANY}", f"grace={LONG}", "nodes=1.5", "node.cpus=-1", "\x1b[2J=1", "\udcff=1", "--"),
    ),
    "time": (
        *(
            "",
            " ",
            "٣h",
            "１h",
            "nan",
            "inf",
            "1e3",
            "-1",
            "-1h",
            "0",
            "0m",
            "1.5h",
            "1h2h",
            "1x",
            "h",
            "24:61:61",
            "1:2:3:4",
        ),
        *(
            f"{HUGE}h",
            MANY,
            f"{MANY}h",
            "1 h",
            " 1h",
            "1h ",
            "1h\n",
            "3651d",
            "1H",
            "--",
            "UNLIMITED",
            "1:60",
            "1-24:60",
            "1-",
            "-1:00",
            "00:00:00",
        ),
    ),
    "name": (
        *(
            "",
            " ",
            ".",
            "..",
            "-x",
            "a/b",
            "a b",
            "é",
            "x" * 101,
            LONG,
            "a\n",
            "\x1b[2J",
            "a$b",
            "~",
            "ａ",
            "_a",
            "..a",
        ),
        *("a\x7f", "\udcff", "--", "a:b", "%j"),
    ),
    "backend": (
        "",
        " ",
        "lokal",
        "Local",
        "local ",
        "slurm,ray",
        LONG,
        "\x1b[2J",
        "\udcff",
        "--",
        "ray_on_slurm",
        "fake",
    ),
    "cluster": (
        *(
            "",
            " ",
            "nosuch",
            "~nosuch",
            "~nosuch/x.toml",
            LONG,
            f"{LONG}.toml",
            "\x1b[2J",
            "a\nb",
            "/dev/null",
            "../x",
            ".",
        ),
        *(
            "/",
            "-",
            "a/b/c",
            "\udcff",
            "\udcff.toml",
            "/dev/zero/x.toml",
            "nosuch.toml",
            "--",
            "local.toml",
            "examples",
        ),
    ),
    "accelerator": ("", " ", "--", "h100", LONG, "\x1b[2J", "v5e"),
    "topology": (
        "",
        " ",
        "٢x٢",
        f"{HUGE}x2",
        "2x",
        "0x0",
        "-1x2",
        "2x2x2x2x2",
        "nan",
        LONG,
        "2X2",
        "1.5x2",
        "--",
        "4x4",
    ),
}
TARGETS = (
    *(
        "nosuch",
        "~nosuch",
        "~nosuch/x.py",
        "m:nosuch",
        "m:",
        "os:getcwdd",
        "os:getcwd",
        "sys:exit",
        "builtins:print",
        "a:b:c",
    ),
    *(
        ":",
        ":f",
        "m:f:",
        "m: f",
        " m:f",
        "m:f..g",
        "..",
        "/",
        "/dev/null",
        "/dev/zero",
        "./",
        "é:f",
        "m\n:f",
        "\x1b[2J",
    ),
    *("m:\u0663", LONG, f"{LONG}.py", f"{LONG}:f", ".py", "x.PY", "\udcff.py", "\udcff:f", "-", " ", ""),
)


def requests() -> Iterator[list[str]]:
    """Command lines that are wrong, none of which may be sent."""
    found = parsers()
    yield from _of_options()
    yield from (["--dry-run", "--cpus", "1", target] for target in TARGETS)
    yield from (["--dry-run", "--cpus", "1", "-m", target] for target in TARGETS if target)
    for command, parser in found.items():
        words = [command] if command else []
        target = [] if command in ("list", "clusters", "doctor") else ["nosuch"]
        for action in parser._actions:
            for flag in action.option_strings:
                if flag in ("-h", "--help", "--version"):
                    continue
                if flag.startswith("--") and len(flag) > 6:
                    yield [*words, f"{flag[:-1]}", *target]  # abbreviations are not taken
                    yield [*words, f"{flag}s", *target]
                if action.nargs == 0:
                    yield [*words, f"{flag}=1", *target]
                else:
                    yield [*words, flag]
                    yield (
                        [*words, f"{flag}=a", f"{flag}=b", *target]
                        if action.type is None
                        else [*words, f"{flag}=a", *target]
                    )
                    if action.type is not None:
                        yield from ([*words, f"{flag}={text}", *target] for text in NO_NUMBERS)
        yield [*words, "--nosuch", *target]
        yield [*words, f"--{LONG}", *target]
    for command in set(COMMANDS) - {"list", "clusters", "doctor", "completion"}:
        yield from (
            [command, name]
            for name in ("", " ", LONG, "~nosuch", "/dev/null", ".", "\x1b[2J", "\udcff", "a\nb", "nosuch")
        )
        yield from ([command, "--runs", folder, "nosuch"] for folder in (LONG, "/dev/null", "~nosuch", "\udcff"))


def _of_options() -> Iterator[list[str]]:
    for name, option in options().items():
        flag = flag_of(name)
        more = {"accelerator": ["--gpus", "1"], "topology": []}.get(name, [])
        for text in NO_NUMBERS if option.least is not None else NO_TEXTS[name]:
            yield [f"{flag}={text}", *more, "--dry-run", "empty.py"]
            if text != "--":
                yield ["--dry-run", flag, text, *more, "empty.py"]
        if option.least is not None:
            yield from (
                [flag, str(number), "--dry-run", "empty.py"] for number in (option.least - 1, option.most + 1, 10**30)
            )


# ---- profiles ---------------------------------------------------------------------------------------------------

SECTIONS = {"": Cluster, "node": Node, "slurm": Slurm, "slurm.container": Container, "ray": Ray, "kinds": NodeKind}
LITERALS = ("nan", "inf", "-inf", "1e400", MANY, f"-{HUGE}", "2026-01-01", "[[]]", "{a = [1]}", "[1, 'a']", "-1")
TEXTS = ("", " ", "a\nb", "\x1b[2J", LONG, "a\x7fb", "\0")


def profiles() -> Iterator[str]:
    """Profiles of which one value is wrong, as TOML."""
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name not in ("name", "down"):
                yield from (
                    _profile(section, field.name, value)
                    for value in _wrong_values(section, field.name, hints[field.name])
                )
        yield _profile(section, "nosuch", "1")
        yield _profile(section, LONG, "1")
    for name in (*OWN_VARIABLES, "TORCHELASTIC_RUN_ID", "", "A=B", "A\nB"):
        yield _profile("environment", json.dumps(name), "'1'")
    yield from (_profile("environment", "A", value) for value in ("1", "[]", "true", "{b = 1}", "nan", '"a\\nb"'))
    for name in (
        *TAKEN,
        *(name[:-1] for name in TAKEN if name[:-1] not in TAKEN),
        *"pACqxwNncGtJoeaWMdHk",
        "-p",
        "--partition",
    ):
        yield _profile("slurm.sbatch", json.dumps(name), "'x'")
    yield from (
        _profile("slurm.sbatch", "mail-type", value) for value in ("nan", "[]", "{}", "''", '"a\\nb"', "2026-01-01")
    )
    lines = ("echo 'open", 'echo "open', "if true; then", "echo $(", "fi", "(", "a ) b")
    yield from (_profile("slurm", key, json.dumps([line])) for key in ("setup", "node_setup") for line in lines)
    for where in (
        "foo",
        "auto:",
        "ray://",
        "host:0",
        "host:99999",
        "host:x",
        ":6379",
        "a b:1",
        "http://host:1",
        "host:٣",
    ):
        yield _profile("ray", "address", json.dumps(where))


def _wrong_values(section: str, name: str, hint: Any) -> Iterator[str]:
    kinds = [part for part in typing.get_args(hint) or (hint,) if part is not type(None)]
    origin = typing.get_origin(hint)
    if origin is dict:
        yield from ("1", "'a'", "[]", "true", "nan")
    elif origin is tuple:
        yield from ("1", "'a'", "{}", "true", "nan", "[1]", "[[]]", "[nan]")
        if name != "kinds":
            yield from (json.dumps([text]) for text in TEXTS)
    elif dataclasses.is_dataclass(kinds[0]):
        yield from ("1", "'a'", "[]", "true", "nan", "{nosuch = 1}")
    elif kinds == [bool]:
        yield from ("1", "0", "'true'", "[]", "nan", "{}")
    elif kinds[0] in (int, float):
        yield from (*LITERALS, "'1'", "'٣'", "true", "[1]", "''", "99999999999999999999")
        if kinds[0] is int:
            yield from ("1.5", "1.0")
    else:
        yield from ("1", "1.5", "true", "[]", "{}", "nan", "2026-01-01")
        yield from (json.dumps(text) for text in TEXTS if name != "description" or not text.isprintable())
        if (section, name) in (("", "runs"), ("", "hub_cache")):
            yield from ("'~nosuch/runs'", "'$NO_SUCH_VARIABLE'")
        if origin is typing.Literal or name in ("backend", "extends", "proxy", "time"):
            yield from ("'nosuch'", "'٣'")


def _profile(section: str, key: str, value: str) -> str:
    """A profile whose only wrong value is `value`."""
    tables: dict[str, dict[str, str]] = {
        "": {"backend": "'ray'" if section == "ray" else "'slurm'", "nodes": "4"},
        "node": {"gpus": "2", "cpus": "8"},
    }
    if section == "slurm.container":
        tables["slurm.container"] = {"image": "'x.sif'"}
    if section == "kinds":
        tables["kinds"] = {"count": "1", "gpus": "2", "cpus": "8", "memory_gb": "8.0"}
    tables.setdefault(section, {})[key] = value
    if not section and key in SECTIONS:
        tables.pop(key, None)
    lines = []
    for name, entries in tables.items():
        lines += [f"[[{name}]]" if name == "kinds" else f"[{name}]"] * bool(name)
        lines += [f"{entry} = {text}" for entry, text in entries.items()]
    return "\n".join(lines) + "\n"


# ---- Python -----------------------------------------------------------------------------------------------------

OBJECTS: tuple[Any, ...] = (
    *(
        -1,
        1.5,
        True,
        b"x",
        [],
        {},
        (),
        object(),
        float("nan"),
        10**6000,
        "",
        "\0",
        Path("x"),
        lambda: 0,
        {"a": 1},
        [1],
        3 + 4j,
    ),
)


def calls() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Calls of `launch` and `resume` with a value of a wrong type: function, arguments, keywords."""
    for name in options():
        objects = [each for each in OBJECTS if each not in ([], ()) or not options()[name].many]
        yield from (("launch", ("empty.py",), {"wait": False, name: value}) for value in objects)
        yield from (("resume", ("nosuch",), {"wait": False, name: value}) for value in objects if name != "name")
        yield "launch", ("empty.py",), {"wait": False, f"{name}x": 1}
    for name in ("max_restarts", "spare_nodes"):
        yield "launch", ("empty.py",), {"wait": False, name: None}
    for value in (None, *OBJECTS):
        if not callable(value):
            yield "launch", (value,), {"wait": False}
        yield "resume", (value,), {"wait": False}
        yield "resume", ("nosuch",), {"wait": False, "runs_folder": value}
        if not isinstance(value, str):
            yield "launch", ("m:f", "--steps", value), {"wait": False}
        if not isinstance(value, list | tuple):
            yield "launch", ("m:f",), {"wait": False, "args": value}
        if value is not None and not isinstance(value, dict):
            yield "launch", ("m:f",), {"wait": False, "kwargs": value}
    yield "launch", ("m:f", "--steps", 3), {"wait": False}
    yield "launch", ("m:f",), {"wait": False, "kwargs": {1: 2}}
