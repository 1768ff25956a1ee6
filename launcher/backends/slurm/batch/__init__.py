"""What a job does around its agents: the lines of its script, and its requeue from inside."""
