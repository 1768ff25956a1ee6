"""A script that counts steps and does on SIGTERM what its first argument says; it knows nothing of the launcher."""

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
    time.sleep(0.7)  # longer than the others get after a rank that fails by itself
    saved.write_text(str(step))
    print(f"saved at {step}", flush=True)
    if way == "raises":
        raise RuntimeError("stopped by SIGTERM")
    sys.exit(int(way))


if way == "differ":  # rank 0 ends before the stop, the others end themselves at it
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
if len(sys.argv) > 3:  # complete, and then busy with something that may be interrupted
    Path(os.environ["LAUNCH_FINISHED"]).touch()
    time.sleep(600)
