"""What the files of a run say: types of its result, digests of its two logs, and an index of large ones in the user's cache."""
