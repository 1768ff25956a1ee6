"""Texts by which errors of drivers and libraries are classified, as data. The first sign that matches decides.

The texts are those of the sources named beside them; ``tests/launcher/error_texts.py`` has whole messages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """A text, and what an error that holds it means.

    Attributes:
        kind: a key of `launcher.lifecycle.policy.RULES`.
        pattern: matched anywhere in the message.
        advice: what to do, where that is known better than by the kind.
        lasting: the same node will never do; of the kind ``device``.
    """

    kind: str
    pattern: re.Pattern[str]
    advice: str = ""
    lasting: bool = False


def _sign(kind: str, *texts: str, advice: str = "", lasting: bool = False) -> Sign:
    return Sign(kind, re.compile("|".join(texts)), advice, lasting)


NAMES = {
    "OutOfMemoryError": "out of memory",  # torch, cupy
    "ResourceExhaustedError": "out of memory",  # tensorflow
    "DistBackendError": "communication",  # torch/csrc/Exceptions.h, as the two below
    "DistNetworkError": "communication",
    "DistStoreError": "communication",
}
"""Kinds of exceptions by their class, where their text shows no sign."""

_NEW_GPU_BUILD = (
    "Install the build of torch that fits this driver and GPU, or ask the administrators for a newer driver."
)
_SAME_CALLS = (
    "The ranks called different collectives, or the same with different shapes: every rank has to call the same ones in the"
    " same order. TORCH_DISTRIBUTED_DEBUG=DETAIL names them."
)
_HOST = "This was memory of the node, not of a GPU: ask for more of it, or use fewer loader workers or ranks a node."

SIGNS = (
    # ---- launcher.agent.hangs.detection, collectives ---------------------------------------------------------------------------------
    _sign(
        "hung",
        "did not connect to each other",
        advice="Look whether the nodes reach each other on the network interface that gloo and NCCL use (GLOO_SOCKET_IFNAME,"
        " NCCL_SOCKET_IFNAME under [environment] of the profile), on all ports; `launch doctor --on-nodes` measures it. The"
        " logs of a second attempt have what NCCL says (NCCL_DEBUG=INFO).",
    ),
    _sign("user error", "the ranks disagree on collective #", advice=_SAME_CALLS),
    # ---- ranks that misuse a collective: NCCL src/init.cc, src/misc/argcheck.cc; torch/csrc/distributed/c10d ------------
    _sign(
        "user error",
        "Duplicate GPU detected",
        advice="Two ranks use the same GPU: give each its own, `torch.cuda.set_device(int(os.environ['LOCAL_RANK']))`"
        " before the process group is made. NCCL takes no two MIG instances of one card.",
    ),
    _sign(
        "user error",
        "doesn't have NCCL built in",
        "doesn't have MPI built in",
        "NCCL support not built",
        r"\b(NCCL|nccl)\b[^\n]*\b(not found|not available|not installed)\b",
        r"\b[Rr]equires NCCL\b",
        advice="Use the build of torch for CUDA, or the backend that fits the device (gloo on CPUs).",
    ),
    _sign(
        "user error",
        "Detected mismatch between collectives on ranks",
        "Error when verifying shape tensors for collective",
        "Mismatch between collective operation types across ranks",
        r"op\.preamble\.length <= op\.nbytes",
        "Is there a distributed collective mismatch in your code",
        "DDP expects same model across all ranks",
        "Expected to have finished reduction in the prior iteration",
        "appears not to match sizes of the same param in process 0",
        advice=_SAME_CALLS,
    ),
    _sign(
        "user error",
        "ncclInvalidUsage",
        "ncclInvalidArgument",
        r"NCCL.*\binvalid (usage|argument)\b",
        "No backend type associated with device type",
        r"(Backend|ProcessGroup)[^\n]{0,60} does not support",
        r"ProcessGroup(NCCL|Gloo|MPI)::\w+: ",
        "Tensors must be (CUDA and dense|contiguous)",
        "Tensor list must",
        advice="A collective was called in a way that its library does not allow; NCCL_DEBUG=WARN says how.",
    ),
    # ---- memory of the node: c10/core/impl/alloc_cpu.cpp, ATen/MapAllocator.cpp, torch/utils/data/_utils/signal_handling.py
    _sign(
        "communication",
        r"ibv_reg_mr\w* failed",  # a limit on locked memory, NCCL src/misc/ibvwrap.cc
        advice="The network card could not lock memory: raise the limit (ulimit -l unlimited) on the nodes.",
    ),
    _sign(
        "out of memory",
        "the kernel killed the process for memory",
        "DefaultCPUAllocator: (can't allocate|not enough) memory",
        "DefaultCPUAllocator: .* Cannot allocate memory",
        r"unable to \w+ shared memory",
        "Cannot allocate memory",
        "Failed to CUDA host alloc",
        r"cudaHostAlloc.*out of memory",
        "C10 Out of Memory",
        r"\bstd::bad_alloc\b",
        advice=_HOST,
    ),
    _sign(
        "out of memory",
        r"</?(dev/shm/|torch_)[^\n]*No space left on device",
        r"/dev/shm/nccl[^\n]*No space left on device",  # NCCL src/misc/shmutils.cc
        "out of shared memory",
        advice="The node's shared memory (/dev/shm) is too small: give it more (a container's --shm-size), or use fewer loader"
        " workers.",
    ),
    _sign("disk full", "No space left on device", "Disk quota exceeded", r"kind: StorageFull\b"),  # safetensors, shutil
    _sign(
        "killed",
        r"DataLoader worker \(pid [^)]*\) is killed by signal: Killed",
        advice="A loader worker was killed, most likely for memory: ask for more memory, or use fewer workers; then"
        " `launch resume`.",
    ),
    # ---- memory of a GPU or TPU: c10/cuda/CUDACachingAllocator.cpp, driver_types.h, cublas_api.h, cudnn_graph.h -----------
    _sign(
        "out of memory",
        r"\b(CUDA|HIP|XPU|NPU|MPS|MUSA|cuda)\b[^\n]*\bout of memory\b",
        r"\b(CUDA|HIP)_ERROR_OUT_OF_MEMORY\b",
        r"\b(cuda|hip)Error(MemoryAllocation|OutOfMemory)\b",
        r"\b\w+_ALLOC_FAILED\b",  # cuBLAS, cuDNN, cuFFT, cuSOLVER, cuSPARSE and those of ROCm
        r"CUDNN_STATUS_INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION_FAILED",
        "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
        r"CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # its handle needs memory
        r"Cuda failure (\d+ )?'out of memory'",  # NCCL src/include/checks.h
        "Failed to CUDA (calloc|malloc)",  # NCCL src/include/alloc.h
        r"RESOURCE_EXHAUSTED:[^\n]*(memory|allocat)",  # XLA, TPU
        "Ran out of memory in memory space hbm",
        "Attempting to (allocate|reserve) .* That was not possible",  # TPU runtime
    ),
    # ---- no device for this software: c10/cuda/CUDAFunctions.cpp, torch/csrc/cuda/Module.cpp, torch/cuda/__init__.py ------
    _sign(
        "device",
        "Torch not compiled with CUDA enabled",
        "Found no NVIDIA driver on your system",
        "The NVIDIA driver on your system is too old",
        "CUDA driver version is insufficient for CUDA runtime version",
        "forward compatibility was attempted on non supported HW",
        "system has unsupported display driver / cuda driver combination",
        "no kernel image is available for execution on the device",
        "the provided PTX was compiled with an unsupported toolchain",
        "Driver/library version mismatch",
        "NVML/RM version mismatch",
        advice=_NEW_GPU_BUILD,
        lasting=True,
    ),
    _sign(
        "device",
        "No CUDA GPUs are available",
        "no CUDA-capable device is detected",
        "ProcessGroupNCCL is only supported with GPUs, no GPUs found",
        "CUDA driver initialization failed, you might not have a CUDA gpu",
        r"\bCUDA_ERROR_NO_DEVICE\b",
        "No visible TPU devices",
        lasting=True,
    ),
    # ---- a device or its driver that is sick or busy: CUDA runtime API (cudaError_t), NVML (nvmlReturn_t), Xid ------------
    _sign(
        "device",
        "uncorrectable ECC error",
        "[Dd]ouble[- ][Bb]it ECC",
        r"\bNV[Ll]ink\b[^\n]*\b(error|fatal)\b",
        r"\bCUDA_ERROR_(ECC_UNCORRECTABLE|NVLINK_UNCORRECTABLE|DEVICE_UNAVAILABLE|SYSTEM_NOT_READY|UNKNOWN|CONTAINED)\b",
        r"\bcudaError(ECCUncorrectable|NvlinkUncorrectable|DevicesUnavailable|SystemNotReady|Unknown|Contained)\b",
        "Invalid access of peer GPU memory over nvlink or a hardware error",
        "fallen off the bus",
        "GPU is lost",
        r"NVRM: Xid|\bXid \(PCI:|\bXid error\b",
        "hardware stack error",
        "system not yet initialized",
        r"CUDA-capable (device\(s\) is/are|devices are) busy or unavailable",
        "exclusive-thread device already in use by a different thread",
        "OS call failed or operation not supported on this OS",
        r"(CUDA|cuda|HIP)[^\n]*: unknown error",
        r"Cuda failure (\d+ )?'unknown error'",
        "MPS client failed to connect",
        "MPS server is not ready",
        "remote procedural call between the MPS server and the MPS client failed",
        "Unexpected error from cudaGetDeviceCount",
        "CUDA unknown error - this may be due to an incorrectly set up environment",
        "Unable to determine the device handle for",
        "(Failed to|Can't) initialize NVML",
        "^Driver Not Loaded",
        r"nvmlInit\w*\(?\)? failed",
        r"The TPU is already in use by",  # libtpu, as the ones below
        r"Couldn't open (iommu group|device)[^\n]*(/dev/vfio|/dev/accel)",
        "Failed to get global TPU topology",
        "TPU initialization failed",
    ),
    # ---- mistakes that come as an error of a collective -------------------------------------------------------------------
    _sign(
        "user error",
        "an illegal memory access was encountered",
        "device-side assert triggered",
        "an illegal instruction was encountered",
        "misaligned address",
        "Cannot re-initialize CUDA in forked subprocess",
        advice="CUDA_LAUNCH_BLOCKING=1 shows the operation that fails; fix it and start again.",
    ),
    # ---- failed communication between ranks: torch/csrc/distributed/c10d, third_party/gloo --------------------------------
    _sign(
        "communication",
        "Connection closed by peer",
        "Connection reset by peer",
        r"\bgloo\b",
        r"\bNCCL\b",
        r"\bnccl[A-Z]\w+Error\b",
        "Broken pipe",
        "ProcessGroup",
        r"Process group watchdog",
        "Watchdog caught collective operation timeout",
        "monitoredBarrier",
        "The client socket has (timed out|failed to connect)",
        "wait timeout after \\d+ms",
        "Socket Timeout",
        "Connection was likely closed",
    ),
)
"""In the order in which they are looked for: what names the cause comes before what names only the place."""
