"""How the nodes of a run reach each other: addresses, the agents' connections, the store of the process groups."""
