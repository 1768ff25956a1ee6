"""Reports of training: progress, learning curve and trackers."""
