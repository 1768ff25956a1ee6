"""Messages between processes: lines of JSON, and the messages between a node agent and its forkserver.

A line is ``{"<class>": {<field>: <value>, ...}}``. A class with the methods ``to_wire`` and ``from_wire`` has fields of its own there.

=====================  ====================================================================================
agent to forkserver
`Preload`              import modules; the answer is `Ready`
`StartRank`            start a rank; the answers are `RankStarted` and, when it has ended, `RankEnded`
`SignalRanks`          send a signal to ranks; no answer
=====================  ====================================================================================
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args

from training.distributed.world import World
from training.files import parse_json
from training.flags.typed import from_data

JsonObject = dict[str, Any]
"""A part of a message that is only reported: what is in it depends on the machine."""


@dataclass(frozen=True)
class Preload:
    """How ranks are started.

    Attributes:
        modules: imported here, and ranks are forked afterwards; without any, each rank is a fresh interpreter.
        standby: fresh interpreters are started ahead for a restart.
        target: the name or the file of the program.
        user_folders: the folders that come before the libraries on sys.path of a rank.
    """

    modules: list[str]
    standby: bool = False
    target: str = ""
    user_folders: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StartRank:
    """Start the rank of `world` with all of its environment variables; its output is appended to the file `log`."""

    world: World
    log: str
    environment: dict[str, str]


@dataclass(frozen=True)
class SignalRanks:
    """Send the signal `number` to `ranks`, after `after` seconds unless it is SIGTERM and has reached them from outside."""

    number: int
    ranks: list[int]
    after: float = 0.0


@dataclass(frozen=True)
class Ready:
    """The imports of `Preload` are done, after `seconds`."""

    seconds: float


@dataclass(frozen=True)
class RankStarted:
    """A rank has started, as the process `pid`."""

    rank: int
    pid: int


@dataclass(frozen=True)
class RankEnded:
    """A rank has ended with the exit status `code`; negative: by that signal."""

    rank: int
    code: int


ToForkServer = Preload | StartRank | SignalRanks
FromForkServer = Ready | RankStarted | RankEnded


def encode(message: Any) -> bytes:
    """Return a message, an instance of a dataclass, as a line."""
    fields = message.to_wire() if hasattr(message, "to_wire") else message
    return json.dumps({type(message).__name__: fields}, default=_fields).encode() + b"\n"


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def decode(kinds: Any, line: bytes) -> Any:
    """Return the message on a line; `kinds` is the class, or the union of the classes, that is expected.

    Raises:
        ValueError: the line is none of them (ConfigError if only a field is wrong).
    """
    data = parse_json(line)
    known = _by_name(kinds)
    if not isinstance(data, dict) or len(data) != 1 or not known.keys() >= data.keys():
        raise ValueError(f"a message that is none of {', '.join(known)}: {line[:80]!r}")
    [(name, fields)] = data.items()
    if hasattr(known[name], "from_wire"):
        return known[name].from_wire(fields)
    return from_data(known[name], fields, name)


@cache
def _by_name(kinds: Any) -> dict[str, Any]:
    return {kind.__name__: kind for kind in get_args(kinds) or (kinds,)}
