"""Look inside a running run: the client's side of `launcher.agent.inside`."""
