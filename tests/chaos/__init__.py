"""Inject faults into real runs on real engines: ``python -m tests.chaos --backend local,slurm,ray --seed 1 --faults 20``."""
