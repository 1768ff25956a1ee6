"""The order of samples, and batches prepared ahead."""
