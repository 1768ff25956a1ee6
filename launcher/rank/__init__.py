"""One rank: its process, its cores and its output."""
