"""``launch clusters new``: write a first profile of the available SLURM or Ray, with comments."""

from __future__ import annotations

from pathlib import Path

from launcher import backends
from launcher.backends import Backend
from launcher.config import profiles
from launcher.errors import BadRequest
from launcher.request.spec import check_name
from training.files import write_atomic


def create(name: str, backend: str | None, cwd: Path) -> Path:
    """Write ``./cluster_configs/NAME.toml`` for the available engine and return its path.

    Raises:
        BadRequest: no engine is available, it cannot be reached, or a profile of that name is there.
    """
    check_name(name)
    path = cwd / "cluster_configs" / f"{name}.toml"
    if path.exists():
        raise BadRequest(f"{path} exists already. Another name writes another profile: launch clusters new NAME.")
    text = _choose(backend).new_profile()
    profiles.parse(profiles.read_text(text, path), path, cwd)  # what is written can be read
    path.parent.mkdir(0o755, exist_ok=True)
    write_atomic(path, text, 0o644)  # a profile that others can change is not used
    return path


def _choose(name: str | None) -> Backend:
    """The backend called `name`; without a name, the first available one."""
    clusters = {known: backends.get(known) for known in backends.names()}
    clusters = {known: backend for known, backend in clusters.items() if backend.capabilities.multi_node}
    if name is not None and name not in clusters:
        raise BadRequest(f"--backend {name}: a profile is written for {' or '.join(clusters)}.")
    chosen = clusters[name] if name else next((each for each in clusters.values() if each.at_hand()), None)
    if chosen is None:
        raise BadRequest(
            "no SLURM (the command sinfo) and no Ray (RAY_ADDRESS) is available. Log in to a submission host, set"
            " RAY_ADDRESS, or say which with --backend."
        )
    return chosen
