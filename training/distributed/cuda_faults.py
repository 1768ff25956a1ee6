"""Explain why torch cannot use a GPU: a CPU build, an old driver, or CUDA_VISIBLE_DEVICES.

Source of the error texts: c10/cuda/CUDAFunctions.cpp and torch/cuda/__init__.py.
"""

from __future__ import annotations

import os
import re

from training.distributed.visible import visible_devices


def why_no_gpu(index: int, visible: int, problem: str = "") -> str:
    """Return the likely cause that torch cannot use GPU `index` of `visible` ones.

    `problem` is the error of CUDA, if known; without it, CUDA is initialized if torch sees no GPU.
    """
    import torch

    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == 0 and torch.version.cuda is None and torch.version.hip is None:
        return f"torch is a CPU build ({torch.__version__}); install its build for CUDA"
    if visible == 0:
        problem = problem or _cuda_error()
    if found := driver_fault(problem):
        return found
    if variable is not None:
        named = len(visible_devices(variable) or ())
        if visible or named == 0:
            return f"CUDA_VISIBLE_DEVICES={variable!r} shows {visible}, and hides the others if there are any"
        return f"CUDA_VISIBLE_DEVICES={variable!r} names no GPU that this machine has, or is not whole"
    if visible:
        return f"this machine has no more than {visible}"
    return "the driver shows no GPU" + (f" ({problem.splitlines()[0]})" if problem else "")


def driver_fault(problem: str) -> str:
    """Return the fault of the driver or the build of torch that the error text `problem` names; else an empty string."""
    import torch

    if "too old" in problem or "driver version is insufficient" in problem:
        found = re.search(r"found version (\d+)", problem)
        has = f"it supports CUDA {_version(int(found[1]))}" if found else "its version is in nvidia-smi"
        return (
            f"the NVIDIA driver is too old: {has}, and torch {torch.__version__} was built for CUDA {torch.version.cuda};"
            " install the build of torch for that CUDA, or have the driver updated"
        )
    if "Found no NVIDIA driver" in problem:
        return "there is no NVIDIA driver"
    if "not compiled with CUDA" in problem:
        return f"torch is a CPU build ({torch.__version__}); install its build for CUDA"
    return ""


def _version(number: int) -> str:
    """12020 -> 12.2. Source: cudaDriverGetVersion, 1000 major + 10 minor."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _cuda_error() -> str:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return ""
