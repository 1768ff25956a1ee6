"""Measurements: each prints one table, ours beside the peer, same work, same run, as a ratio of medians."""
