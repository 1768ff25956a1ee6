"""Requests of clients in a run directory: who may have written them, what is in them, what is left behind."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.agent.inside.visits import VisitRequests
from launcher.agent.protocol import Visit
from launcher.lifecycle.records import visits
from launcher.lifecycle.records.visits import VisitRequest
from launcher.lifecycle.run_dir import RunDir

REQUEST = VisitRequest("stacks", ["10.0.0.1", "::1"], 4711, "ab" * 32, ranks=[3])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return RunDir(tmp_path).visits


def test_a_request_is_read_back_and_removed(folder: Path) -> None:
    visit = visits.leave(folder, REQUEST)
    assert visits.read(folder, visit) == REQUEST
    assert visits.waiting(folder) == {visit}
    assert [oct(path.stat().st_mode & 0o777) for path in (folder, folder / f"{visit}.json")] == ["0o700", "0o600"]
    visits.leave_failure(folder, visit, 7, "no route")
    assert visits.failures(folder, visit) == {7: "no route"}
    visits.remove(folder, visit)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        {"kind": "anything"},
        {"port": 0},
        {"port": "4711"},
        {"key": "ab"},
        {"key": "g" * 64},
        {"addresses": []},
        {"addresses": ["1.1.1.1"] * 300},
        {"ranks": ["0"]},
        {"more": 1},
    ],
)
def test_what_is_no_request_is_refused(folder: Path, data: object) -> None:
    visit = visits.leave(folder, REQUEST)
    file = folder / f"{visit}.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | data if data and isinstance(data, dict) else data))
    with pytest.raises(ValueError, match=r".+"):
        visits.read(folder, visit)


def test_a_file_that_others_could_have_written_is_refused(folder: Path, tmp_path: Path) -> None:
    visit = visits.leave(folder, REQUEST)
    file = folder / f"{visit}.json"
    file.chmod(0o622)
    with pytest.raises(OSError, match="others can write it"):
        visits.read(folder, visit)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="is a link"):
        visits.read(folder, visit)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(OSError, match="not a plain file"):
        visits.read(folder, visit)
    file.unlink()
    file.write_bytes(b" " * (visits.MAX_BYTES + 1))
    with pytest.raises(OSError, match="larger than"):
        visits.read(folder, visit)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_file_of_another_user_is_refused(folder: Path) -> None:
    visit = visits.leave(folder, REQUEST)
    os.chown(folder / f"{visit}.json", 12345, 12345)
    with pytest.raises(OSError, match="does not belong to this user"):
        visits.read(folder, visit)


def test_no_request_is_left_in_a_folder_of_others(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(OSError, match=r".+"):
        visits.leave(folder, REQUEST)
    folder.unlink()
    folder.mkdir(0o777)
    folder.chmod(0o777)
    with pytest.raises(OSError, match="others can write"):
        visits.leave(folder, REQUEST)
    assert list(elsewhere.iterdir()) == list(folder.iterdir()) == []


def test_the_next_client_removes_what_a_killed_one_has_left(folder: Path) -> None:
    old, young = visits.leave(folder, REQUEST), visits.leave(folder, REQUEST)
    os.utime(folder / f"{old}.json", (time.time() - 2 * visits.OLD,) * 2)
    new = visits.leave(folder, REQUEST)
    assert visits.waiting(folder) == {young, new}


def test_the_supervisor_sends_each_request_once_and_ignores_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = RunDir(tmp_path)
    requests = VisitRequests(run_dir)
    assert requests.new() == []
    requests.prepare()
    assert (run_dir.claim_attempt(), run_dir.claim_attempt()) == (1, 2)
    first = visits.leave(run_dir.visits, REQUEST)
    for name in ("x.json", "../x.json".replace("/", "_"), f"{'a' * 32}.json.tmp", f"{'b' * 31}.json"):
        (run_dir.visits / name).write_text("{}")
    assert requests.new() == [Visit(first, 2, [3], [])]
    assert requests.new() == []
    (run_dir.visits / f"{'c' * 32}.json").write_text("{}")
    second = visits.leave(run_dir.visits, replace(REQUEST, kind="command", ranks=[], nodes=[1]))
    assert requests.new() == [Visit(second, 2, [], [1])]
    assert "a request to look inside was ignored" in capsys.readouterr().err
    events = [(e["kind"], e["ranks"], e["nodes"]) for e in run_dir.events() if e["event"] == "visited"]
    assert events == [("stacks", [3], []), ("command", [], [1])]
