"""From what is asked to all that would be sent: looks, computes, and writes nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from launcher import backends
from launcher.backends.base import FreeGpu
from launcher.config import profiles, variables
from launcher.config.cluster import Cluster
from launcher.config.durations import parse_minutes
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir
from launcher.request import snapshot
from launcher.request.binding import checked_values
from launcher.request.code.roots import is_shared
from launcher.request.placement.devices import Devices, many
from launcher.request.placement.place import Placement, place
from launcher.request.ray_train import refuse_train_object
from launcher.request.resolve import check_shadowing, python_path, resolve
from launcher.request.spec import Plan, RunSpec, Target, Values, check_name
from launcher.request.values import pack, show
from training.errors import ConfigError

DEFAULT_MINUTES = 60

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""The `args` and `kwargs` of a call of `launch`."""

NOTHING_GIVEN: Given = ((), {})


def make_plan(
    spec: RunSpec, cwd: Path, function: Callable[..., Any] | None = None, given: Given = NOTHING_GIVEN
) -> Plan:
    """Work out everything that would be sent. Writes nothing and starts nothing.

    `function` is the target if that was given as an object, and `given` are values from Python for its parameters.

    Raises:
        BadRequest: the request cannot be met.
    """
    site = profiles.choose(spec.cluster, spec.backend, cwd, spec.settings)
    backend = backends.of(site)
    _check_spare_nodes(spec, site)
    site, lines = backend.from_shell(site, spec.time)
    site = backend.survey(site)
    gpu = _free_gpu(spec, site)
    site, without = _without_unusable_gpus(spec, site, gpu)
    placement = _place(spec, site, without)
    folder = Path(os.path.abspath(cwd / site.runs))
    run_dir = RunDir(folder / (spec.name or _new_name(spec, folder)))
    _check_folder(run_dir.path, site)
    found, project = _find_target(spec, cwd, function, given)
    if project is not None:
        check_shadowing(found, project)
        found = _in_snapshot(found, project, cwd, run_dir)
    given_variables = variables.read(spec.env, spec.env_file, cwd)
    plan = Plan(
        name=run_dir.path.name,
        run_dir=run_dir.path,
        spec=replace(spec, env=(), env_file=()),  # their values may be secret
        backend=site.backend,
        cluster=site,
        placement=placement,
        target=found,
        cwd=cwd,
        time_minutes=_minutes(spec, site),
        environment=_environment(placement, site) | site.variables() | given_variables,
        project=project,
        shell=lines,
        variables=tuple(given_variables),
        secrets=tuple(name for name, value in given_variables.items() if variables.is_secret(name, value)),
    )
    plan = on_gpu(plan, gpu)
    return replace(plan, start=backend.check(plan))


def _place(spec: RunSpec, site: Cluster, without: str) -> Placement:
    placement = place(_devices(spec, site), site)
    if not spec.counts_ranks() and placement.device == "cpu":
        # Nothing was asked for: one rank with the whole machine, the quickest way to see something.
        placement = replace(
            placement, cpus_per_rank=site.node.cpus, threads=site.node.cpus, why=f"one CPU rank, all cores{without}"
        )
    return placement if spec.cpus_per_rank is None else _with_cores(placement, spec.cpus_per_rank, site)


def _minutes(spec: RunSpec, site: Cluster) -> int:
    text = spec.time or site.time
    return parse_minutes(text) if text else DEFAULT_MINUTES


def _check_spare_nodes(spec: RunSpec, site: Cluster) -> None:
    if not spec.spare_nodes or backends.of(site).capabilities.spare_nodes:
        return
    known = [name for name in backends.names() if backends.get(name).capabilities.spare_nodes]
    raise BadRequest(
        f"--spare-nodes {spec.spare_nodes}: the {site.backend} backend has no allocation to keep them in (known:"
        f" {', '.join(known)}). Leave it out."
    )


def on_gpu(plan: Plan, gpu: FreeGpu | None) -> Plan:
    """Return `plan` on this GPU; as it is if it uses no GPU, or if `gpu` is None."""
    if gpu is None or plan.placement.device != "cuda":
        return plan
    return replace(plan, gpu=gpu.why, environment=plan.environment | {"CUDA_VISIBLE_DEVICES": gpu.name})


def chosen_again(plan: Plan) -> Plan:
    """Return the plan of a run that is sent again. If its GPU was chosen, the choice is made again."""
    if not plan.gpu:
        return plan
    environment = {name: value for name, value in plan.environment.items() if name != "CUDA_VISIBLE_DEVICES"}
    return on_gpu(replace(plan, gpu="", environment=environment), backends.of(plan.cluster).free_gpu(plan.cluster))


def _free_gpu(spec: RunSpec, site: Cluster) -> FreeGpu | None:
    """Choose the GPU of a run that asks for no device and no nodes."""
    return backends.of(site).free_gpu(site) if not spec.counts_ranks() and spec.nodes is None else None


def _environment(placement: Placement, site: Cluster) -> dict[str, str]:
    """Variables that every rank should have unless the profile says otherwise."""
    # OpenMP's threads otherwise spin while they wait, and on a core that somebody else needs that costs ten times the
    # work (measured: 1.4 against 17 steps a second of a small transformer, two threads on two busy cores).
    passive = {"OMP_WAIT_POLICY": "PASSIVE"} if placement.device == "cpu" else {}
    # As under torchrun, the number of threads that the submitting shell sets is kept; ranks elsewhere do not inherit it.
    passive |= {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if os.environ.get(name)}
    if site.tpu_runtime == "torch_tpu":
        return passive
    # Where torch_xla is installed, accelerate takes its device, whatever it is asked for.
    return passive | ({"PJRT_DEVICE": "TPU"} if placement.device == "xla" else {"USE_TORCH_XLA": "0"})


def _without_unusable_gpus(spec: RunSpec, site: Cluster, gpu: FreeGpu | None) -> tuple[Cluster, str]:
    """Return the site without its GPUs, and the reason, if no device was asked for and torch cannot use them."""
    if spec.devices() is not None or spec.accelerator is not None or spec.ranks_per_node == "gpu" or not site.node.gpus:
        return site, ""
    reason = backends.of(site).unusable_gpus(gpu)
    if not reason:
        return site, ""
    return replace(site, node=replace(site.node, gpus=0)), f"; no GPU is used: {reason}"


def _devices(spec: RunSpec, site: Cluster) -> Devices:
    """The devices that were asked for, by their number or by that of the ranks; else one, or all of the nodes asked for.

    Raises:
        BadRequest: the numbers contradict each other, or follow from something that is not known.
    """
    asked = spec.devices()
    each = _ranks_of_node(spec, site)
    if asked is None:
        if site.node.gpus == 0 and spec.accelerator is not None:
            raise BadRequest(
                f"--accelerator {spec.accelerator}: cluster {site.name!r} has no GPUs. Leave it out, or add --tpus or --cpus."
            )
        kind, number = _default_kind(spec, site)
        count = spec.ranks or (each or (number or 1 if spec.nodes else 1)) * (spec.nodes or 1)
        asked = Devices(kind, count, spec.nodes, spec.accelerator, spec.topology)
    if spec.ranks is not None and spec.ranks != asked.count:
        raise BadRequest(
            f"--ranks {spec.ranks} --{asked.kind}s {asked.count}: each device has one rank. Give one of the two."
        )
    if each is None:
        return asked
    nodes = asked.nodes or asked.count // each
    if nodes * each != asked.count:
        raise BadRequest(
            f"--ranks-per-node {spec.ranks_per_node}: {each} ranks on each of {many(max(nodes, 1), 'node')} are"
            f" {each * max(nodes, 1)}, and {asked.count} were asked for. Leave one of the numbers out."
        )
    return replace(asked, nodes=nodes)


def _ranks_of_node(spec: RunSpec, site: Cluster) -> int | None:
    """The number that ``--ranks-per-node`` stands for; None without it."""
    text = spec.ranks_per_node
    if text is None or text.isdigit():
        return None if text is None else int(text)
    kind = _default_kind(spec, site)[0] if text == "auto" else text
    number = site.node.gpus if kind == "gpu" else site.node.cpus
    if not number:
        what = "GPUs" if kind == "gpu" else "CPU cores"
        known = (
            f"cluster {site.name!r} has no {what}"
            if number == 0 and kind == "gpu"
            else f"it is not known how many {what} a node has"
        )
        raise BadRequest(f"--ranks-per-node {text}: {known}. Write a number.")
    return number


def _default_kind(spec: RunSpec, site: Cluster) -> tuple[Literal["gpu", "cpu"], int | None]:
    """The kind of device of ranks that are only counted, and how many a node has."""
    if spec.ranks_per_node in ("gpu", "cpu"):
        return ("gpu", site.node.gpus) if spec.ranks_per_node == "gpu" else ("cpu", site.node.cpus)
    return ("gpu", site.node.gpus) if site.node.gpus else ("cpu", site.node.cpus)


def _with_cores(placement: Placement, cores: int, site: Cluster) -> Placement:
    """Return `placement` with so many cores for each rank.

    Raises:
        BadRequest: no node has as many.
    """
    needed = cores * placement.ranks_per_node
    most = max((kind.cpus for kind in site.node_kinds()), default=0)
    if most and (cores > most or (needed > most and not site.oversubscribe)):
        raise BadRequest(
            f"--cpus-per-rank {cores}: the ranks of a node would take {needed} cores, and it has {most}. At most"
            f" {max(most // placement.ranks_per_node, 1)} is possible."
        )
    why = f"{placement.why}, {many(cores, 'core')} for each rank"
    return replace(placement, cpus_per_rank=cores, threads=cores, why=why)


def _new_name(spec: RunSpec, folder: Path) -> str:
    """A name that says what and when, and is free."""
    what = spec.target.removeprefix("-m ").rpartition(":")[2]
    stem = "".join(c if c.isalnum() else "-" for c in Path(what).stem).strip("-")[:40] or "run"
    base = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (base if n == 1 else f"{base}-{n}" for n in range(1, 1000))
    name = next(n for n in names if not os.path.lexists(folder / n))
    check_name(name)
    return name


def _check_folder(run_dir: Path, site: Cluster) -> None:
    if any(ord(c) < 32 for c in str(run_dir)):
        raise BadRequest(f"{run_dir!r}: a run directory's path cannot hold line breaks.")
    try:
        if run_dir.exists():
            RunDir(run_dir).create()  # says what to do about it
        above = next(p for p in run_dir.parents if p.exists())
    except OSError as error:  # a name that is too long, a loop of links, a folder that may not be looked into
        shown = f"{str(run_dir.parent)[:80]}..." if len(str(run_dir)) > 80 else run_dir.parent
        raise BadRequest(
            f"the runs folder {shown} cannot be used: {error.strerror} (`runs` in profile {site.name!r} sets it)."
        ) from None
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadRequest(
            f"the runs folder {run_dir.parent} cannot be written (`runs` in profile {site.name!r} sets it)."
        )
    check_shared(run_dir, site)


def check_shared(run_dir: Path, site: Cluster) -> None:
    """Refuse a run directory that the nodes do not share, as far as the profile states it.

    Raises:
        BadRequest: it lies in none of the profile's shared folders.
    """
    shared = [Path(os.path.expanduser(os.path.expandvars(s))).resolve() for s in site.shared]
    if shared and not any(s == p for s in shared for p in run_dir.resolve().parents):
        raise BadRequest(
            f"the runs folder {run_dir.parent} is not shared by the nodes of cluster {site.name!r}: its profile names"
            f" {', '.join(map(str, shared))}. Start from there, or set `runs` in the profile to a folder below."
        )


def _find_target(
    spec: RunSpec, cwd: Path, function: Callable[..., Any] | None, given: Given
) -> tuple[Target, Path | None]:
    by_value = function is not None and not _importable(function)
    if function is not None and by_value:
        refuse_train_object(function)
    found, folder = (Target("value", spec.target, spec.args), cwd) if by_value else resolve(spec.target, spec.args, cwd)
    if folder is None and found.kind == "module" and not is_shared(cwd):
        folder = cwd  # an installed program imports from the current folder too
    if function is None:
        if any(given) and found.kind != "function":
            raise BadRequest(
                f"args and kwargs are for functions; {spec.target} takes strings: launch(target, '--lr', '3')."
            )
        return replace(found, values=replace(pack({}, (), *given), shown=show(*given))), folder
    try:
        values = checked_values(function, spec.args, *given, by_value=by_value)
    except ConfigError as error:
        raise BadRequest(str(error)) from None
    # Flags alone are left to the ranks, which find the same function.
    return replace(found, values=values if by_value or any(given) else Values()), folder


def _in_snapshot(found: Target, project: Path, cwd: Path, run_dir: RunDir) -> Target:
    """The target with its files and folders of code as they will lie in the snapshot."""
    parts, moved, first = snapshot.parts(project, cwd, run_dir.path, found.kind == "module")
    root = parts[0].root

    def move(file: str) -> str:
        path = Path(file)
        return str(run_dir.code / path.relative_to(root)) if root in path.parents else file

    own = str(run_dir.code / project.relative_to(root))
    path = [folder for folder in python_path(root, run_dir.code, project) if folder not in moved.values()]
    return replace(
        found,
        name=move(found.name) if found.kind == "script" else found.name,
        source=tuple(move(s) for s in found.source),
        path=tuple(dict.fromkeys([own, *first, *path])),
        moved=moved,
    )


def name_of(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', 'function')}"


def _importable(function: Callable[..., Any]) -> bool:
    """Whether another process can import `function` by its name."""
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", "<")
    return module not in (None, "__main__") and "<" not in name and hasattr(sys.modules.get(str(module)), "__file__")
