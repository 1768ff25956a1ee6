"""Programs that let a peer's own code say what it would do."""
