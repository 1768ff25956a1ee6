"""``python -m launcher.client.preimport < plan.json``: import the target and check its flags, in a process of its own.

The target's imports stay out of the command, and a target that exits or crashes on import takes nothing with it.
"""

from __future__ import annotations

import io
import json
import os
import sys

from launcher.config.codec import from_data
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import Plan
from launcher.request.target import check, short_traceback
from training.errors import ConfigError


def main() -> None:
    """Exit with the text for the user where something is wrong, silently where nothing is."""
    if isinstance(sys.stderr, io.TextIOWrapper):  # in the encoding that the command reads, whatever the locale's is
        sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    plan = from_data(Plan, json.load(sys.stdin), "the plan")
    os.environ.update(plan.environment)
    try:
        check(plan.target, RunDir(plan.run_dir).arguments_pickle)
    except (BadRequest, ConfigError) as error:
        sys.exit(str(error))
    except Exception as error:  # of the target's own code, such as its `check`
        sys.exit(f"the arguments of {plan.target.name} cannot be checked:\n{short_traceback(error)}")


if __name__ == "__main__":
    main()
