"""What is asked (`RunSpec`), what will be sent (`Plan`), and the states a run can be in."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from launcher.config.cluster import Cluster
from launcher.errors import BadRequest, nearest
from launcher.request.placement.devices import Devices, Placement
from training.flags.typed import brief

DEFAULT_TARGET = "training.train:train"


class State(enum.StrEnum):
    """Where a run is. LOST: it ended and left no result; UNKNOWN: the state could not be determined, so it is never final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"
    UNKNOWN = "unknown"

    @property
    def done(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.STOPPED, State.LOST)

    @property
    def exit_status(self) -> int:
        """The exit status of ``launch`` for a run that ended in this state."""
        return {State.SUCCEEDED: 0, State.STOPPED: 3}.get(self, 1)


@dataclass(frozen=True)
class Option:
    """How a field of `RunSpec` is written and documented; stored as its ``metadata["option"]``.

    Attributes:
        help: one line for ``launch --help`` and the documentation of `launcher.launch`.
        metavar: the placeholder of the value.
        group: the heading in ``launch --help``.
        least, most: the bounds of a whole number; an option without them is text.
        flag: its name on the command line; by default that of the field.
        many: may be given more than once, each a text; in Python a list of them.
    """

    help: str
    metavar: str
    group: str = "where"
    least: int | None = None
    most: int = 1_000_000
    flag: str = ""
    many: bool = False


def _option(text: str, metavar: str, **more: Any) -> dict[str, Option]:
    return {"option": Option(text, metavar, **more)}


@dataclass(frozen=True)
class RunSpec:
    """What is asked. Its fields are the options of the command line and the keywords of `launcher.launch`."""

    target: str = DEFAULT_TARGET
    args: tuple[str, ...] = ()
    backend: str | None = field(default=None, metadata=_option("local (default), slurm or ray", "NAME"))
    cluster: str | None = field(default=None, metadata=_option("a profile (see `launch clusters`)", "NAME|PATH"))
    gpus: int | None = field(default=None, metadata=_option("GPUs in all, one rank each", "N", least=1))
    tpus: int | None = field(default=None, metadata=_option("TPU chips in all, one rank each", "N", least=1))
    cpus: int | None = field(
        default=None, metadata=_option("CPU ranks in all, one core each, to debug", "N", least=1, most=100_000)
    )
    nodes: int | None = field(
        default=None, metadata=_option("spread them evenly over N nodes", "N", least=1, most=100_000)
    )
    spare_nodes: int = field(
        default=0,
        kw_only=True,
        metadata=_option("N nodes more (SLURM), to take the place of lost ones", "N", least=0, most=100_000),
    )
    gpus_per_node: int | None = field(
        default=None, kw_only=True, metadata=_option("GPUs of each node, one rank each", "N", least=1, most=1_000)
    )
    ranks: int | None = field(
        default=None,
        kw_only=True,
        metadata=_option("ranks in all: on GPUs if there are any, else on cores", "N", least=1),
    )
    ranks_per_node: str | None = field(
        default=None,
        kw_only=True,
        metadata=_option("ranks of each node; gpu, cpu: one on each", "N|gpu|cpu|auto"),
    )
    cpus_per_rank: int | None = field(
        default=None,
        kw_only=True,
        metadata=_option("CPU cores of each rank (default: its share)", "N", least=1, most=100_000),
    )
    accelerator: str | None = field(
        default=None, metadata=_option("h100, a100, ..., or a TPU generation: v5e, v5p, ...", "TYPE")
    )
    topology: str | None = field(default=None, metadata=_option("the shape of a TPU slice", "4x4"))
    settings: tuple[str, ...] = field(
        default=(),
        kw_only=True,
        metadata=_option("set a key of the profile, as slurm.partition=gpu", "KEY=VALUE", flag="--set", many=True),
    )
    env: tuple[str, ...] = field(
        default=(),
        kw_only=True,
        metadata=_option("a variable of all ranks; NAME: of this shell", "NAME=VALUE", many=True, group="the run"),
    )
    env_file: tuple[str, ...] = field(
        default=(), kw_only=True, metadata=_option("a file of NAME=VALUE lines", "FILE", many=True, group="the run")
    )
    time: str | None = field(
        default=None,
        kw_only=True,
        metadata=_option("time limit: 2h, 90m, 1-12:00:00 (a number: minutes)", "2h", group="the run"),
    )
    max_restarts: int = field(
        default=3, kw_only=True, metadata=_option("restarts after crashes (default 3)", "N", group="the run", least=0)
    )
    name: str | None = field(
        default=None, kw_only=True, metadata=_option("the run's name (default: target and time)", "NAME", group="how")
    )

    def __post_init__(self) -> None:
        if not isinstance(self.target, str):
            raise BadRequest(f"target {brief(self.target, 80)}: a string such as 'train.py', or a function, is needed.")
        defaults = {f.name: f.default for f in fields(self)}
        for name, option in options().items():
            if (value := getattr(self, name)) is not None or defaults[name] is not None:
                _check_option(flag_of(name), value, option)
        for name in ("settings", "env", "env_file"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # from Python it may be a list
        asked = [flag_of(k) for k in DEVICES if getattr(self, k) is not None]
        if len(asked) > 1:
            raise BadRequest(f"{' and '.join(asked)} together: a run uses one kind of device. Give one of them.")
        if self.ranks_per_node is not None and not re.fullmatch(r"[1-9][0-9]{0,6}|gpu|cpu|auto", self.ranks_per_node):
            raise BadRequest(
                f"--ranks-per-node {brief(self.ranks_per_node, 40)}: write a number, or gpu, cpu or auto for one rank on each"
                " GPU, core, or whichever a node has."
            )
        if self.name is not None:
            check_name(self.name)

    def devices(self) -> Devices | None:
        """The devices asked for, or None when the choice is left to the backend's default."""
        shape = (self.nodes, self.accelerator, self.topology)
        if self.gpus is not None:
            return Devices("gpu", self.gpus, *shape)
        if self.gpus_per_node is not None:
            nodes = self.nodes or 1
            return Devices("gpu", self.gpus_per_node * nodes, nodes, self.accelerator, self.topology)
        if self.tpus is not None:
            return Devices("tpu", self.tpus, *shape)
        if self.cpus is not None:
            return Devices("cpu", self.cpus, *shape)
        return None

    def counts_ranks(self) -> bool:
        """Whether a number of devices or ranks is asked for, in all or on each node."""
        return self.devices() is not None or self.ranks is not None or self.ranks_per_node is not None


DEVICES = ("gpus", "gpus_per_node", "tpus", "cpus")
"""Fields of which one says the devices of a run."""

NOT_RESUMED = ("name",)
"""Options that `resume` does not take: a resumed run keeps them."""


def options(without: Collection[str] = ()) -> dict[str, Option]:
    """The options of a run by their field of `RunSpec`, in the order of ``launch --help``."""
    return {f.name: f.metadata["option"] for f in fields(RunSpec) if "option" in f.metadata and f.name not in without}


def flag_of(name: str) -> str:
    """The option of the command line that is the field `name`."""
    option = options().get(name)
    return (option and option.flag) or f"--{name.replace('_', '-')}"


def refuse_empty(given: Mapping[str, Any]) -> None:
    """Refuse an option that is given without a value, which would count as left out.

    Raises:
        BadRequest: for the first of them; `check_name` refuses an empty name.
    """
    for name, value in given.items():
        if value == "" and name != "name":
            raise BadRequest(f"{flag_of(name)} '': a value is needed, or leave the option out.")


def check_options(call: str, given: Mapping[str, Any], known: Collection[str], more: str) -> None:
    """Refuse a keyword of the Python function `call` that is no option, or has no value.

    Raises:
        BadRequest: with the nearest option, and all of them.
    """
    for name in given:
        if name not in known:
            raise BadRequest(
                f"{call}() has no option {name!r}{nearest(name, known)}. Options: {', '.join(known)}, {more}."
            )
    refuse_empty(given)


def as_path(what: str, value: object) -> Path:
    """Return `value`, given from Python for `what`, as a path.

    Raises:
        BadRequest: it is neither a string nor a path, or it holds a null character.
    """
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise BadRequest(f"{what} {brief(value, 80)}: the path of a folder is needed, such as 'runs'.")
    return Path(value)


def _check_option(flag: str, value: Any, option: Option) -> None:
    if option.many:
        if not isinstance(value, list | tuple) or not all(isinstance(each, str) and "\0" not in each for each in value):
            raise BadRequest(f"{flag} {brief(value, 80)}: a list of texts is needed, such as [{option.metavar!r}].")
        return
    if option.least is None:
        if not isinstance(value, str) or "\0" in value:
            raise BadRequest(f"{flag} {brief(value, 80)}: a string is needed, such as {option.metavar!r}.")
        return
    if type(value) is not int:  # from Python; a flag's text is a number by now
        raise BadRequest(f"{flag} {value}: a whole number is needed, not {value!r}.")
    shown = f"{flag} {value if abs(value) < 10**20 else '...'}"  # str() refuses a number of more than 4,300 digits
    if value < option.least:
        raise BadRequest(f"{shown}: {'at least 1' if option.least else '0 or more'} is needed.")
    if value > option.most:
        raise BadRequest(f"{shown}: at most {option.most} is allowed.")


@dataclass(frozen=True)
class Values:
    """Values for the parameters of a function that were given from Python.

    Attributes:
        args, kwargs: by position and by name, as JSON data; empty if they are pickled.
        pickled: they lie in ``arguments.pkl`` of the run directory.
        shown: them, or the beginning of them, as text; empty without any.
        context: the parameter that takes the Context, "" for none, if flags are among the values and all were checked;
            None if the target has not been imported yet.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    pickled: bool = False
    shown: str = ""
    context: str | None = None


TargetKind = Literal["function", "script", "module", "value", "command"]


@dataclass(frozen=True)
class Target:
    """What every rank runs.

    Attributes:
        kind: ``function`` (``name`` is ``module:function``), ``script`` (a path below ``code/`` or absolute),
            ``module`` (run as ``-m name``), ``value`` (a function that travels pickled in ``target.pkl``) or ``command``
            (any program, as it stands).
        path: entries that come first on ``sys.path`` of every rank; they point into the snapshot.
        moved: folders of code and their copies, which take their place on ``sys.path``, or come last.
        source: files whose import statements the forkserver preloads.
        values: values for a function's parameters besides the flags in `args`.
    """

    kind: TargetKind
    name: str
    args: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    values: Values = Values()
    moved: dict[str, str] = field(default_factory=dict)

    def listed(self) -> str:
        """The arguments as a JSON list, followed by the values, for a dry run."""
        return json.dumps(self.args) + (f" ({self.values.shown})" if self.values.shown else "")

    def spelled(self, name: str) -> str:
        """The target, called `name`, with its values and arguments, for a person."""
        return " ".join((f"{name}({self.values.shown})" if self.values.shown else name, *self.args))


@dataclass(frozen=True)
class Plan:
    """Everything that will be sent. A backend needs nothing else, and ``--dry-run`` prints it."""

    name: str
    run_dir: Path
    spec: RunSpec
    backend: str
    cluster: Cluster
    placement: Placement
    target: Target
    cwd: Path
    time_minutes: int
    environment: dict[str, str] = field(default_factory=dict)
    project: Path | None = None  # the folder on the submitting machine whose code is copied; None: nothing is
    shell: tuple[str, ...] = ()  # lines about the scheduler's variables of the shell, used and not
    start: str = ""  # when and where the scheduler would start it, as it said when the plan was made
    variables: tuple[str, ...] = ()  # names in `environment` that were given for this run alone
    secrets: tuple[str, ...] = ()  # those of them whose values are neither shown nor in plan.json
    gpu: str = ""  # the GPU that was chosen for a run that asked for none, and why; `environment` names it

    def masked(self) -> Plan:
        """The plan to be shown: the values of secret variables are hidden."""
        return replace(self, environment=self.environment | dict.fromkeys(self.secrets, "(secret)"))

    def public(self) -> Plan:
        """The plan without the values of secret variables."""
        return replace(self, environment={k: v for k, v in self.environment.items() if k not in self.secrets})


def check_name(name: str) -> None:
    """Refuse a run name that is not a plain file name; names end up in paths, job names and scripts.

    Raises:
        BadRequest: anything but letters, digits, dot, dash and underscore, or more than 100 characters.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise BadRequest(
            f"--name {name!r}: a run name is up to 100 letters, digits, '.', '_' and '-', and begins with a letter or a"
            " digit, such as 'mrpc-lr3e-5'."
        )
