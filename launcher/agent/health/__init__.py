"""Checks and records of a node."""
