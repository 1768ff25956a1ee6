"""Functions of the user's that a flag names: `package.module:function`."""

from __future__ import annotations

import importlib
from typing import Any

from training.errors import ConfigError


def check_function(flag: str, name: str) -> None:
    """Raise ConfigError unless `name` can be one of a function; imports nothing."""
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        raise ConfigError(f"{flag} {name}: a function of your own is written package.module:function")


def find_function(flag: str, name: str) -> Any:
    """The function `name`. Raises ConfigError where it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{flag} {name} cannot be loaded: {error}") from error
