"""How the cost of a run grows with its nodes, and that of looking at runs: ``python -m benchmarks.scale``.

The parts are `benchmarks.scale_agents` and, if it is there, `benchmarks.scale_looking`; each can be run alone, with its sizes.
"""

from __future__ import annotations

import importlib
import importlib.util

PARTS = ("benchmarks.scale_agents", "benchmarks.scale_looking")


def main() -> None:
    for part in PARTS:
        if importlib.util.find_spec(part) is not None:
            importlib.import_module(part).main()


if __name__ == "__main__":
    main()
