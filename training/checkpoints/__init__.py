"""Atomic checkpoints, verified on load."""
