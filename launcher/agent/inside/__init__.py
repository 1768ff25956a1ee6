"""Sessions: processes of an agent in which a client looks inside a running run."""
