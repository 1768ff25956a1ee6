"""The end of a run: what ranks were writing when they were killed is removed."""

from __future__ import annotations

from pathlib import Path

from launcher.lifecycle.recovery import remove_unfinished
from launcher.lifecycle.run_dir import RunDir


def test_temporary_files_of_killed_ranks_are_removed(tmp_path: Path) -> None:
    ranks = [".value.json.bdd012dab05ba2fe.tmp", ".value.pkl.0a.tmp", "errors/1/.1.json.bdd012dab05ba2fe.tmp"]
    others = [".poll.json.bdd012dab05ba2fe.tmp", "value.json", "errors/1/1.json", "errors/file"]
    for name in (*ranks, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_unfinished(RunDir(tmp_path))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)


def test_a_run_directory_that_is_gone(tmp_path: Path) -> None:
    remove_unfinished(RunDir(tmp_path / "gone"))
