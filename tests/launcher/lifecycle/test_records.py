"""Digests of the two logs of a run, and the index, which never changes a result."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launcher.lifecycle import accounting
from launcher.lifecycle import run_dir as module
from launcher.lifecycle.records import index
from launcher.lifecycle.records.attempts import AttemptsDigest
from launcher.lifecycle.records.index import read_digests
from launcher.lifecycle.records.metrics import MOST_ATTEMPTS, MetricsDigest, median
from launcher.lifecycle.run_dir import RunDir, WatchedDir
from launcher.request.spec import State
from training.files import append_line, read_lines, records_in


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose logs have an index from their first byte on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "LARGE", 1)
    made = RunDir(tmp_path / "runs" / "it")
    made.create()
    return made


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "launch" / "logs").glob("*"))


def ledger(run: RunDir) -> Any:
    """The ledger by way of the index, which has to be the one of all lines."""
    metrics, attempts = read_digests(run.metrics_file, run.events_file)
    found = accounting.ledger(attempts, metrics, 1000.0)
    assert found == accounting.keep(read_lines(run.events_file), read_lines(run.metrics_file), 1000.0)
    assert metrics.count == len(read_lines(run.metrics_file))
    return found


def lines(generator: random.Random, attempt: int, time: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Some events and metrics of an attempt, from `time` on, in an order that real ones may have."""
    steps, events = [], []
    step = generator.randrange(20)
    for _ in range(generator.randrange(1, 12)):
        time += generator.choice([0.5, 1.0, 3.0, -2.0])
        step += generator.choice([1, 1, 1, 5, 0, -3])
        record: dict[str, Any] = {"time": time, "attempt": attempt, "step": max(0, step), "loss": 1.0}
        kind = generator.randrange(6)
        if kind == 0:
            record |= {"eval": {"f1": 0.5}, "seconds": 0.25}
        elif kind == 1:
            record["eval"] = {"f1": 0.5}
        steps.append(record)
        event = {
            "time": time,
            "attempt": attempt,
            "event": generator.choice(["saved", "resumed", "failed", "requeued", "restarted"]),
        }
        events.append({**event, "step": max(0, step), **({"blocked": 0.25} if kind % 2 else {})})
    return [{"time": time - 30, "event": "started", "attempt": attempt, "world_size": 2}, *events], steps


@pytest.mark.parametrize("seed", range(30))
def test_the_index_changes_no_result(run: RunDir, tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    time = 0.0
    for number in range(1, 8):
        events, steps = lines(generator, generator.choice([number, number, 1, number - 1]), time)
        time += 40
        for file, records in ((run.events_file, events), (run.metrics_file, steps)):
            for record in records:
                append_line(file, record)
        match generator.randrange(8):
            case 0:  # a torn line, which the next writer ends
                with run.metrics_file.open("a") as log:
                    log.write('{"time": 3.0, "attempt": 1, "step": 7')
            case 1:  # a whole line without its end
                with run.events_file.open("a") as log:
                    log.write('{"time": 1.0, "event": "failed"}')
            case 2:  # changed in place, with the same size
                text = run.metrics_file.read_bytes()
                run.metrics_file.write_bytes(text.replace(b'"step":1', b'"step":2'))
            case 3:  # shorter than it was
                os.truncate(run.metrics_file, run.metrics_file.stat().st_size // 2)
            case 4:  # replaced by another file of the same times
                info = run.events_file.stat()
                run.events_file.write_bytes(run.events_file.read_bytes()[::-1])
                os.utime(run.events_file, ns=(info.st_atime_ns, info.st_mtime_ns))
            case 5:
                run.metrics_file.unlink()
                run.metrics_file.write_text("")
            case 6:  # a damaged entry
                for entry in entries(tmp_path):
                    entry.write_bytes(entry.read_bytes().replace(b"1", b"2", 3))
        ledger(run)
        ledger(run)
    assert len(entries(tmp_path)) == 1


def test_an_unchanged_log_is_not_read_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    events, steps = lines(random.Random(1), 1, 0.0)
    for file, records in ((run.events_file, events), (run.metrics_file, steps)):
        for record in records:
            append_line(file, record)
        os.utime(file, (0, 0))
    monkeypatch.setattr(index, "SAME_TIME", -1e9)  # as if the files were old
    first = read_digests(run.metrics_file, run.events_file)
    monkeypatch.setattr(index, "line_blocks", lambda *_: pytest.fail("the log is read"))
    monkeypatch.setattr(index, "_hashed", lambda *_: pytest.fail("the log is read"))
    assert read_digests(run.metrics_file, run.events_file) == first


def test_of_a_grown_log_only_the_new_lines_are_parsed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(500):
        append_line(run.metrics_file, {"time": float(step), "step": step})
    read_digests(run.metrics_file, run.events_file)
    append_line(run.metrics_file, {"time": 500.0, "step": 500})
    parsed: list[bytes] = []

    def count(block: bytes) -> Iterator[dict[str, Any]]:
        parsed.append(block)
        return records_in(block)

    monkeypatch.setattr(index, "records_in", count)
    assert read_digests(run.metrics_file, run.events_file)[0].newest == 500
    assert [block.count(b"\n") for block in parsed if block] == [1]


def test_the_index_of_a_small_run_and_without_a_folder(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_line(run.metrics_file, {"time": 1.0, "step": 1})
    monkeypatch.setattr(index, "LARGE", 1 << 20)
    assert ledger(run) is not None
    assert entries(tmp_path) == []
    monkeypatch.setattr(index, "LARGE", 1)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert ledger(run) is not None


def test_a_digest_survives_packing() -> None:
    generator, metrics, attempts = random.Random(3), MetricsDigest(), AttemptsDigest()
    for number in range(1, 5):
        events, steps = lines(generator, number, 40.0 * number)
        metrics.add(steps)
        attempts.add(events)
    assert MetricsDigest.unpacked(json.loads(json.dumps(metrics.packed()))) == metrics
    again = AttemptsDigest.unpacked(json.loads(json.dumps(attempts.packed())))
    assert [asdict(attempt) for attempt in again.attempts] == [asdict(attempt) for attempt in attempts.attempts]
    more = [{"time": 500.0, "event": "finished", "attempt": 2}]
    again.add(more)
    attempts.add(more)
    assert again == attempts


def test_a_digest_takes_little_memory() -> None:
    metrics, attempts = MetricsDigest(), AttemptsDigest()
    tracemalloc.start()
    try:
        metrics.add({"time": float(n), "attempt": n % (2 * MOST_ATTEMPTS), "step": n * n} for n in range(50_000))
        attempts.add({"time": float(n), "attempt": n, "event": "started"} for n in range(50_000))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert (metrics.count, len(metrics.logs)) == (50_000, MOST_ATTEMPTS)


def test_medians() -> None:
    assert [median(values) for values in ([], [3.0], [1.0, 2.0], [5.0, 1.0, 3.0])] == [0.0, 3.0, 1.5, 3.0]
    digest = MetricsDigest()
    assert digest.spacing() is None
    digest.add({"time": float(step), "step": step} for step in (0, 10, 20, 25))
    assert digest.spacing() == 10


def test_a_watched_file_is_read_again_once_it_has_changed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = WatchedDir(run.path)
    assert (watched.result(), watched.job(), watched.newest_event("started"), watched.last_attempt()) == (
        None,
        None,
        None,
        0,
    )
    run.write_job("local", "host:12:3")
    run.event("started", attempt=1)
    run.claim_attempt()
    for _ in range(2):
        assert (watched.job() or {})["job_id"] == "host:12:3"
        assert (watched.newest_event("started") or {})["attempt"] == 1
        assert watched.last_attempt() == 1
        monkeypatch.setattr(module, "read_json", lambda *_, **__: pytest.fail("the file is read"))
    monkeypatch.undo()
    run.write_result(State.FAILED)
    run.event("started", attempt=2)
    assert (watched.result() or {})["state"] == "failed"
    assert (watched.newest_event("started") or {})["attempt"] == 2
    run.result_file.unlink()
    assert watched.result() is None
