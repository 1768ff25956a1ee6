"""The Python API and the handle of a run, as the submitting side has them."""
