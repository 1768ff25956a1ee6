"""Checkpoints: whole or absent, verified on load."""
