from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from training.files import append_line, read_json, read_lines, write_atomic


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a file"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a file"]
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
