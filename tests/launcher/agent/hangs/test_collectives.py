"""The rank that did not enter a collective, from the records of all ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.hangs.collectives import find_absent, ranks_text
from launcher.agent.hangs.detection import RankStatus, StackLocation, find_culprit
from launcher.agent.hangs.records import Entered, Exchange, GroupRecord, read_record, runs_of
from launcher.agent.protocol import Collectives, FromAgent
from launcher.rank.messages import decode, encode

ALL = "process group 0, default_pg, nccl"
ENTRY = {
    "collective_seq_id": 1204,
    "input_sizes": [[4096, 4096]],
    "is_p2p": False,
    "op_id": 1300,
    "process_group": ["0", "default_pg"],
    "profiling_name": "nccl:all_reduce",
    "retired": False,
    "state": "scheduled",
}
"""The fields of an entry of torch's recorder that are read, with those of a collective that has not ended."""


def group(last: int, *pending: Entered, name: str = "nccl 0", members: list[list[int]] | None = None) -> GroupRecord:
    title = f"process group {name.split()[1]}, {'default_pg, ' if name == 'nccl 0' else ''}{name.split()[0]}"
    return GroupRecord(name, title, [[0, 3, 1]] if members is None else members, last, list(pending))


def at(number: int, operation: str = "all_reduce", sizes: str = "[[8]]") -> Entered:
    return Entered(number, operation, sizes)


HERE = group(1204, at(1204))


@pytest.mark.parametrize(
    ("records", "rank", "text"),
    [
        (
            {0: [HERE], 1: [HERE], 2: [HERE], 3: [group(1203)]},
            3,
            f"rank 3 did not enter all_reduce #1,204 ({ALL}), which ranks 0-2 wait in",
        ),
        (
            {0: [HERE], 1: [], 2: [HERE], 3: [group(1200)]},
            None,
            f"ranks 1 and 3 did not enter all_reduce #1,204 ({ALL}), which ranks 0 and 2 wait in",
        ),
        (
            {0: [group(1206, at(1204), at(1205))], 1: [HERE], 2: [group(1205, at(1204), at(1205))], 3: [group(1203)]},
            3,
            f"rank 3 did not enter all_reduce #1,204 ({ALL}), which ranks 0-2 wait in",
        ),
        (
            {0: [HERE], 1: [HERE], 2: [group(1204, at(1204, "broadcast"))], 3: [HERE]},
            2,
            (
                f"the ranks disagree on collective #1,204 ({ALL}): ranks 0-1 and 3 entered all_reduce of sizes [[8]]; rank 2"
                " entered broadcast of sizes [[8]]"
            ),
        ),
        (
            {0: [HERE], 1: [group(1204, at(1204, sizes="[[9]]"))]},
            None,
            (
                f"the ranks disagree on collective #1,204 ({ALL}): rank 0 entered all_reduce of sizes [[8]]; rank 1 entered"
                " all_reduce of sizes [[9]]"
            ),
        ),
        (
            {0: [HERE], 1: [HERE], 2: None, 3: [HERE]},
            2,
            f"rank 2 left no record of collectives; ranks 0-1 and 3 wait in all_reduce #1,204 ({ALL})",
        ),
        (
            {rank: [HERE] for rank in range(4)},
            None,
            f"ranks 0-3 wait in all_reduce #1,204 ({ALL}), which all ranks of the group entered and which does not end",
        ),
        (
            {0: [group(1205)], 1: [HERE], 2: [HERE], 3: [HERE]},
            None,
            (
                f"ranks 1-3 wait in all_reduce #1,204 ({ALL}), which all ranks of the group entered and which does not end;"
                " it ended on rank 0"
            ),
        ),
        ({0: [group(9)], 1: [group(9)]}, None, None),
        ({0: None, 1: None}, None, None),
        ({}, None, None),
    ],
)
def test_the_absent_rank_is_named(
    records: dict[int, list[GroupRecord] | None], rank: int | None, text: str | None
) -> None:
    assert find_absent(records, records) == (None if text is None else (rank, text))


def test_of_ranks_that_wait_one_for_another_the_first_is_named() -> None:
    rows = [group(7, at(7), name="nccl 1", members=[[0, 1, 1]]), group(5)]
    records = {
        0: [group(5), rows[0]],
        1: [
            group(5),
            group(6, name="nccl 1", members=[[0, 1, 1]]),
            group(4, at(4), name="nccl 2", members=[[1, 3, 2]]),
        ],
        2: [group(5)],
        3: [group(5), group(3, name="nccl 2", members=[[1, 3, 2]])],
    }
    text = "rank 3 did not enter all_reduce #4 (process group 2, nccl), which rank 1 waits in"
    assert find_absent(records, range(4)) == (3, text)


def test_ranks_that_wait_for_each_other_are_told_apart_by_their_stacks() -> None:
    both = [[0, 1, 1]]
    one = [group(5, at(5), members=both), group(3, name="nccl 1", members=both)]
    two = [group(4, members=both), group(4, at(4), name="nccl 1", members=both)]
    records = {0: one, 1: two}
    text = (
        f"the ranks wait for each other: rank 0 waits in all_reduce #5 ({ALL}) for rank 1; rank 1 waits in all_reduce #4"
        " (process group 1, nccl) for rank 0"
    )
    assert find_absent(records, (0, 1)) == (None, text)
    assert find_absent(records, (0, 1), busy=(0, 1)) == (None, text)
    assert find_absent(records, (0, 1), busy=(1,)) == (
        1,
        f"rank 1 did not enter all_reduce #5 ({ALL}), which rank 0 waits in",
    )


def test_a_rank_that_has_ended_is_missing_too() -> None:
    assert find_absent({0: [HERE], 1: [HERE], 2: [HERE]}, (0, 1, 2)) == (
        3,
        f"rank 3 ended without all_reduce #1,204 ({ALL}), which ranks 0-2 wait in",
    )


def test_the_records_go_before_the_stacks_and_a_stopped_process_before_both() -> None:
    """On GPUs the ranks that wait stand in `.item()`, and the absent one may stand in a collective of another group."""
    beats = {rank: RankStatus(7, "training") for rank in range(2)}
    places = {0: StackLocation("train.py:9 in item"), 1: StackLocation("train.py:5 in load", True)}
    records = {0: [HERE], 1: [group(1203)]}
    assert find_culprit(beats, places, records) == (
        1,
        f"rank 1 did not enter all_reduce #1,204 ({ALL}), which rank 0 waits in; rank 1 is after step 7 at train.py:5 in load",
    )
    stopped = {**beats, 0: RankStatus(7, "training", state="T")}
    assert find_culprit(stopped, places, records)[0] == 0
    assert find_culprit(beats, places, {0: None, 1: None}) == find_culprit(beats, places)


# ---- what a rank wrote ------------------------------------------------------------------------------------------------


def write(path: Path, *entries: Any, backend: str = "nccl", groups: Any = None) -> Path:
    data = {"rank": 0, "groups": {"0": [0, 1, 2, 3]} if groups is None else groups}
    path.write_text(json.dumps({**data, "traces": {backend: {"version": "2.10", "entries": list(entries)}}}))
    return path


def test_a_record_is_reduced_to_what_has_not_ended(tmp_path: Path) -> None:
    done = {**ENTRY, "collective_seq_id": 1203, "state": "completed", "retired": True}
    later = [{**ENTRY, "collective_seq_id": number} for number in range(1205, 1230)]
    other = {**ENTRY, "is_p2p": True, "process_group": ["9", "undefined"]}
    failed = {**ENTRY, "process_group": ["1", "undefined"], "retired": True}
    path = write(tmp_path / "0.json", done, ENTRY, *later, other, failed)
    pending = [Entered(number, "all_reduce", "[[4096, 4096]]") for number in (1204, 1205)]
    assert read_record(path) == [
        GroupRecord("nccl 0", ALL, [[0, 3, 1]], 1229, pending),
        GroupRecord("nccl 1", "process group 1, nccl", [], 1204, [pending[0]]),
    ]


def exchanging(*exchanges: Exchange) -> GroupRecord:
    return GroupRecord("nccl 0", ALL, [[0, 3, 1]], 7, [], list(exchanges))


def to(peer: int) -> Exchange:
    return Exchange("send", peer)


def of(peer: int) -> Exchange:
    return Exchange("recv", peer)


@pytest.mark.parametrize(
    ("records", "ranks", "rank", "text"),
    [
        (
            {0: [exchanging(to(1))], 1: [exchanging(to(2))], 2: [exchanging(to(3))], 3: [group(7)]},
            range(4),
            3,
            "rank 3 does not receive: rank 2 waits in send to rank 3",
        ),
        (
            {0: [group(7)], 1: [exchanging(of(0))], 2: [exchanging(of(1))]},
            range(3),
            0,
            "rank 0 does not send: rank 1 waits in recv from rank 0",
        ),
        ({1: [exchanging(of(0))]}, [1], 0, "rank 0 ended and did not send: rank 1 waits in recv from rank 0"),
        (
            {0: [exchanging(of(1))], 1: [exchanging(of(0))]},
            range(2),
            None,
            "the ranks wait for each other: rank 0 waits in recv from rank 1; rank 1 waits in recv from rank 0",
        ),
        (
            {0: [HERE], 1: [HERE], 2: [HERE], 3: [exchanging(of(0))]},
            range(4),
            None,
            (
                f"the ranks wait for each other: ranks 0-2 wait in all_reduce #1,204 ({ALL}) for rank 3; rank 3 waits in recv"
                " from rank 0"
            ),
        ),
    ],
)
def test_who_does_not_answer_a_send_or_receive_is_named(
    records: dict[int, list[GroupRecord] | None], ranks: range, rank: int | None, text: str
) -> None:
    assert find_absent(records, ranks) == (rank, text)
    sent = [Collectives(each, groups) for each, groups in records.items()]
    assert [decode(FromAgent, encode(each)) for each in sent] == sent


def test_sends_and_receives_that_have_not_ended_are_read(tmp_path: Path) -> None:
    """Their numbers are those of the group, here of the ranks 4 and 6 of the run."""
    send = {**ENTRY, "is_p2p": True, "collective_seq_id": 0, "profiling_name": "nccl:send 0->1"}
    done = {**send, "state": "completed"}
    receive = {**send, "profiling_name": "nccl:recv 0<-1"}
    strange = [
        {**send, "profiling_name": name} for name in ("nccl:send 0->7", "nccl:send", "send 0->1", "nccl:recv 0<-x")
    ]
    path = write(tmp_path / "0.json", done, send, *strange, receive)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "groups": {"0": [4, 6]}}))
    [found] = read_record(path) or []
    assert found.exchanges == [Exchange("send", 6), Exchange("recv", 6)]
    assert (found.last, found.pending) == (0, [])


def test_gloo_retires_what_has_ended(tmp_path: Path) -> None:
    path = write(tmp_path / "0.json", {**ENTRY, "profiling_name": "gloo:barrier", "retired": True}, backend="gloo")
    assert read_record(path) == [GroupRecord("gloo 0", "process group 0, default_pg, gloo", [[0, 3, 1]], 1204, [])]


HOSTILE: list[Any] = [
    None,
    7,
    "entry",
    [],
    {},
    {**ENTRY, "collective_seq_id": "1"},
    {**ENTRY, "collective_seq_id": -1},
    {**ENTRY, "collective_seq_id": 10**30},
    {**ENTRY, "process_group": "00"},
    {**ENTRY, "process_group": []},
    {**ENTRY, "process_group": [{}, []]},
    {**ENTRY, "profiling_name": None},
    {key: value for key, value in ENTRY.items() if key != "is_p2p"},
]


@pytest.mark.parametrize("entry", HOSTILE)
def test_what_is_not_of_torch_is_left_out(tmp_path: Path, entry: Any) -> None:
    assert read_record(write(tmp_path / "0.json", entry)) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "[" * 100_000, '{"groups": [], "traces": {}}', '{"groups": {}, "traces": 1}', "\x00"]
)
def test_a_torn_or_foreign_file_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "0.json"
    assert read_record(path) is None
    path.write_text(text)
    assert read_record(path) is None


def test_a_file_that_is_too_large_or_a_link_or_a_pipe_is_none(tmp_path: Path) -> None:
    good, large, link, pipe = (tmp_path / name for name in ("good", "large", "link", "pipe"))
    write(good, ENTRY)
    link.symlink_to(good)
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(1 << 30)
    assert [read_record(path) is None for path in (good, large, link, pipe)] == [False, True, True, True]


def test_the_message_about_a_rank_is_below_the_limit_of_a_line(tmp_path: Path) -> None:
    wide = {"input_sizes": [[1 << 40] * 10] * 10, "profiling_name": "nccl:" + "x" * 1_000}
    entries = [
        {**ENTRY, **wide, "process_group": [f"{name}" * 50, "y" * 900], "collective_seq_id": number}
        for name in range(100, 150)
        for number in (1 << 60, (1 << 60) + 1, (1 << 60) + 2)
    ]
    groups = {f"{name}" * 50: [rank for rank in range(100_000, 103_000) if rank % 100 < 90] for name in range(100, 150)}
    few = {name: [5 * rank + (rank % 2) for rank in range(60)] for name in groups}
    for each in (groups, few):
        found = read_record(write(tmp_path / "0.json", *entries, groups=each))
        message = Collectives(10**9, found)
        assert found
        assert len(encode(message)) < 1 << 16
        assert decode(FromAgent, encode(message)) == message


@pytest.mark.parametrize(
    ("ranks", "runs"),
    [
        ([0, 1, 2, 3], [[0, 3, 1]]),
        ([0, 8, 16, 24], [[0, 24, 8]]),
        ([5], [[5, 5, 0]]),
        ([0, 1, 2, 7, 8], [[0, 2, 1], [7, 8, 1]]),
        ([], []),
        (None, []),
        ({"0": 1}, []),
        ([0, "1"], []),
        ([-1, 0], []),
        ([3, 2], []),
        ([1, 1], []),
        ([2**40], []),
        ([rank**2 for rank in range(500)], []),
    ],
)
def test_the_ranks_of_a_group_are_few_runs(ranks: object, runs: list[list[int]]) -> None:
    assert runs_of(ranks) == runs


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([4], "rank 4"),
        ([2, 0, 1], "ranks 0-2"),
        ([0, 1, 5], "ranks 0-1 and 5"),
        ([0, 2, 4], "ranks 0, 2 and 4"),
        (range(0, 40, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 12 more"),
    ],
)
def test_ranks_are_spelt_briefly(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text
