"""Small data and models, and a guard against what a test leaves behind."""

from __future__ import annotations

import csv
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.ranks import PRELOAD
from training.sources import CORPUS


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """No test leaves a changed environment, a thread of ours or a child behind."""
    environment = dict(os.environ)
    yield
    ours = {
        "PYTEST_CURRENT_TEST",
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
        "TORCHINDUCTOR_CACHE_DIR",
    }  # sklearn, torch
    changed = {
        name
        for name in environment.keys() | os.environ.keys()
        if environment.get(name) != os.environ.get(name) and name not in ours
    }
    assert not changed, f"environment variables left changed: {changed}"
    left = [
        thread.name for thread in threading.enumerate() if thread.name.startswith(("checkpoint", "mirror", "batch"))
    ]
    assert not left, f"threads left over: {left}"
    assert not multiprocessing.active_children()


@pytest.fixture(scope="package")
def rank_server() -> Iterator[None]:
    """The server that ranks are forked from; it lives as long as the tests of this folder."""
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A data set folder of 50 training and 23 validation pairs of the corpus."""
    folder = tmp_path / "small data"  # a space, because paths have them
    folder.mkdir()
    for split, count in (("train", 50), ("validation", 23)):
        rows = (CORPUS / f"{split}.csv").read_text().splitlines()[: count + 1]
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path
