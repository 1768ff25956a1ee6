"""Flags of the command line from the fields of a dataclass; see `training.flags.fields`."""

from training.flags.fields import build, check_function, check_type, dataclass_of, find_function, parse, read, usage

__all__ = ["build", "check_function", "check_type", "dataclass_of", "find_function", "parse", "read", "usage"]
