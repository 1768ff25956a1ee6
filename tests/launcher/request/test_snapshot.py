"""The snapshot of the code: tracked and untracked files of git in their present state, also with hostile names."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher.errors import BadRequest
from launcher.request import snapshot
from launcher.request.code.roots import project_root

HOSTILE = [
    "with space.py",
    "new\nline.py",
    "carriage\r\nreturn.py",
    "quote'\".py",
    "$(touch pwned).py",
    "-rf",
    "ünï/côdé.py",
]
LATIN = os.fsdecode(b"latin-\xe9.py")  # not UTF-8


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout with tracked, changed, untracked, ignored and deleted files, links, modes and hostile names."""
    root = tmp_path / "a project's folder"
    root.mkdir()
    git(root, "init", "-q")
    (root / ".gitignore").write_text("*.ckpt\nignored/\nruns/\n")
    for name in ("kept.py", "changed.py", "deleted.py", "package/module.py", *HOSTILE, LATIN):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(f"# {name!r}\n")
    (root / "crlf.py").write_bytes(b"one\r\ntwo\r\n")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / "link.py").symlink_to("kept.py")
    (root / "package/link to folder").symlink_to("../ünï")
    (root / "dangling").symlink_to("/no/such/file")
    git(root, "add", "--all")
    git(root, "commit", "-qm", "first")
    (root / "changed.py").write_text("changed\n")
    (root / "crlf.py").write_bytes(b"one\r\nthree\r\n")
    (root / "deleted.py").unlink()
    (root / "untracked.py").write_text("new\n")
    (root / "model.ckpt").write_text("big\n")
    (root / "ignored").mkdir()
    (root / "ignored/file.py").write_text("ignored\n")
    return root


def take(root: Path, destination: Path, exclude: Path | None = None) -> snapshot.Snapshot:
    return snapshot.take(project_root(root), destination, exclude or root / "runs", root)


def names(folder: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(at, name), folder)
        for at, folders, files in os.walk(folder)
        for name in files + [f for f in folders if os.path.islink(os.path.join(at, f))]
    }


def test_a_checkout_as_it_is_now(repository: Path, tmp_path: Path) -> None:
    taken = take(repository, tmp_path / "code")
    links = {"link.py", "package/link to folder", "dangling"}
    expected = {".gitignore", "kept.py", "changed.py", "crlf.py", "run.sh", "untracked.py", "package/module.py", LATIN}
    assert names(tmp_path / "code") == expected | links | set(HOSTILE)
    for name in expected | set(HOSTILE):
        assert (tmp_path / "code" / name).read_bytes() == (repository / name).read_bytes()
    assert {os.readlink(tmp_path / "code" / name) for name in links} == {"kept.py", "../ünï", "/no/such/file"}
    assert (tmp_path / "code/run.sh").stat().st_mode & 0o777 == 0o755
    assert (taken.files, taken.root, taken.dirty) == (len(expected | links) + len(HOSTILE), repository, True)
    assert not (repository / "pwned").exists()


def test_commit_and_diff_give_back_what_was_tracked(repository: Path, tmp_path: Path) -> None:
    git(repository, "config", "diff.noprefix", "true")  # user settings of git's output
    git(repository, "config", "color.ui", "always")
    git(repository, "config", "diff.external", "false")
    taken = take(repository, tmp_path / "code")
    assert taken.commit == git(repository, "rev-parse", "HEAD").strip()
    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", str(repository), str(again))
    git(again, "checkout", "-q", str(taken.commit))
    (tmp_path / "diff").write_bytes(taken.diff.encode("utf-8", "surrogateescape"))
    git(again, "apply", str(tmp_path / "diff"))
    assert (again / "changed.py").read_text() == "changed\n"
    assert (again / "crlf.py").read_bytes() == b"one\r\nthree\r\n"
    assert not (again / "deleted.py").exists()


def test_a_clean_checkout_has_no_diff(repository: Path, tmp_path: Path) -> None:
    git(repository, "add", "--all")
    git(repository, "commit", "-qm", "second")
    taken = take(repository, tmp_path / "code")
    assert (taken.diff, taken.dirty) == ("", False)


def test_a_checkout_without_a_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "new")
    (tmp_path / "new/a.py").touch()
    taken = take(tmp_path / "new", tmp_path / "code")
    assert (taken.commit, taken.diff, taken.files) == (None, "", 1)


def test_edits_after_the_snapshot_change_nothing(repository: Path, tmp_path: Path) -> None:
    take(repository, tmp_path / "code")
    with (repository / "kept.py").open("a") as file:  # in place, which would change a hard link
        file.write("edited\n")
    (repository / "changed.py").unlink()
    assert (tmp_path / "code/kept.py").read_text() == "# 'kept.py'\n"
    assert (tmp_path / "code/changed.py").read_text() == "changed\n"


def test_the_runs_are_left_out_even_where_git_does_not_ignore_them(repository: Path, tmp_path: Path) -> None:
    runs = repository / "my runs"
    (runs / "one").mkdir(parents=True)
    (runs / "one/plan.json").touch()
    take(repository, runs / "two" / "code", exclude=runs)
    assert not any("plan.json" in name for name in names(runs / "two" / "code"))
    assert (runs / "two/code/kept.py").is_file()


def test_a_folder_of_the_checkout_takes_the_whole_checkout(repository: Path) -> None:
    assert project_root(repository / "package") == repository


def test_submodules_and_checkouts_inside_come_along(repository: Path, tmp_path: Path) -> None:
    for name in ("library", "submodule"):
        git(tmp_path, "init", "-q", str(tmp_path / name))
        (tmp_path / name / "inner.py").write_text("inner\n")
        git(tmp_path / name, "add", "--all")
        git(tmp_path / name, "commit", "-qm", "inner")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(tmp_path / "submodule"))
    git(repository, "clone", "-q", str(tmp_path / "library"))
    take(repository, tmp_path / "code")
    found = names(tmp_path / "code")
    assert {"submodule/inner.py", "library/inner.py"} <= found
    assert not any("/.git/" in name for name in found)


def test_outside_git_source_and_settings_are_taken(tmp_path: Path) -> None:
    root = tmp_path / "plain"
    taken = ["a.py", "deep/er/b.py", "settings.toml", "data.json", "with space.yaml"]
    left = [
        "model.bin",
        ".hidden/x.py",
        "__pycache__/a.cpython-311.pyc",
        "venv/pyvenv.cfg",
        "venv/lib/x.py",
        "runs/r/x.py",
    ]
    for name in taken + left:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    result = take(root, tmp_path / "code")
    assert names(tmp_path / "code") == {*taken, "linked"}
    assert (result.commit, result.diff, result.dirty) == (None, "", False)


@pytest.mark.parametrize("in_git", [True, False])
def test_too_much_is_refused_naming_the_largest(tmp_path: Path, in_git: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "project"
    root.mkdir()
    if in_git:
        git(root, "init", "-q")
    (root / "small.py").touch()
    with (root / "embeddings.json").open("wb") as file:
        file.truncate(snapshot.MAX_BYTES + 1)  # sparse
    advice = "name them in .gitignore" if in_git else "start from a folder that holds only the code"
    with pytest.raises(
        BadRequest, match=rf"too large to copy .*256 MiB.*largest files are embeddings\.json, .*{advice}"
    ):
        take(root, tmp_path / "code")
    assert not (tmp_path / "code").exists()
    (root / "embeddings.json").write_text("{}")
    monkeypatch.setattr(snapshot, "MAX_FILES", 1)
    with pytest.raises(BadRequest, match="limit: 1 files"):
        take(root, tmp_path / "code")


def test_without_git_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert project_root(tmp_path) == tmp_path
