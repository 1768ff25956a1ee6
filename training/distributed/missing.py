"""Check that torch can use a GPU of this machine: ``python -m training.distributed.missing``."""

from __future__ import annotations

import sys

from training.distributed.cuda_faults import driver_fault, why_no_gpu
from training.distributed.devices import RUNTIMES
from training.distributed.world import World
from training.errors import DeviceError

UNUSABLE = 3
"""Exit status of ``python -m training.distributed.missing`` if torch cannot use a GPU; stdout names the cause."""


def main() -> int:
    """Compute on the first GPU and return the exit status: 0, or UNUSABLE."""
    import torch

    try:
        torch.zeros(1, device=RUNTIMES["cuda"].device(World(device="cuda"))).item()
    except (DeviceError, RuntimeError) as error:
        visible = torch.cuda.device_count()
        cause = driver_fault(str(error)) if not isinstance(error, DeviceError) else why_no_gpu(0, visible)
        print(cause or str(error).splitlines()[0])
        return UNUSABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
