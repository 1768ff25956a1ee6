"""What a rank writes when its launcher asks for its collectives."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from training.context import Context
from training.distributed.hangs.collectives import KEPT, CollectiveDumper, answer_requests, dump, is_done
from training.distributed.heartbeat import SLOT, Heartbeat
from training.distributed.world import World


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def heartbeat() -> Iterator[Heartbeat]:
    descriptor = os.memfd_create("heartbeats")
    os.ftruncate(descriptor, 2 * SLOT)
    yield Heartbeat.of(descriptor, 1)
    os.close(descriptor)


def test_the_newest_collectives_are_written_with_the_ranks_of_the_groups(tmp_path: Path, group: None) -> None:
    for number in range(1, KEPT + 11):
        dist.all_reduce(torch.ones(number))
    entries: list[dict[str, Any]] = []
    while not entries or not all(is_done("gloo", entry) for entry in entries):  # another thread retires them
        dump(tmp_path / "0.json", 0)
        record = json.loads((tmp_path / "0.json").read_text())
        entries = record["traces"]["gloo"]["entries"]
    assert (record["rank"], len(entries)) == (0, KEPT)
    name = entries[-1]["process_group"][0]
    assert record["groups"][name] == [0]
    assert (entries[-1]["profiling_name"], entries[-1]["input_sizes"]) == ("gloo:all_reduce", [[KEPT + 10]])
    assert not any(is_done("nccl", entry) for entry in entries), (
        "a retired collective of NCCL has failed, or has a state"
    )


def test_a_request_is_answered_while_the_main_thread_waits(tmp_path: Path, group: None, heartbeat: Heartbeat) -> None:
    dist.all_reduce(torch.ones(1))
    assert not heartbeat.request_dump(), "nobody answers yet"
    dumper = CollectiveDumper(tmp_path / "1.json", 1, heartbeat)
    assert heartbeat.request_dump()
    while not (tmp_path / "1.json").exists() or heartbeat.dump_requested:
        time.sleep(0.01)
    assert json.loads((tmp_path / "1.json").read_text())["rank"] == 1
    dumper.close()
    assert not any(thread.name == "collectives" for thread in threading.enumerate())


def test_a_record_that_cannot_be_written_is_said(
    tmp_path: Path, heartbeat: Heartbeat, capsys: pytest.CaptureFixture[str]
) -> None:
    dumper = CollectiveDumper(tmp_path / "absent" / "1.json", 1, heartbeat)
    assert heartbeat.request_dump()
    while heartbeat.dump_requested:
        time.sleep(0.01)
    dumper.close()
    assert "the collectives of rank 1 cannot be written: " in capsys.readouterr().err


def test_nobody_waits_for_requests_without_a_launcher_or_other_ranks(tmp_path: Path, heartbeat: Heartbeat) -> None:
    assert answer_requests(tmp_path, World(world_size=2, master_port=1), Heartbeat()) is None
    assert answer_requests(tmp_path, World(), heartbeat) is None
    with Context(tmp_path, World(), heartbeat=heartbeat) as ctx:
        ctx.group.barrier()
        assert not heartbeat.request_dump()
    heartbeat.answer_dump()
    heartbeat.clear()
    assert not heartbeat.request_dump()
