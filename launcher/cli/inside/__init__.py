"""Commands that look inside a running run."""
