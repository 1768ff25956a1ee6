"""Heartbeats, agreed stops, whole checkpoints and metrics for the loops of transformers, Lightning and accelerate.

Each module imports its library: `training.integrations.transformers`, `.lightning`, `.accelerate`.
"""
