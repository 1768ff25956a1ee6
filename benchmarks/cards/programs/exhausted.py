"""Exhaust memory in several ways, and print the kind of failure that each error is taken for."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from launcher.lifecycle.exit_status import classify


def attempt(name: str, work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160]} -> {classify(error)}")
    else:
        print(f"{name}: no error")


def take(size: int, device: str) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


attempt("host memory", lambda: take(1 << 60, "cpu"))
if torch.cuda.is_available():
    attempt("caching allocator", lambda: take(1 << 40, "cuda"))
    attempt("page-locked memory", lambda: torch.empty(1 << 50, dtype=torch.uint8, pin_memory=True))
    matrix = torch.ones(8, 8, device="cuda")
    kept = []
    for margin in range(8, 400, 8):  # MiB that stay free; the allocator may need some itself
        try:
            kept.append(take(torch.cuda.mem_get_info()[0] - (margin << 20), "cuda"))
            break
        except RuntimeError:
            continue
    attempt("cuBLAS", lambda: matrix @ matrix)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method="tcp://127.0.0.1:29555", rank=0, world_size=1)
    attempt("NCCL", lambda: dist.all_reduce(matrix))
