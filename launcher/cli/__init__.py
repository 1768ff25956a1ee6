"""The command line: argv in, text out, exit status."""

import sys
from pathlib import Path

# The command needs the `training` beside it; PYTHONPATH may lead to a user's package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import training  # noqa: F401

sys.path.pop(0)
