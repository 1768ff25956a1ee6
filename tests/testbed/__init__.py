"""Real clusters on one machine, for tests and for hand use: see ``slurm.py`` and ``ray.py``."""
