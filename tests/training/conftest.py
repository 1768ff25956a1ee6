"""Small data and models, and a guard against what a test leaves behind."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.ranks import PRELOAD, free_port
from training.bert.sources import CORPUS


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
    server: Any = vars(forkserver)["_forkserver"]
    os.kill(server._forkserver_pid, signal.SIGKILL)  # asked politely, it takes seconds to unload what it has imported
    server._stop()


BUCKET = "launch-test"


@pytest.fixture(scope="package")
def s3() -> Iterator[str]:
    """A real S3-compatible server of this machine; its address."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, "the S3 server has ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(params=["folder", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store; tests that ask for it also ask for `s3`, so that its server is not taken for one of theirs."""
    return f"file://{tmp_path}/store" if request.param == "folder" else str(request.getfixturevalue("uri_of_s3"))


@pytest.fixture
def uri_of_s3(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import boto3  # type: ignore[import-untyped]

    for name, value in (
        ("AWS_ENDPOINT_URL", s3),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A data set folder of 50 training and 23 validation pairs of the corpus."""
    folder = tmp_path / "small data"  # a space, because paths have them
    folder.mkdir()
    for split, count in (("train", 50), ("validation", 23)):
        rows = (CORPUS / f"{split}.csv").read_text().splitlines()[: count + 1]
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def options(small: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "dataset": str(small), "batch_size": 8, "epochs": 2, "log_every": 1, "save_every": 2, "keep": 100,
        "cache": tmp_path / "cache", "log_with": (),
    }  # fmt: skip


def write_csv(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path
