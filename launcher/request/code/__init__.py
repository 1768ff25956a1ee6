"""What travels with a run: the code of its project, read without executing anything of it."""
