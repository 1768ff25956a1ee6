"""What ranks leave when they hang, or when NCCL's watchdog aborts them."""

from __future__ import annotations

import asyncio
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C import _distributed_c10d

from launcher.agent.hangs.evidence import records
from launcher.agent.hangs.records import GroupRecord, read_nccl_dump
from launcher.agent.hangs.timeouts import causes_of_aborts
from launcher.lifecycle.run_dir import RunDir

ENTRY = {
    "collective_seq_id": 7,
    "input_sizes": [[3]],
    "is_p2p": False,
    "process_group": ("0", "default_pg"),
    "profiling_name": "nccl:all_reduce",
    "retired": True,
    "state": "started",
}
TIMEOUT = "  what():  [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)\n"
VERDICT = "rank 2 did not enter all_reduce #7 (process group 0, default_pg, nccl), which ranks 0-1 wait in"


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    (tmp_path / "logs" / "1").mkdir(parents=True)
    return RunDir(tmp_path)


def dump(*entries: Any) -> bytes:
    config = {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2]"}}
    return pickle.dumps({"version": "2.10", "entries": list(entries), "pg_config": config}, protocol=2)


def test_the_dumps_of_nccl_name_the_rank_that_it_timed_out_for(run_dir: RunDir) -> None:
    """Gloo's recorder knows nothing of NCCL's states, so the entries are written as NCCL would; the form is torch's."""
    earlier = {**ENTRY, "collective_seq_id": 6, "state": "completed"}
    for rank, entries in enumerate([(earlier, ENTRY), (earlier, ENTRY), (earlier,)]):
        Path(f"{run_dir.nccl_dump(1)}{rank}").write_bytes(dump(*entries))
    for rank in range(2):
        run_dir.log(1, rank).write_text(TIMEOUT)
    exits = {0: -signal.SIGABRT, 1: -signal.SIGABRT, 2: -signal.SIGKILL}
    found = causes_of_aborts(run_dir, 1, range(3), exits)
    assert {rank: kind for rank, (kind, _) in found.items()} == {0: "communication", 1: "communication"}
    assert found[0][1].startswith("[Rank 0] Watchdog caught collective operation timeout")
    assert found[0][1].endswith(f"; {VERDICT}")
    Path(f"{run_dir.nccl_dump(1)}2").unlink()
    left = "rank 2 left no record of collectives; ranks 0-1 wait in all_reduce #7 (process group 0, default_pg, nccl)"
    assert causes_of_aborts(run_dir, 1, range(3), exits)[0][1].endswith(f"; {left}")


@pytest.mark.parametrize("log", [TIMEOUT, "  what():  CUDA error: an illegal memory access was encountered\n", ""])
def test_without_dumps_or_for_another_cause_the_words_are_those_of_the_log(run_dir: RunDir, log: str) -> None:
    run_dir.log(1, 0).write_text(log)
    plain = causes_of_aborts(run_dir, 1, range(3), {0: -signal.SIGABRT})
    assert "; rank" not in str(plain)
    if log != TIMEOUT:
        Path(f"{run_dir.nccl_dump(1)}0").write_bytes(dump(ENTRY))
        assert causes_of_aborts(run_dir, 1, range(3), {0: -signal.SIGABRT}) == plain


@pytest.fixture
def collectives() -> Iterator[None]:
    dist.init_process_group("gloo", store=_distributed_c10d.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(3))
    dist.all_reduce(torch.ones(3))
    yield
    dist.destroy_process_group()


def test_a_dump_of_torch_is_plain_data(tmp_path: Path, collectives: None) -> None:
    path = tmp_path / "nccl-0"
    path.write_bytes(_distributed_c10d._dump_fr_trace())  # type: ignore[attr-defined]
    found = read_nccl_dump(path)
    assert found is not None
    assert (found[-1].last, len(found[-1].pending)) == (2, 2), "it is read as NCCL's, which gives a state"
    assert found[-1].pending[0].operation == "all_reduce"


class Foreign:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("executed",))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        dump(ENTRY)[:-20],
        dump(ENTRY)[: len(dump(ENTRY)) // 2],
        bytes(100),
        pickle.dumps(Foreign()),
        pickle.dumps({"entries": [Foreign()], "pg_config": {}}),
        pickle.dumps({"entries": [], "pg_config": {"0": {"ranks": "[" * 100_000}}}),
        pickle.dumps({"entries": [], "pg_config": {"0": None}}),
        pickle.dumps([1]),
        b"(" * 1000 + b"t" * 1000 + b".",
        b"\x80\x02X\xff\xff\xff\x7f.",
        b"\x80\x02h\x07.",
    ],
)
def test_a_torn_or_foreign_dump_is_none(tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nccl-0"
    path.write_bytes(data)
    assert read_nccl_dump(path) is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("entries", [None, 7, [7, None, {}], [{**ENTRY, "process_group": 3}]])
def test_entries_of_another_form_are_left_out(tmp_path: Path, entries: Any) -> None:
    path = tmp_path / "nccl-0"
    path.write_bytes(pickle.dumps({"entries": entries, "pg_config": {}}))
    assert read_nccl_dump(path) == []


def test_records_are_reported_as_they_appear_and_those_of_ranks_that_end_are_not_awaited(run_dir: RunDir) -> None:
    running, text = {0, 1}, '{"groups": {}, "traces": {"gloo": {"entries": []}}}'

    async def scenario() -> list[tuple[int, list[GroupRecord] | None]]:
        found = []
        run_dir.collectives(1, 0).write_text(text)
        async for each in records(run_dir, 1, (0, 1, 5), running):
            found.append(each)
            running.discard(1)
        return found

    assert asyncio.run(scenario()) == [(0, [])]
