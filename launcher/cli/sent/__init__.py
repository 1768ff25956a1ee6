"""Commands on runs that were sent, except for resuming one."""
