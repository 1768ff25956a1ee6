"""Programs that run the code of other projects, to compare results."""
