"""Lines for other programs: torchrun, accelerate, sbatch, srun, and batch scripts."""
