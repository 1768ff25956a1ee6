"""A train and evaluation function and its parts; independent of the launcher."""

from training.distributed.world import World
from training.errors import CheckpointError, ConfigError

__all__ = ["CheckpointError", "ConfigError", "World"]
