"""Cluster profiles: TOML files, found in the project, the user's folder and the ones shipped; read, and checked."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.config.cluster import BACKENDS, Cluster, no_such_backend
from launcher.config.codec import from_data
from launcher.config.profile_checks import check_cluster, check_texts
from launcher.errors import BadRequest, nearest
from training.flags.typed import brief


@dataclass(frozen=True)
class Profile:
    """A profile that was found: its name, its file, and where that kind of place is."""

    name: str
    path: Path
    where: str


def folders(cwd: Path) -> list[tuple[str, Path]]:
    """The folders in which profiles are looked up, first match wins."""
    config_home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    found = [("project", cwd / "cluster_configs"), ("user", Path(config_home) / "launch" / "cluster_configs")]
    shipped = find_spec("cluster_configs")
    if shipped and shipped.submodule_search_locations:
        found += [("shipped", Path(p)) for p in shipped.submodule_search_locations]
    return found


def profiles(cwd: Path) -> list[Profile]:
    """All profiles that can be named with ``--cluster``, in look-up order, without those that an earlier one hides."""
    seen: dict[str, Profile] = {}
    for profile in _all_profiles(cwd):
        seen.setdefault(profile.name, profile)
    return list(seen.values())


def _all_profiles(cwd: Path) -> list[Profile]:
    return [
        Profile(path.relative_to(folder).with_suffix("").as_posix(), path, where)
        for where, folder in folders(cwd)
        for path in sorted(folder.glob("*.toml")) + sorted(folder.glob("examples/*.toml"))
    ]


def choose(cluster: str | None, backend: str | None, cwd: Path, settings: Sequence[str] = ()) -> Cluster:
    """Return the cluster that ``--cluster`` and ``--backend`` ask for; without either, this machine.

    Args:
        settings: ``KEY=VALUE`` each, a key of the profile with dots, and its value as in TOML or a bare text.

    Raises:
        BadRequest: there is no such backend or profile, the two contradict each other, or a setting is wrong.
    """
    if backend is not None and backend not in BACKENDS:
        raise no_such_backend(backend)
    name = cluster or backend or BACKENDS[0]
    path: Path | None = None
    data: dict[str, Any] = {"backend": name}  # a registered backend comes without a profile
    if cluster is not None or name in {profile.name for profile in profiles(cwd)}:
        path = _find(name, cwd)
        data = _read(path)
    site = Cluster(name, name) if path is None else parse(data, path, cwd)
    if backend is not None and backend != site.backend:
        raise BadRequest(f"--backend {backend} --cluster {cluster}: that cluster's backend is {site.backend}.")
    for setting in settings:
        data, site = _with_setting(setting, data, path or cwd / f"{name}.toml", cwd, site)
    return site


def _with_setting(
    setting: str, data: dict[str, Any], path: Path, cwd: Path, site: Cluster
) -> tuple[dict[str, Any], Cluster]:
    """The content of a profile, and the cluster that it describes, with one more ``KEY=VALUE``."""
    key, equals, text = setting.partition("=")
    where = f"--set {brief(setting, 80)}"
    if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*", key):
        raise BadRequest(f"{where}: write KEY=VALUE with a key of the profile, such as slurm.partition=gpu.")
    first = key.partition(".")[0]
    if first in ("name", "backend", "extends", "kinds"):
        instead = {"backend": "use --backend or --cluster", "name": "--name is the run's name"}
        raise BadRequest(f"{where}: {first} is not set for one run; {instead.get(first, 'write a profile')}.")
    if first in BACKENDS and first not in (site.backend, site.engine.rpartition("_")[2]):
        raise BadRequest(
            f"{where}: {key} is a setting of the backend {first}, and this run goes to {site.backend}. Add --backend {first},"
            f" or --cluster with a profile of it."
        )
    refused: BadRequest | None = None
    for value in [text] if first == "environment" else _values(text):
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        changed = _merge(data, nested)
        try:
            return changed, parse(changed, path, cwd, where)
        except BadRequest as error:
            refused = refused or error
    assert refused is not None, "there is at least one value"
    raise refused


def _values(text: str) -> list[Any]:
    """What `text` may stand for: the value that it is in TOML, and itself."""
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return [text]
    value = read.get("value")
    return [value, text] if len(read) == 1 and isinstance(value, bool | int | float | str | list) else [text]


def load(name: str, cwd: Path) -> Cluster:
    """Read the profile called `name`, or the file at that path.

    Raises:
        BadRequest: no such profile, not TOML, an unknown key or an unusable value.
    """
    path = _find(name, cwd)
    return parse(_read(path), path, cwd)


def _find(name: str, cwd: Path) -> Path:
    """The file of the profile called `name`, or at that path."""
    if Path(name).suffix == ".toml":
        return cwd / name
    found = {p.name: p.path for p in profiles(cwd)}
    if name not in found:
        raise BadRequest(
            f"--cluster {name!r}: no such profile{nearest(name, found)}. Known: {', '.join(sorted(found))}."
            " A path to a .toml file works too."
        )
    return found[name]


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_text(path.read_text(), path)
    except OSError as error:
        raise BadRequest(f"cluster profile {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"cluster profile {path}: not valid TOML: {error}.") from None


def read_text(text: str, path: Path) -> dict[str, Any]:
    """The content of the profile `text`, which is or will be the file at `path`.

    Raises:
        BadRequest: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits; lists thousands deep
        raise BadRequest(f"cluster profile {path}: not valid TOML: {error}.") from None


def parse(data: Mapping[str, Any], path: Path, cwd: Path, where: str = "") -> Cluster:
    """Turn the content of the profile at `path` into a `Cluster`; ``extends`` names the profile it builds on.

    Errors begin with `where`, by default the path.
    """
    data = dict(data)
    where = where or f"cluster profile {path}"
    if "extends" in data:
        base = str(data.pop("extends"))
        parent = _read(_base(base, path, cwd, where))
        if "extends" in parent:
            raise BadRequest(f"{where}: extends {base!r}, which itself extends another; one level is allowed.")
        data = _merge(parent, data)
    check_texts(data, where)
    cluster = from_data(Cluster, {"name": path.stem, **data}, where)
    check_cluster(cluster, where)
    paths = {"runs": cluster.runs} | ({"hub_cache": cluster.hub_cache} if cluster.hub_cache else {})
    for key, value in paths.items():
        paths[key] = os.path.expanduser(os.path.expandvars(value))
        if "$" in paths[key]:
            raise BadRequest(f"{where}: {key} = {value!r} names a variable that is not set here.")
        if paths[key].startswith("~"):
            raise BadRequest(f"{where}: {key} = {value!r} names a user that does not exist here.")
    return replace(cluster, runs=paths["runs"], hub_cache=paths.get("hub_cache"))


def _base(name: str, path: Path, cwd: Path, where: str) -> Path:
    """The profile `name`, looked up like any other; one that bears its own base's name builds on the one it hides."""
    found = {p.name: p.path for p in reversed(_all_profiles(cwd)) if not (p.path.exists() and p.path.samefile(path))}
    if name not in found:
        raise BadRequest(
            f"{where}: extends {name!r}: no such profile{nearest(name, found)}. Known: {', '.join(found)}."
        )
    return found[name]


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged
