"""Hangs: their detection, and the rank that caused one."""
