"""A script that counts steps and handles SIGTERM by its first argument; without code for the launcher."""

import os
import signal
import sys
import time
from pathlib import Path

way, steps = sys.argv[1], int(sys.argv[2])
rank = int(os.environ["RANK"])
saved = Path(f"saved-{rank}")


def save(*_: object) -> None:
    with open(f"handled-{rank}", "a") as handled:
        handled.write(f"{step}\n")
    time.sleep(0.7)  # longer than other ranks have after one failed
    saved.write_text(str(step))
    print(f"saved at {step}", flush=True)
    if way == "raises":
        raise RuntimeError("stopped by SIGTERM")
    sys.exit(int(way))


if way == "differ":  # rank 0 exits before the stop, the others at the stop
    way = "0"
    steps = 3 if rank == 0 else steps
if way == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif way != "default":
    signal.signal(signal.SIGTERM, save)
step = int(saved.read_text()) if saved.exists() else 0
while step < steps:
    time.sleep(0.02)
    step += 1
    Path(f"step-{rank}").write_text(str(step))
print(f"done at {step}", flush=True)
if len(sys.argv) > 3:  # complete, then busy with work that may be interrupted
    Path(os.environ["LAUNCH_FINISHED"]).touch()
    time.sleep(600)
