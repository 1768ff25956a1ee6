"""Fixtures: small data and models, and a check for what a test leaves behind."""

from __future__ import annotations

import csv
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.ranks import free_port, serving
from training.bert.sources import CORPUS


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Check that a test leaves no changed variable, no thread and no child process."""
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
    """The server from which ranks are forked, for the tests of this folder."""
    with serving():
        yield


BUCKET = "launch-test"


@pytest.fixture(scope="package")
def s3() -> Iterator[str]:
    """A real S3-compatible server on this machine; returns its address."""
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
    """An empty store; tests also request `s3`, so that its server does not count as left behind."""
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
    """A dataset folder with 50 training and 23 validation pairs of the corpus."""
    folder = tmp_path / "small data"  # with a space, as in real paths
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
