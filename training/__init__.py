"""A train and evaluation function and its parts; independent of the launcher."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.distributed.world import World
    from training.errors import CheckpointError, ConfigError

__all__ = ["CheckpointError", "ConfigError", "World"]

_HOME = {"World": "distributed.world", "CheckpointError": "errors", "ConfigError": "errors"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: every process of the launcher imports this package, and most need no World."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"training.{_HOME[name]}"), name)
