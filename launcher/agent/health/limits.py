"""Limits of a node that break ranks later: locked memory, open files and shared memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SHM_OF_RANK = 64 << 20
"""Bytes of /dev/shm that a rank needs, for the batches of its loader's workers and for NCCL; less ends in a bus error."""

FILES, FILES_OF_PEER = 512, 4
"""Open files of a rank: its own, and its connections to each other rank."""


def look(root: Path = Path("/")) -> dict[str, Any]:
    """Return the limits of this process: bytes of "memlock" and "shm", number of "files", and whether there is "infiniband".

    A limit that is not set is -1; "shm" is -1 if there is no /dev/shm.
    """
    adapters = root / "sys/class/infiniband"
    memlock, files = (resource.getrlimit(each)[1] for each in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE))
    try:
        shm = os.statvfs(root / "dev/shm")
        size = shm.f_frsize * shm.f_blocks
    except OSError:
        size = -1
    infiniband = adapters.is_dir() and any(adapters.iterdir())
    return {"memlock": memlock, "files": files, "shm": size, "infiniband": infiniband}


def warnings(found: Mapping[str, Any], ranks: int, world_size: int) -> list[str]:
    """Return what in `look`'s answer is too little for so many ranks on the node and in the run, with its remedy."""
    texts = []
    if found["infiniband"] and found["memlock"] != resource.RLIM_INFINITY:
        texts.append(
            f"at most {found['memlock'] >> 10} KiB of memory can be locked, which InfiniBand needs (ulimit -l unlimited;"
            " on SLURM, LimitMEMLOCK=infinity of slurmd)"
        )
    needed = FILES + FILES_OF_PEER * (world_size - 1)
    if 0 <= found["files"] < needed:
        texts.append(f"a process may open {found['files']} files, and rank 0 needs about {needed} (ulimit -Hn)")
    if 0 <= found["shm"] < ranks * SHM_OF_RANK:
        texts.append(
            f"/dev/shm has {found['shm'] >> 20} MiB, and {ranks} rank{'s' * (ranks > 1)} with loader workers need"
            f" {ranks * SHM_OF_RANK >> 20} (a container's --shm-size)"
        )
    return texts
