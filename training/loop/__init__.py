"""The training loop of a user's own function: models, steps, saved state and evaluation."""
