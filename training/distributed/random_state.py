"""Seed, save and restore the random generators of Python, numpy and torch (CPU)."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_all(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # the legacy generator, which models and user code draw from
    torch.manual_seed(seed)


def make_deterministic() -> None:
    """Have torch compute the same bits each time, on GPUs too, until the process ends.

    Operations get slower; one that has no such form raises RuntimeError. Call it before the first operation on a GPU, since
    cuBLAS reads its variable only once. Source: the page "Reproducibility" of torch's documentation.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass adds up in any order


def rng_state() -> dict[str, torch.Tensor]:
    """Return the state of the generators that `seed_all` seeds, as tensors by name."""
    import numpy as np
    import torch

    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words_of_numpy = np.asarray(keys, dtype=np.int64).tolist()
    return {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*words_of_numpy, position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restore a state returned by `rng_state`."""
    import numpy as np
    import torch

    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, state["numpy_gauss"].item()))


@contextlib.contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch (CPU) inside the block, and restore them after it."""
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed would also seed the GPU
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def mixed_seed(*parts: int | str | bytes) -> int:
    """Return a seed below 2**63 that is a hash (XXH3) of `parts`."""
    import xxhash

    digest = xxhash.xxh3_64()
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.intdigest() >> 1
