"""What the two logs of a run add up to: digests that grow with the files, and an index of them in the user's cache."""
