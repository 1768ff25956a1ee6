"""Flags of the command line from the fields of a dataclass; see `training.flags.fields`.

It imports nothing: `training.flags.typed` is read by commands that need no flags.
"""
