"""What a run shows of its training: progress, curves and trackers."""
