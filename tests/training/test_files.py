from __future__ import annotations

import contextlib
import enum
import errno
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.files import (
    Lines,
    NotPlain,
    append_line,
    names_in,
    newest_record,
    newest_records,
    plain,
    read_json,
    read_lines,
    write_atomic,
)
from training.files import lines as module
from training.files.access import BLOCK_BYTES


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a file"]
    assert path.stat().st_mode & 0o777 == 0o600
    write_atomic(path, b"shared", 0o666)
    assert path.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def write() -> None:
        for _ in range(50):
            append_line(path, {"x": "y" * 3000})

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_lines(path)) == 200


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_line(path, {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "half')
    assert read_lines(path) == [{"n": 1}]
    append_line(path, {"n": 3})
    assert read_lines(path) == [{"n": 1}, {"n": 3}]


def test_what_is_absent(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none") is None
    assert read_lines(tmp_path / "none") == []
    (tmp_path / "bad").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        read_json(tmp_path / "bad")
    write_atomic(tmp_path / "good", '{"a": [1]}')
    assert read_json(tmp_path / "good") == {"a": [1]}


def fill(disk: Path) -> Path:
    """Fill `disk` completely; deleting the returned file frees it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    return filler


def test_lines_wait_for_room_and_keep_their_order(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, path = Lines(), disk / "log"
    lines.append(path, {"step": 0})
    filler = fill(disk)
    count = 2000  # more than fits into the rest of the current page
    for step in range(1, count):
        lines.append(path, {"step": step})
    with pytest.raises(OSError, match="No space"):
        lines.flush()
    filler.unlink()
    lines.append(path, {"step": count})
    assert [record["step"] for record in read_lines(path)] == list(range(count + 1))

    filler = fill(disk)
    monkeypatch.setattr(Lines, "most", 0)
    for _ in range(500):  # what fits into the rest of the current page
        with contextlib.suppress(OSError):
            lines.append(path, {"more": 1})
    with pytest.raises(OSError, match="No space"):
        lines.append(path, {"more": 1})


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "zero", "dangling"])
def test_only_plain_files_are_opened(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "file", tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        if kind == "link":
            target.write_text("{}")
        path.symlink_to("/dev/zero" if kind == "zero" else target)
    for act in (read_json, read_lines, lambda path: append_line(path, {})):
        with pytest.raises(NotPlain, match="not a plain file"):
            act(path)
    assert not target.exists() or target.read_text() == "{}"


def test_no_folder_below_the_top_may_be_a_link(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "file").write_text("{}")
    (top / "file").write_text("[]")
    (tmp_path / "link").symlink_to(top)
    (top / "out").symlink_to(tmp_path)
    (top / "in").symlink_to("a")
    assert read_json(tmp_path / "link" / "a" / "b" / "file", tmp_path / "link") == {}
    assert names_in(tmp_path / "link" / "a" / "b", tmp_path / "link") == ["file"]
    assert names_in(top / "a" / "nothing", top) == []
    assert sorted(names_in(top, top)) == ["a", "file", "in", "out"]
    for folder in ("out/top", "in/b", "file/x"):
        with pytest.raises(NotPlain, match="is a link or a file"):
            read_json(top / folder / "file", top)
        with pytest.raises(NotPlain, match="is a link or a file"):
            names_in(top / folder, top)


LINES = [
    b'{"a": 1}\n', b'{"a":[1,2]}\r\n', b' {"b": 2} \n', b"\n", b'{"a":\n', b'{"a":[{}\n', b",{}\n", b"[1]\n", b'"x"\n', b"\xff\n", b"{}\n",
    b'{"a": "\xc3\xa9"}\n', b'{"a": 1}{"b": 2}\n', b'{"a": 1}}\n', b'{"a": 1},\n', b'{"n": NaN}\n', b'{"long": "' + b"y" * 5000 + b'"}\n',
    b'{"a": ' + b"9" * 5000 + b"}\n", b"[" * 3000 + b"\n", b'{"a":' * 3000 + b"\n", b'{"a": "\x01"}\n', b"\0\0\n", b'{"event":"x"}\n',
]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_lines_are_records_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    generator = random.Random(seed)
    path, chosen = tmp_path / "log", generator.choices(LINES, k=100)
    path.write_bytes(b"".join(chosen)[: generator.choice([None, -1, -3])])
    expected = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line.decode())
            expected += [record] if isinstance(record, dict) else []
    for size in (1 << 16, 1):
        monkeypatch.setattr(module, "BLOCK_BYTES", size)
        assert repr(read_lines(path)) == repr(expected)
        newest = newest_records(path, ["a", "b"], lambda word, record: word in record)
        for word in ("a", "b"):
            found = [record for record in expected if word in record]
            assert repr(newest.get(word)) == repr(found[-1] if found else None)
        both = [record for record in expected if "a" in record or "b" in record]
        one = newest_records(path, ["a", "b"], lambda word, record: word in record, one=True)
        assert [repr(each) for each in one.values()] == [repr(each) for each in both[-1:]]
    only = re.compile("event|long")
    assert repr(read_lines(path, only)) == repr([r for r in expected if "event" in r or "long" in r])


def test_a_line_over_the_limit_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_JSON_BYTES", 1000)
    monkeypatch.setattr(module, "BLOCK_BYTES", 10)
    path = tmp_path / "log"
    for tail in (b"", b"\n", b'\n{"b": 2}\n', b'{"b": 2}\n{"c": 3}\n'):
        path.write_bytes(b'{"a": 1}\n' + b"x" * 5000 + tail)
        records = read_lines(path)
        assert [*records[0]] == ["a"]
        assert [key for record in records[1:] for key in record] == [
            key for key in ("b", "c") if f'\n{{"{key}"'.encode() in tail
        ]


def test_a_gap_between_lines_costs_none(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"a": 1}\n' + bytes(5000) + b'{"b": 2}\n' + bytes(3) + b"\n" + b'{"c": 3}\n')
    assert read_lines(path) == [{"a": 1}, {"b": 2}, {"c": 3}]


def test_a_value_of_very_many_items_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"[" + b"[]," * 2_000_000 + b"[]]")
    with pytest.raises(ValueError, match="more than 1000000 items"):
        read_json(path)


def test_reading_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
    path.write_bytes(b"[" * 100_000 + b'\n{"a": 1}\n')
    assert read_lines(path) == [{"a": 1}]
    with path.open("r+b") as file:
        file.truncate(8 << 30)  # sparse
    with pytest.raises(NotPlain, match="larger than"):
        read_json(path)
    monkeypatch.setattr(module, "MAX_LINES_BYTES", 1 << 20)
    assert read_lines(path) == []


def test_the_umask_of_the_process_is_never_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("other threads would see it"))
    write_atomic(tmp_path / "file", "x")
    append_line(tmp_path / "lines", {})
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


class Color(enum.IntEnum):
    RED = 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor(2.5, requires_grad=True), 2.5), (torch.tensor(7), 7), (torch.tensor([True]), [True]),
        (torch.ones(2, dtype=torch.bfloat16), [1.0, 1.0]), (np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (np.int8(-1), -1),
        (np.bool_(True), True), (np.array([[1, 2]]), [[1, 2]]), (np.str_("a"), "a"), (np.array("b"), "b"),
        (math.nan, "NaN"), (-math.inf, "-Infinity"), (torch.tensor(math.inf), "Infinity"), (np.float32("nan"), "NaN"),
        (None, None), (True, True), (2**70, 2**70), ("text", "text"), (Color.RED, 3), (Path("a/b"), "a/b"), (1 + 2j, "(1+2j)"),
        ({1: {"a": (torch.tensor(1), [np.float16(2)])}}, {"1": {"a": [1, [2.0]]}}), (frozenset([4]), [4]), (np.float32, str(np.float32)),
    ],
    ids=repr,
)  # fmt: skip
def test_values_of_json(value: Any, expected: object) -> None:
    found = plain(value)
    assert found == expected
    assert type(found) is type(expected)
    json.dumps(found, allow_nan=False)
    if isinstance(value, float) and not math.isfinite(value):
        assert str(float(str(found))) == str(float(value)), "float() reads it"


def test_the_newest_record_with_a_key_is_found_from_the_end(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert newest_record(file, "loss") is None
    file.write_text("")
    assert newest_record(file, "loss") is None
    lines = [json.dumps({"step": step, "loss": step / 2, "text": "x" * (step % 300)}) for step in range(3000)]
    lines.insert(100, json.dumps({"step": 100, "eval": {"f1": 0.5}}))
    lines.insert(50, json.dumps({"step": 50, "eval": {"f1": 0.1}}))
    lines += ['{"note": "the word \\"loss\\" in a text"}', 'not JSON with "loss"', '["loss"]', '{"step": 9, "los']
    file.write_text("\n".join(lines))
    assert file.stat().st_size > 3 * BLOCK_BYTES
    assert (newest_record(file, "loss") or {})["step"] == 2999
    assert newest_record(file, "eval") == {"step": 100, "eval": {"f1": 0.5}}
    assert newest_record(file, "lr") is None
    file.write_bytes(b'{"loss": 1}\n' + b'{"long": "' + b"y" * (3 * BLOCK_BYTES) + b'"}\n')
    assert newest_record(file, "loss") == {"loss": 1}
    file.write_bytes(b'{"loss": 2}\n\n' + b"\xff\xfe\n" * 5)
    assert newest_record(file, "loss") == {"loss": 2}


NFS_CLIENT = """
# Appends as an NFS client does, which knows the size of a file from when it opened or locked it, and writes there.
import fcntl, os, sys, time
from pathlib import Path

from training.files import append_line, lines

sizes = {}
system = {"open": os.open, "write": os.write, "lockf": fcntl.lockf}


def opened(path, flags, *more, **options):
    handle = system["open"](path, flags & ~os.O_APPEND, *more, **options)
    sizes[handle] = os.fstat(handle).st_size
    return handle


def locked(handle, operation):
    system["lockf"](handle, operation)
    sizes[handle] = os.fstat(handle).st_size


def written(handle, data):
    time.sleep(0.001)  # the others are as far
    if handle in sizes:
        os.lseek(handle, sizes[handle], os.SEEK_SET)
    return system["write"](handle, data)


os.open, os.write, fcntl.lockf = opened, written, locked
if sys.argv[3] == "without":
    lines._lock = lambda handle: None
lines.LOCK_SECONDS = 60.0
Path(f"{sys.argv[1]}.{sys.argv[2]}").touch()
while len(os.listdir(Path(sys.argv[1]).parent)) < 4:  # then all begin
    time.sleep(0.001)
for number in range(50):
    append_line(Path(sys.argv[1]), {"client": int(sys.argv[2]), "number": number})
"""


@pytest.mark.parametrize("lock", ["with", "without"])
def test_lines_of_several_clients_of_a_shared_disk_are_kept(lock: str, tmp_path: Path) -> None:
    """Without the lock the same clients overwrite each other's lines, which shows that they behave as those of NFS do."""
    path = tmp_path / "events.jsonl"
    commands = [[sys.executable, "-c", NFS_CLIENT, str(path), str(client), lock] for client in range(4)]
    clients = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for command in commands]
    assert [client.wait(60) for client in clients] == [0] * 4
    found = {(line["client"], line["number"]) for line in read_lines(path)}
    assert (len(found) == 200) == (lock == "with")


def test_a_lock_that_somebody_keeps_does_not_hold_up_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    path = tmp_path / "events.jsonl"
    append_line(path, {"n": 1})
    program = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        append_line(path, {"n": 2})
        holder.communicate(b"\n")
    assert read_lines(path) == [{"n": 1}, {"n": 2}]


def test_a_disk_without_locks_takes_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.lockf", refused)
    append_line(tmp_path / "events.jsonl", {"n": 1})
    assert read_lines(tmp_path / "events.jsonl") == [{"n": 1}]
