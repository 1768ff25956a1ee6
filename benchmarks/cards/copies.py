"""What a save costs a step: seconds of the host, and seconds for which the device had nothing to do.

A step computes for a while, waits for the copy of the save before it, and changes every tensor of the state. On a GPU the
seconds of a step are those between two events on its stream, so that they hold what the GPU waited. Every checkpoint is read
again, and must hold the state of its step.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from training.checkpoints.manifest import load
from training.checkpoints.store import Checkpoint, Checkpoints

TENSORS = 12


class Clock:
    """Moments on the stream of a GPU, or of the host."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"

    def now(self) -> torch.cuda.Event | float:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
        if isinstance(before, float) or isinstance(after, float):
            return float(after) - float(before)  # type: ignore[arg-type]
        after.synchronize()
        return float(before.elapsed_time(after)) / 1000


class Job:
    """A state of `gib` GiB, all elements of which are the number of steps done."""

    def __init__(self, device: torch.device, gib: float, microbatches: int, folder: Path) -> None:
        size = int(gib * 2**30 / 4 / TENSORS)
        self.state = {str(number): torch.zeros(size, device=device) for number in range(TENSORS)}
        width = 8192 if device.type == "cuda" else 256
        self.matrix = torch.randn(width, width, device=device, dtype=torch.bfloat16)
        self.microbatches = microbatches
        self.store = Checkpoints(folder)
        self.number = 0

    def step(self) -> None:
        for _ in range(self.microbatches):
            _ = self.matrix @ self.matrix
        self.store.wait_for_copy()
        for tensor in self.state.values():
            tensor.add_(1)
        self.number += 1


def measure(job: Job, clock: Clock) -> None:
    """Print one line: a step alone, the call of the save, and the step beside it."""
    saved: list[Checkpoint] = []
    job.store.on_saved = saved.append
    moments = [clock.now()]
    job.step()
    moments.append(clock.now())
    plain = clock.seconds(*moments)
    number, called = job.number, time.perf_counter()
    start = clock.now()
    job.store.save(number, {"model.safetensors": job.state}, later=True)
    called = time.perf_counter() - called
    job.step()
    host = time.perf_counter()
    beside = clock.seconds(start, clock.now())
    job.store.wait()
    later = time.perf_counter() - host
    content = load(saved[0].path)["model.safetensors"]
    whole = all(bool((tensor == number).all()) for tensor in content.values())
    print(
        f"{job.microbatches:>4} products a step: alone {plain:.3f} s, beside a save {beside:.3f} s;"
        f" the call {called:.3f} s, blocked {saved[0].stall_seconds:.3f} s, committed {later:.2f} s"
        f" later; {'the state of its step' if whole else 'TORN'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=3.0, help="GiB of the state")
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args()
    count = torch.cuda.device_count()
    device = torch.device("cuda", count - 1) if count else torch.device("cpu")
    print(f"{args.gib:g} GiB on {torch.cuda.get_device_name(device) if count else 'the CPU'}")
    with torch.cuda.device(device if count else -1), tempfile.TemporaryDirectory() as folder:
        clock = Clock(device)
        for microbatches in (10, 100, 1000):
            job = Job(device, args.gib, microbatches, Path(folder) / str(microbatches))
            job.step()
            for _ in range(args.saves):
                measure(job, clock)
            job.store.close()
    if count > 1:
        print("a context on GPU 0, which this process does not use:", torch._C._cuda_hasPrimaryContext(0))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
