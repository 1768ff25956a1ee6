"""The agents of a run, one on each node, and their coordinator."""
