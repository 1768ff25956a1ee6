"""Figures, limits and wording of the two packages, read from their sources without importing them."""
