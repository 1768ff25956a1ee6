"""Count steps until the file `enough` exists; a function with a Context that treats a stop as its argument says."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from training.context import Context


class Counter:
    """The state of the program: the number of steps done."""

    value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def main(ctx: Context, way: str, folder: Path) -> dict[str, Any] | None:
    rank = ctx.world.rank
    folder.mkdir(exist_ok=True)
    counter = Counter()
    state = ctx.state(counter=counter)
    state.restore()
    with (folder / f"{rank}.first").open("a") as lines:
        lines.write(f"{counter.value + 1}\n")
    while True:
        time.sleep(0.02)
        counter.value += 1
        (folder / f".{rank}.step").write_text(str(counter.value))
        (folder / f".{rank}.step").replace(folder / f"{rank}.step")
        enough = (folder / "enough").exists()
        if way == "function, one ended":
            enough = enough or (rank == 0 and counter.value >= 3)
        else:
            enough = ctx.group.broadcast(enough)
        if enough:
            return {"steps": counter.value}
        if way != "function, silent":
            ctx.log(counter.value, loss=1.0)
        if way in ("function, silent", "function, never asks", "function, one ended"):
            continue
        saving = None if way == "function, saves nothing" else state
        if ctx.should_stop(counter.value, save=saving):
            if saving is not None and rank == 0:
                (folder / "0.saved").write_text(str(counter.value))
            if way == "function, exits 0":
                sys.exit(0)
            if way == "function, exits 143":
                sys.exit(143)
            if way == "function, raises":
                raise RuntimeError("stopped by the launcher")
            return {"steps": counter.value}


if __name__ == "__main__":  # a script with a Context
    main(Context.current(), sys.argv[1], Path(sys.argv[2]))
