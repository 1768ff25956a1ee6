"""Limits of a node: too little of each, and the real ones of this machine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.health import limits

FINE = {"memlock": -1, "files": 4096, "shm": 64 << 20, "infiniband": True}


@pytest.mark.parametrize(
    ("change", "ranks", "world_size", "words"),
    [
        ({}, 1, 2, []),
        ({"memlock": 65536}, 1, 2, ["at most 64 KiB of memory can be locked, which InfiniBand needs"]),
        ({"memlock": 65536, "infiniband": False}, 1, 2, []),
        ({"files": 1024}, 1, 129, []),
        ({"files": 1024}, 1, 130, ["a process may open 1024 files, and rank 0 needs about 1028"]),
        ({"files": -1}, 1, 10_000, []),
        ({}, 2, 2, ["/dev/shm has 64 MiB, and 2 ranks with loader workers need 128"]),
        ({"shm": (64 << 20) - 1}, 1, 1, ["/dev/shm has 63 MiB, and 1 rank with loader workers need"]),
        ({"shm": -1}, 8, 8, []),
        ({"memlock": 0, "files": 1, "shm": 0}, 8, 8, ["at most 0 KiB", "may open 1 files", "/dev/shm has 0 MiB"]),
    ],
)
def test_what_is_too_little_is_said_with_its_remedy(
    change: dict[str, Any], ranks: int, world_size: int, words: list[str]
) -> None:
    found = limits.warnings(FINE | change, ranks, world_size)
    assert len(found) == len(words)
    assert all(word in text and text.endswith(")") for word, text in zip(words, found, strict=True))


def test_the_limits_of_a_process_are_those_that_it_has(tmp_path: Path) -> None:
    program = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))\n"
        "from launcher.agent.health import limits\n"
        "print(limits.look())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = eval(done.stdout)
    assert (found["memlock"], found["files"]) == (65536, 300)
    shm = os.statvfs("/dev/shm")
    assert found["shm"] == shm.f_frsize * shm.f_blocks


def test_adapters_and_shared_memory_are_found_under_the_root(tmp_path: Path) -> None:
    assert limits.look(tmp_path)["shm"] == -1
    assert not limits.look(tmp_path)["infiniband"]
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    (tmp_path / "dev/shm").mkdir(parents=True)
    found = limits.look(tmp_path)
    assert found["infiniband"]
    assert found["shm"] > 0
    assert found["files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
