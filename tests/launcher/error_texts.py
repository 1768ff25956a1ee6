"""Error texts of drivers and libraries: exception class, text, expected kind, source.

A source is a function or file of the named project; texts of real runs are shortened.
"""

from __future__ import annotations

HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be"
    " incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable"
    " device-side assertions."
)
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, "


def nccl(what: str, code: str, meaning: str, last: str) -> str:
    """A text of torch's C10D_NCCL_CHECK with ncclGetLastError. Source: c10d/NCCLUtils.hpp, getNcclErrorDetailStr."""
    more = f"{NCCL}{what} (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\n{code}: {meaning}\nLast error:\n{last}"
    return more.rstrip("\n")


UNHANDLED = ("unhandled cuda error", "ncclUnhandledCudaError", "Call to CUDA function failed.")
SYSTEM = (
    "unhandled system error",
    "ncclSystemError",
    "System call (e.g. socket, malloc) or external library call failed or device error.",
)
REMOTE = (
    "remote process exited or there was a network error",
    "ncclRemoteError",
    "A call failed possibly due to a network error or a remote process exiting prematurely.",
)
USAGE = ("invalid usage", "ncclInvalidUsage", "This usually reflects invalid usage of NCCL library.")
ARGUMENT = ("invalid argument", "ncclInvalidArgument", "Invalid value for an argument.")
INTERNAL = (
    "internal error - please report this issue to the NCCL developers",
    "ncclInternalError",
    "Internal check failed.",
)

TEXTS: list[tuple[str, str, str, str]] = [
    # ---- memory of the device ---------------------------------------------------------------------------------------
    (
        "OutOfMemoryError",
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 9.06 GiB is free.",
        "out of memory",
        "c10/cuda/CUDACachingAllocator.cpp, malloc",
    ),
    (
        "RuntimeError",
        "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 15.78 GiB total capacity; 14.50 GiB already allocated)",
        "out of memory",
        "the same before torch 1.13; also what a loader's thread raises again, torch/_utils.py ExceptionWrapper.reraise",
    ),
    (
        "RuntimeError",
        (
            "Caught RuntimeError in pin memory thread for device 0.\nOriginal Traceback (most recent call last):\n  ...\n"
            f"RuntimeError: CUDA error: out of memory{HINT}"
        ),
        "out of memory",
        "torch/utils/data/_utils/pin_memory.py, through ExceptionWrapper; cudaHostAlloc",
    ),
    (
        "AcceleratorError",
        f"CUDA error: out of memory{HINT}",
        "out of memory",
        "cudaErrorMemoryAllocation (2), c10_cuda_check",
    ),
    ("RuntimeError", "CUDA driver error: out of memory", "out of memory", "C10_CUDA_DRIVER_CHECK, expandable segments"),
    ("RuntimeError", "HIP out of memory. Tried to allocate 2.00 GiB.", "out of memory", "the same, hipified"),
    (
        "RuntimeError",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "out of memory",
        "cublas_api.h; ATen/cuda/Exceptions.h TORCH_CUDABLAS_CHECK",
    ),
    (
        "RuntimeError",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "out of memory",
        "ATen/cuda/CublasHandlePool.cpp: no memory is left for the handle",
    ),
    ("RuntimeError", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "out of memory", "cudnn_ops.h; ATen/cudnn/Exceptions.h"),
    (
        "RuntimeError",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "out of memory",
        "cudnn_graph.h of cuDNN 9, cudnnStatus_t",
    ),
    ("RuntimeError", "cuFFT error: CUFFT_ALLOC_FAILED", "out of memory", "cufft.h; ATen/native/cuda/CuFFTUtils.h"),
    (
        "RuntimeError",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `x`",
        "out of memory",
        "cusolver_common.h",
    ),
    (
        "RuntimeError",
        "CUDA error: insufficient resources when calling `cusparseSpMM`: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
        "out of memory",
        "cusparse.h",
    ),
    (
        "CUDARuntimeError",
        "cudaErrorMemoryAllocation: out of memory",
        "out of memory",
        "cupy_backends/cuda/api/runtime.pyx, CUDARuntimeError",
    ),
    (
        "CudaAPIError",
        "[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY",
        "out of memory",
        "numba/cuda/cudadrv/driver.py, CudaAPIError",
    ),
    (
        "XlaRuntimeError",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.07G of 15.48G",
        "out of memory",
        "XLA, absl::StatusCode kResourceExhausted",
    ),
    # ---- memory of the node -----------------------------------------------------------------------------------------
    (
        "RuntimeError",
        (
            "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            " 400000000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
        "out of memory",
        "c10/core/impl/alloc_cpu.cpp, alloc_cpu (also in the wheel: strings libc10.so)",
    ),
    (
        "RuntimeError",
        "unable to mmap 4194304 bytes from file </dev/shm/torch_1>: Cannot allocate memory (12)",
        "out of memory",
        "ATen/MapAllocator.cpp",
    ),
    (
        "RuntimeError",
        "unable to write to file </torch_4242_1_0>: No space left on device (28)",
        "out of memory",
        "ATen/MapAllocator.cpp: /dev/shm is memory",
    ),
    (
        "RuntimeError",
        (
            "DataLoader worker (pid 77) is killed by signal: Bus error. It is possible that dataloader's workers are out of"
            " shared memory. Please try to raise your shared memory limit."
        ),
        "out of memory",
        "torch/csrc/DataLoader.cpp, and torch/utils/data/_utils/signal_handling.py",
    ),
    ("OSError", "[Errno 12] Cannot allocate memory", "out of memory", "errno.h ENOMEM"),
    (
        "RuntimeError",
        "DataLoader worker (pid 77) is killed by signal: Killed. ",
        "killed",
        "torch/csrc/DataLoader.cpp, _error_if_any_worker_fails",
    ),
    (
        "RuntimeError",
        "unable to resize file <checkpoint.bin> to the right size: No space left on device (28)",
        "disk full",
        "ATen/MapAllocator.cpp, of a file that is no memory",
    ),
    (
        "SafetensorError",
        'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }',
        "disk full",
        "safetensors, serialize_file; the words are of Rust's std::io::Error",
    ),
    # ---- NCCL ---------------------------------------------------------------------------------------------------------
    (
        "DistBackendError",
        nccl(*UNHANDLED, "Cuda failure 2 'out of memory'"),
        "out of memory",
        "nccl src/include/checks.h, CUDACHECK",
    ),
    (
        "DistBackendError",
        nccl(*UNHANDLED, "Cuda failure 'out of memory'"),
        "out of memory",
        "the same before NCCL 2.22",
    ),
    (
        "DistBackendError",
        nccl(*UNHANDLED, "Failed to CUDA calloc async 608 bytes"),
        "out of memory",
        "nccl src/include/alloc.h, ncclCudaCallocAsync",
    ),
    (
        "DistBackendError",
        nccl(*USAGE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"),
        "user error",
        "nccl src/init.cc, initTransportsRank",
    ),
    ("DistBackendError", nccl(*USAGE, ""), "user error", "nccl src/init.cc, ncclGetErrorString"),
    (
        "DistBackendError",
        nccl(*ARGUMENT, "Broadcast : invalid root 9 (root should be in the 0..7 range)"),
        "user error",
        "nccl src/misc/argcheck.cc",
    ),
    (
        "RuntimeError",
        "Distributed package doesn't have NCCL built in",
        "user error",
        "torch/distributed/distributed_c10d.py, _new_process_group_helper",
    ),
    (
        "ValueError",
        "ProcessGroupNCCL is only supported with GPUs, no GPUs found!",
        "device",
        "c10d/ProcessGroupNCCL.cpp, constructor",
    ),
    (
        "DistBackendError",
        nccl(*REMOTE, "socketProgress: Connection closed by remote peer node2<43210>"),
        "communication",
        "nccl src/misc/socket.cc",
    ),
    (
        "DistBackendError",
        nccl(*SYSTEM, "Call to connect to 10.0.0.7<4567> failed : Connection refused"),
        "communication",
        "nccl src/misc/socket.cc",
    ),
    (
        "DistBackendError",
        nccl(*SYSTEM, "Call to ibv_reg_mr failed with error Cannot allocate memory"),
        "communication",
        "nccl src/misc/ibvwrap.cc: the limit on locked memory",
    ),
    (
        "DistBackendError",
        nccl(
            *SYSTEM,
            "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888), error: No space left on device (28)",
        ),
        "out of memory",
        "nccl src/misc/shmutils.cc, ncclShmOpen",
    ),
    ("DistBackendError", nccl(*INTERNAL, "NET/IB : No device found."), "communication", "nccl src/init.cc"),
    (
        "DistBackendError",
        nccl(*UNHANDLED, "Cuda failure 999 'unknown error'"),
        "device",
        "cudaErrorUnknown, as seen in an issue of pytorch (170045)",
    ),
    (
        "DistBackendError",
        nccl(*UNHANDLED, "Cuda failure 802 'system not yet initialized'"),
        "device",
        "cudaErrorSystemNotReady: the fabric manager does not run",
    ),
    (
        "DistBackendError",
        nccl(*UNHANDLED, "Cuda failure 1 'invalid argument'"),
        "communication",
        "cudaErrorInvalidValue inside of NCCL, nccl issue 1410",
    ),
    (
        "DistBackendError",
        (
            "NCCL communicator was aborted on rank 3. Original reason for failure was: [Rank 3] Watchdog caught collective"
            " operation timeout: WorkNCCL(SeqNum=199, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600725 milliseconds"
        ),
        "communication",
        "c10d/ProcessGroupNCCL.cpp, checkTimeout",
    ),
    # ---- collectives of other backends --------------------------------------------------------------------------------
    (
        "RuntimeError",
        (
            "Detected mismatch between collectives on ranks. Rank 0 is running collective:"
            " CollectiveFingerPrint(SequenceNumber=3, OpType=ALLREDUCE, TensorShape=[1]), but Rank 1 is running collective:"
            " CollectiveFingerPrint(SequenceNumber=3, OpType=BROADCAST, TensorShape=[2])."
        ),
        "user error",
        "c10d/ProcessGroupWrapper.cpp, verify (also in the wheel: strings libtorch_cpu.so)",
    ),
    (
        "RuntimeError",
        "[enforce fail at ../third_party/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 16 vs 8",
        "user error",
        "gloo/transport/tcp/pair.cc, Pair::read",
    ),
    (
        "RuntimeError",
        "DDP expects same model across all ranks, but Rank 0 has 160 params, while rank 1 has inconsistent 158 params.",
        "user error",
        "c10d/reducer.cpp, verify_params_across_processes (also in the wheel)",
    ),
    (
        "RuntimeError",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:31313",
        "communication",
        "gloo/transport/tcp/pair.cc",
    ),
    (
        "RuntimeError",
        "[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 30000 ms",
        "communication",
        "c10d/ProcessGroupGloo.cpp, monitoredBarrier (also in the wheel)",
    ),
    (
        "DistNetworkError",
        "The client socket has timed out after 60000ms while trying to connect to (10.0.0.1, 29500).",
        "communication",
        "c10d/socket.cpp",
    ),
    (
        "DistStoreError",
        "wait timeout after 1800000ms, keys: /default_pg/0//cuda//0",
        "communication",
        "c10d/TCPStore.cpp, doWait",
    ),
    (
        "RuntimeError",
        (
            "Error when verifying shape tensors for collective ALLREDUCE on rank 0. This likely indicates that input shapes into"
            " the collective are mismatched across ranks. Got shapes:  [4] [8]"
        ),
        "user error",
        "c10d/ProcessGroupWrapper.cpp, verify_tensors",
    ),
    (
        "RuntimeError",
        "ProcessGroupNCCL does not support monitoredBarrier, only GLOO supports monitored barrier.",
        "user error",
        "c10d/Backend.hpp (also in the wheel)",
    ),
    # ---- no device for this software ----------------------------------------------------------------------------------
    ("AssertionError", "Torch not compiled with CUDA enabled", "device", "torch/cuda/__init__.py, _lazy_init"),
    (
        "RuntimeError",
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from NVIDIA",
        "device",
        "c10/cuda/CUDAFunctions.cpp, device_count_impl",
    ),
    (
        "RuntimeError",
        "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading",
        "device",
        "c10/cuda/CUDAFunctions.cpp, device_count_impl",
    ),
    ("RuntimeError", "No CUDA GPUs are available", "device", "torch/csrc/cuda/Module.cpp, THCPModule_initExtension"),
    (
        "AcceleratorError",
        f"CUDA error: no CUDA-capable device is detected{HINT}",
        "device",
        "cudaErrorNoDevice (100), CUDA runtime API",
    ),
    (
        "RuntimeError",
        "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
        "device",
        "cudaErrorInsufficientDriver (35)",
    ),
    (
        "RuntimeError",
        f"CUDA error: no kernel image is available for execution on the device{HINT}",
        "device",
        "cudaErrorNoKernelImageForDevice (209): the build has no code for this GPU",
    ),
    (
        "RuntimeError",
        (
            "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that"
            " might have already set an error? Error 804: forward compatibility was attempted on non supported HW"
        ),
        "device",
        "cudaErrorCompatNotSupportedOnDevice (804), c10/cuda/CUDAFunctions.cpp",
    ),
    # ---- a device or driver that is faulty, lost or busy --------------------------------------------------------------
    (
        "AcceleratorError",
        f"CUDA error: uncorrectable ECC error encountered{HINT}",
        "device",
        "cudaErrorECCUncorrectable (214)",
    ),
    (
        "AcceleratorError",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "device",
        "cudaErrorNvlinkUncorrectable (220)",
    ),
    (
        "AcceleratorError",
        "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
        "device",
        "cudaErrorContained (721)",
    ),
    (
        "AcceleratorError",
        f"CUDA error: CUDA-capable device(s) is/are busy or unavailable{HINT}",
        "device",
        "cudaErrorDevicesUnavailable (46): exclusive mode",
    ),
    ("RuntimeError", "CUDA error: unknown error", "device", "cudaErrorUnknown (999)"),
    ("RuntimeError", "CUDA error: hardware stack error", "device", "cudaErrorHardwareStackError (714)"),
    (
        "RuntimeError",
        "CUDA error: OS call failed or operation not supported on this OS",
        "device",
        "cudaErrorOperatingSystem (304)",
    ),
    ("RuntimeError", "CUDA error: MPS client failed to connect to the MPS control daemon", "device", "cudaError 805"),
    (
        "RuntimeError",
        (
            "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable"
            " CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero."
        ),
        "device",
        "c10/cuda/CUDAFunctions.cpp, device_count_impl, cudaErrorUnknown",
    ),
    (
        "NVMLError_LibRmVersionMismatch",
        "RM has detected an NVML/RM version mismatch.",
        "device",
        "pynvml, NVML_ERROR_LIB_RM_VERSION_MISMATCH (18)",
    ),
    ("NVMLError_GpuIsLost", "GPU is lost", "device", "pynvml, NVML_ERROR_GPU_IS_LOST (15)"),
    (
        "RuntimeError",
        "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
        "device",
        "NVIDIA's table of Xid errors, 79",
    ),
    (
        "CudaAPIError",
        "[214] Call to cuCtxSynchronize results in CUDA_ERROR_ECC_UNCORRECTABLE",
        "device",
        "numba/cuda/cudadrv/driver.py",
    ),
    (
        "RuntimeError",
        "TPU initialization failed: open(/dev/accel0): Operation not permitted: Couldn't open device: /dev/accel0",
        "device",
        "libtpu",
    ),
    (
        "RuntimeError",
        "The TPU is already in use by process with pid 1234. Not attempting to load libtpu.so in this process.",
        "device",
        "libtpu, libtpu_lockfile",
    ),
    # ---- errors of the program ----------------------------------------------------------------------------------------
    ("AcceleratorError", f"CUDA error: an illegal memory access was encountered{HINT}", "user error", "cudaError 700"),
    ("RuntimeError", f"CUDA error: device-side assert triggered{HINT}", "user error", "cudaErrorAssert (710)"),
    ("RuntimeError", "CUDA error: invalid device ordinal", "user error", "cudaErrorInvalidDevice (101)"),
    (
        "RuntimeError",
        "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use 'spawn'",
        "user error",
        "torch/cuda/__init__.py, _lazy_init",
    ),
    (
        "RuntimeError",
        "mat1 and mat2 shapes cannot be multiplied (8x16 and 32x4)",
        "user error",
        "ATen/native/LinearAlgebra.cpp",
    ),
    (
        "RuntimeError",
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        "user error",
        "ATen/core/op_registration/adaption.cpp",
    ),
    (
        "_InactiveRpcError",
        'status = StatusCode.RESOURCE_EXHAUSTED details = "Received message larger than max"',
        "user error",
        "grpc, of a program that talks to a server of its own",
    ),
    ("ValueError", "the vocabulary ran out of memory cells", "user error", "a program's own words"),
    ("ValueError", "Broken pipe", "user error", "a program's own words"),
    ("FileNotFoundError", "[Errno 2] No such file or directory: 'NCCL.txt'", "user error", "errno.h ENOENT"),
]
