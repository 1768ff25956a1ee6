"""Registry of the backends. The module of a backend is imported at its first use."""

from __future__ import annotations

import importlib

from launcher.backends.base import Backend, Capabilities
from launcher.config.cluster import BACKENDS, Cluster, no_such_backend

__all__ = ["Backend", "Capabilities", "get", "names", "of", "register", "unregister"]

_CLASSES = {
    "local": ("launcher.backends.local", "LocalBackend"),
    "slurm": ("launcher.backends.slurm.backend", "SlurmBackend"),
    "ray": ("launcher.backends.ray.backend", "RayBackend"),
    "ray_on_slurm": ("launcher.backends.ray.on_slurm", "RayOnSlurmBackend"),
}
"""Name -> module and class. `launcher.config.cluster.BACKENDS` has the names that ``--backend`` accepts."""

_SHIPPED = tuple(BACKENDS)
_registered: dict[str, Backend] = {}


def names() -> tuple[str, ...]:
    """The names that ``--backend`` and a profile's ``backend`` accept."""
    return tuple(BACKENDS)


def get(name: str) -> Backend:
    """Return the backend called `name`: one of `names`, or the `Cluster.engine` of a cluster.

    Raises:
        BadRequest: there is no such backend.
    """
    if name in _registered:
        return _registered[name]
    if name not in _CLASSES:
        raise no_such_backend(name)
    module, class_name = _CLASSES[name]
    backend: Backend = getattr(importlib.import_module(module), class_name)()
    return backend


def of(cluster: Cluster) -> Backend:
    """Return the backend of `cluster`."""
    return get(cluster.engine)


def register(backend: Backend) -> None:
    """Register `backend` in this process, in place of a shipped one of the same name; for tests."""
    _registered[backend.name] = backend
    if backend.name not in BACKENDS:
        BACKENDS.append(backend.name)


def unregister(backend: Backend) -> None:
    """Undo `register`; a shipped backend of that name is used again."""
    _registered.pop(backend.name, None)
    if backend.name in BACKENDS and backend.name not in _SHIPPED:
        BACKENDS.remove(backend.name)
