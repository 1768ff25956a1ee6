"""The run directory and the rules by which a run ends or goes on."""
