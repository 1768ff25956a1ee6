"""Check that torch can use a GPU of this machine: ``python -m training.distributed.missing``."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from training.distributed.cuda_faults import driver_fault, why_no_gpu
from training.distributed.devices import RUNTIMES
from training.distributed.world import World
from training.errors import DeviceError

UNUSABLE = 3
"""Exit status of ``python -m training.distributed.missing`` if torch cannot use a GPU; stdout names the cause."""


def main() -> int:
    """Compute on the first GPU and return the exit status: 0, or UNUSABLE. Prints what was found, or the cause."""
    import torch

    try:
        torch.zeros(1, device=RUNTIMES["cuda"].device(World(device="cuda"))).item()
    except (DeviceError, RuntimeError) as error:
        visible = torch.cuda.device_count()
        cause = driver_fault(str(error)) if not isinstance(error, DeviceError) else why_no_gpu(0, visible)
        print(cause or str(error).splitlines()[0])
        return UNUSABLE
    print(found())
    return 0


def found() -> str:
    """Return the visible GPUs, and the versions that have to fit each other, in one line."""
    import torch

    names = Counter(
        f"{device.name} (compute capability {device.major}.{device.minor})"
        for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    )
    gpus = ", ".join(f"{count} x {name}" for name, count in names.items())
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    nccl = nccl if torch.distributed.is_nccl_available() else "none"
    return f"{gpus}; driver {driver()}, torch {torch.__version__} for CUDA {torch.version.cuda}, NCCL {nccl}"


def driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of NVIDIA's driver, or ``unknown``."""
    try:
        version = re.search(r"Kernel Module\b.*?\s(\d+\.[\d.]+)\s", file.read_text())
    except OSError:
        return "unknown"
    return version[1] if version else "unknown"


if __name__ == "__main__":
    sys.exit(main())
