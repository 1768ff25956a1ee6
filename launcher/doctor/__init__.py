"""Checks of this machine, an engine and its nodes."""
