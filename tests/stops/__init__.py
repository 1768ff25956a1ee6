"""The stop table: what each kind of stop makes of each kind of program, on each engine."""
