"""``python -m launcher.check RUN_DIR``: import the target and check its flags, in a process of its own.

The target's imports stay out of the command, and a target that exits or crashes on import takes nothing with it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launcher.errors import BadRequest
from launcher.rundir import RunDir
from launcher.target import check
from training.errors import ConfigError


def main() -> None:
    """Exit with the text for the user where something is wrong, silently where nothing is."""
    plan = RunDir(Path(sys.argv[1])).plan()
    os.environ.update(plan.environment)
    try:
        check(plan.target)
    except (BadRequest, ConfigError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
