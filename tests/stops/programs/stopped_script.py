"""Count steps until the file `enough` exists; handle SIGTERM as the first argument says. Without code for the launcher.

Files in the folder that the second argument names: <rank>.step, <rank>.saved, <rank>.first (a line for each start), <rank>.handled (a
line for each SIGTERM).
"""

import os
import signal
import sys
import time
from pathlib import Path

way, rank = sys.argv[1], int(os.environ["RANK"])
folder = Path(sys.argv[2])
folder.mkdir(exist_ok=True)


def file(kind: str) -> Path:
    return folder / f"{rank}.{kind}"


def replace(kind: str, text: object) -> None:
    (folder / f".{rank}.{kind}").write_text(str(text))
    os.replace(folder / f".{rank}.{kind}", file(kind))


def add(kind: str, text: object) -> None:
    with file(kind).open("a") as lines:
        lines.write(f"{text}\n")


def save(*_: object) -> None:
    add("handled", step)
    time.sleep(0.7)  # longer than other ranks have after one failed
    replace("saved", step)
    print(f"saved at {step}", flush=True)
    if way == "raises":
        raise RuntimeError("stopped by SIGTERM")
    if way == "interrupts":
        raise KeyboardInterrupt
    if way == "hard exit 1":
        os._exit(1)
    sys.exit(int(way) if way.isdigit() else 0)


step = int(file("saved").read_text()) if file("saved").exists() else 0
if way == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif way not in ("no handler", "one ended, no handler"):
    signal.signal(signal.SIGTERM, save)
if way == "one saves" and rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
if way == "finished":
    Path(os.environ["LAUNCH_FINISHED"]).touch()
add("first", step + 1)
while True:
    time.sleep(0.02)
    step += 1
    replace("step", step)
    if (folder / "enough").exists() or (way.startswith("one ended") and rank == 0 and step >= 3):
        break
print(f"done at {step}", flush=True)
