"""The order of samples, and prefetching of batches."""
