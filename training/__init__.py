"""One train/eval function and the parts it is made of; usable with the launcher and without it."""

from training.errors import CheckpointError, ConfigError
from training.world import World

__all__ = ["CheckpointError", "ConfigError", "World"]
