"""Cluster profiles: TOML files, found in the project, the user's folder and the ones shipped; read, and checked."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shlex
import stat
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


PROJECT = "project"


def folders(cwd: Path) -> list[tuple[str, Path]]:
    """The folders in which profiles are looked up, first match wins."""
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
    found = [(PROJECT, cwd / "cluster_configs")]
    if config_home.is_absolute():  # else this user has no home
        found.append(("user", config_home / "launch" / "cluster_configs"))
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
    found = {p.name: p for p in profiles(cwd)}
    if name not in found:
        raise BadRequest(
            f"--cluster {name!r}: no such profile{nearest(name, found)}. Known: {', '.join(sorted(found))}."
            " A path to a .toml file works too."
        )
    _check_trusted(found[name], cwd)
    return found[name].path


def _check_trusted(profile: Profile, cwd: Path) -> None:
    """Check that nobody but this user, and root, has written a profile of the working directory or can change it.

    Commands come from a profile, and one is read because it is there. One that is named by its path, and those of the
    user's own folder and of this installation, are not checked.

    Raises:
        BadRequest: another user has, or can; the owner, or the command that ends it, is named.
    """
    own = cwd / "cluster_configs"
    shipped = [folder for where, folder in folders(cwd) if where not in (PROJECT, "user")]
    if profile.where != PROJECT or any(folder.exists() and own.samefile(folder) for folder in shipped):
        return
    use = f"Read it, then name it by its path: --cluster {shlex.quote(os.path.relpath(profile.path, cwd))}."
    for path in dict.fromkeys((own, profile.path.parent, profile.path)):
        try:
            found = path.stat()
        except OSError:  # which reading it reports
            return
        if found.st_uid not in (os.geteuid(), 0):
            raise BadRequest(
                f"cluster profile {profile.path}: {path} belongs to {_user(found.st_uid)}, and you are {_user(os.geteuid())}: a"
                f" profile says which commands are run, so it is not used just because it is in this folder. {use}"
            )
        if _others_can_write(found):
            raise BadRequest(
                f"cluster profile {profile.path}: other users can change {path} (mode {stat.S_IMODE(found.st_mode):04o}), and a"
                f" profile says which commands are run. Type `chmod go-w {shlex.quote(str(path))}`. {use}"
            )


def _others_can_write(found: os.stat_result) -> bool:
    """Whether users of the group or all users can; a group of the user's own name without other members has none."""
    if found.st_mode & stat.S_IWGRP:
        try:
            group, user = grp.getgrgid(found.st_gid), pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            return True
        if group.gr_name != user or set(group.gr_mem) - {user}:
            return True
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX  # there, users remove only files of their own
    return bool(found.st_mode & stat.S_IWOTH) and not sticky


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_text(path.read_text(encoding="utf-8"), path)
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
        return {key: _native(value) for key, value in tomllib.loads(text).items()}
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits; lists thousands deep
        raise BadRequest(f"cluster profile {path}: not valid TOML: {error}.") from None


def _native(value: Any) -> Any:
    """Return `value` with strings as Python holds file names and variables, which reach programs as UTF-8 in any locale."""
    match value:
        case str():
            return os.fsdecode(value.encode())
        case dict():
            return {_native(key): _native(item) for key, item in value.items()}
        case list():
            return [_native(item) for item in value]
    return value


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
    found = {p.name: p for p in reversed(_all_profiles(cwd)) if not (p.path.exists() and p.path.samefile(path))}
    if name not in found:
        raise BadRequest(
            f"{where}: extends {name!r}: no such profile{nearest(name, found)}. Known: {', '.join(found)}."
        )
    _check_trusted(found[name], cwd)
    return found[name].path


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged
