"""One train/eval function and the parts it is made of; usable with the launcher and without it."""

from training.distributed.world import World
from training.errors import CheckpointError, ConfigError

__all__ = ["CheckpointError", "ConfigError", "World"]
