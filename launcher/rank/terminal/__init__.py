"""The terminal of a single local rank: what the agent relays, and what the rank reports about its prompts."""
