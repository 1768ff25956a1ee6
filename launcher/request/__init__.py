"""The request: what to run, with which code, on what."""
