"""Ray, through Ray Train."""
