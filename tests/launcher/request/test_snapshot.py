"""The snapshot of the code: tracked files and code are copied in their present state, the rest is linked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import BadRequest
from launcher.request import snapshot
from launcher.request.code import kinds, limits, outside, scan, survey
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
    data = {"model.ckpt": "data"}
    expected = {".gitignore", "kept.py", "changed.py", "crlf.py", "run.sh", "untracked.py", "package/module.py", LATIN}
    expected |= {"ignored/file.py"}
    assert names(tmp_path / "code") == expected | links | set(HOSTILE) | set(data)
    assert taken.linked == data
    assert os.readlink(tmp_path / "code/model.ckpt") == str(repository / "model.ckpt")
    for name in expected | set(HOSTILE):
        assert (tmp_path / "code" / name).read_bytes() == (repository / name).read_bytes()
    assert {os.readlink(tmp_path / "code" / name) for name in links} == {"kept.py", "../ünï", "/no/such/file"}
    assert (tmp_path / "code/run.sh").stat().st_mode & 0o777 == 0o755
    assert (taken.files, taken.root, taken.dirty) == (len(expected) + len(HOSTILE), repository, True)
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


def test_a_large_file_is_no_part_of_the_diff(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("large.bin", ":(top)*.bin"):
        (repository / name).write_bytes(b"1" * 100)
    git(repository, "add", "--all")
    git(repository, "commit", "-qm", "second")
    for name in ("large.bin", ":(top)*.bin", "kept.py"):
        (repository / name).write_bytes(b"2" * 99)
    (repository / "large.bin").write_bytes(b"2" * 1000)
    monkeypatch.setattr(kinds, "MAX_FILE", 999)
    taken = take(repository, tmp_path / "code")
    assert taken.linked["large.bin"] == "data"
    assert "large.bin" not in taken.diff
    assert ("kept.py" in taken.diff, ":(top)*.bin" in taken.diff) == (True, True)


def test_runs_behind_a_link_are_left_out(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (repository / "my-runs").symlink_to(tmp_path / "scratch")
    (repository / "also").symlink_to(tmp_path / "scratch")
    (tmp_path / "alias").symlink_to(repository)
    taken = take(repository, tmp_path / "code", exclude=tmp_path / "alias/my-runs")
    assert os.readlink(tmp_path / "code/also") == str(tmp_path / "scratch")
    taken = take(repository, tmp_path / "two", exclude=repository / "my-runs")
    assert taken.left == {"my-runs": "the runs folder"}


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


def test_a_large_checkout_that_is_no_submodule_is_linked(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tmp_path / "submodule", repository / "ignored/clone", repository / "clone", tmp_path / "outside"):
        git(tmp_path, "init", "-q", str(place))
        for number in range(3):
            (place / f"m{number}.py").touch()
        git(place, "add", "--all")
        git(place, "commit", "-qm", "inner")
    (repository / "link").symlink_to(tmp_path / "outside")
    git(repository, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(tmp_path / "submodule"))
    monkeypatch.setattr(scan, "MAX_IGNORED", 2)
    taken = take(repository, tmp_path / "code")
    why = "a checkout of more than 2 files"
    assert taken.linked == {"model.ckpt": "data", "ignored/clone": why, "clone": why, "link": why}
    assert "submodule/m2.py" in names(tmp_path / "code")


def test_outside_git_source_and_settings_are_taken(tmp_path: Path) -> None:
    root = tmp_path / "plain"
    taken = ["a.py", "deep/er/b.py", "settings.toml", "data.json", "with space.yaml"]
    linked = {"model.bin": "data", ".hidden": "hidden, an environment or a run"}
    linked |= {"venv": linked[".hidden"], "images": "no code in it", "linked": "no code in it"}
    left = ["__pycache__/a.cpython-311.pyc", "runs/r/x.py", "venv/pyvenv.cfg", "venv/lib/x.py", "images/a.png"]
    for name in [*taken, *left, "model.bin", ".hidden/x.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    result = take(root, tmp_path / "code")
    assert names(tmp_path / "code") == {*taken, *linked}
    assert result.linked == linked
    assert result.left == {"runs": "the runs folder"}
    assert (tmp_path / "code/venv/lib/x.py").read_text() == "venv/lib/x.py"
    assert (result.commit, result.diff, result.dirty) == (None, "", False)


@pytest.mark.parametrize("in_git", [True, False])
def test_large_files_and_too_much_data_are_linked(
    tmp_path: Path, in_git: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    for name in ("small.py", "images/cats/1.png", "images/cats/2.png", "images/3.json", "few/a.txt", "pkg/m.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    with (root / "embeddings.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    if in_git:
        git(root, "init", "-q")
        git(root, "add", "few", "images", "pkg", "small.py")
    monkeypatch.setattr(limits, "MAX_FILES", 3)
    taken = take(root, tmp_path / "code")
    data = {"few": "no code in it", "images": "no code in it"}
    assert taken.linked == {"embeddings.json": "data", **({"images": "3 files of data, 0 MiB"} if in_git else data)}
    assert os.readlink(tmp_path / "code/images") == str(root / "images")
    assert (tmp_path / "code/embeddings.json").stat().st_size == 2**40
    assert {"small.py", "pkg/m.py"} <= names(tmp_path / "code")


def test_too_much_code_is_refused_naming_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    for n in range(5):
        (tmp_path / f"project/m{n}.py").write_text("x" * n)
    monkeypatch.setattr(limits, "MAX_FILES", 1)
    monkeypatch.setattr(limits, "MOST_FILES", 4)
    with pytest.raises(
        BadRequest, match=r"too large to copy .*4 files, 2048 MiB of code\).*files are m4\.py, m3\.py, m2\.py"
    ):
        take(tmp_path / "project", tmp_path / "code")
    assert not (tmp_path / "code").exists()


def test_a_folder_with_more_entries_than_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "project"
    for name in ("big/near.py", "big/deep/far.py", *(f"big/deep/{n}.txt" for n in range(10)), "train.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    monkeypatch.setattr(scan, "MAX_SCAN", 5)
    monkeypatch.setattr(scan, "MAX_LATER", 0)
    taken = take(root, tmp_path / "code")
    assert taken.linked == {"big/deep": survey.UNKNOWN}
    assert names(tmp_path / "code") == {"train.py", "big/near.py", "big/deep"}
    assert (tmp_path / "code/big/deep/far.py").is_file()


# ---- links, special files, modes, secrets ---------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["git", "plain"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A project with one module, in git and outside."""
    root = tmp_path / "project"
    (root / "pkg").mkdir(parents=True)
    (root / "pkg/m.py").write_text("import os\n")
    if request.param:
        git(root, "init", "-q")
        git(root, "add", "--all")
    return root


def test_links_lead_into_the_copy_to_the_data_or_to_nothing(plain: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-checkout"
    (other / "lib").mkdir(parents=True)
    git(other, "init", "-q")
    (other / "lib/code.py").write_text("VALUE = 1\n")
    (other / "back").symlink_to("../project")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/1.bin").touch()
    (tmp_path / "alone.py").write_text("ALONE = 1\n")
    links = {
        "self": ".",
        "here": str(plain),
        "pkg/again": str(plain / "pkg"),
        "other": "../other-checkout",
        "second": str(other / "lib"),
        "parent": "..",
        "top": "/",
        "data": str(tmp_path / "data"),
        "alone.py": "../alone.py",
        "file.bin": str(tmp_path / "data/1.bin"),
        "broken": "nowhere",
        "gone": "../nowhere",
        "loop": "loop",
        "one": "two",
        "two": "one",
        "null": "/dev/null",
    }
    for name, text in links.items():
        (plain / name).symlink_to(text)
    take(plain, tmp_path / "out/code")
    code = tmp_path / "out/code"
    found = {name: os.readlink(code / name) for name in links if (code / name).is_symlink()}
    assert found == {
        "self": ".",
        "here": ".",
        "pkg/again": ".",
        "broken": "nowhere",
        "loop": "loop",
        "one": "two",
        "two": "one",
        "gone": str(plain / "../nowhere"),
        "data": str(tmp_path / "data"),
        "file.bin": "data/1.bin",
        "second": "other/lib",
        "parent": str(tmp_path),
        "top": "/",
        "null": "/dev/null",
    }
    assert (code / "alone.py").read_text() == "ALONE = 1\n"
    assert not (code / "other").is_symlink()
    assert os.readlink(code / "other/back") == ".."
    (other / "lib/code.py").write_text("VALUE = 2\n")
    assert (code / "second/code.py").read_text() == "VALUE = 1\n"
    assert not [name for name in names(code) if "/.git/" in name]


def test_what_is_no_file_is_left_out_and_named(plain: Path, tmp_path: Path) -> None:
    os.mkfifo(plain / "pkg/pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(plain / "socket"))
    (plain / "empty").mkdir()
    (plain / "pkg/empty").mkdir()
    taken = take(plain, tmp_path / "code")
    why = "neither a file, a folder nor a link; the program has to make it itself"
    assert taken.left == {"pkg/pipe": why, "socket": why}
    assert (tmp_path / "code/empty").is_dir()
    assert (tmp_path / "code/pkg/empty").is_dir()


SECRETS = [
    *(".env", ".env.local", "prod.env", "server.pem", "tls.key", "id_rsa", "id_ed25519", ".netrc", "credentials.json"),
    *(
        "pkg/client_secret.json",
        "pkg/.env",
        "service-account.json",
        "secrets.toml",
        "secrets.py",
        "kaggle.json",
        "hf.token",
    ),
]


def test_secrets_are_not_copied(plain: Path, tmp_path: Path) -> None:
    for name in [*SECRETS, "id_utils.py", "keys.py", "pkg/tokens.yaml"]:
        (plain / name).write_text("s3cr3t")
    take(plain, tmp_path / "code")
    copied = {name for name in names(tmp_path / "code") if not (tmp_path / "code" / name).is_symlink()}
    assert not copied & set(SECRETS)
    assert {"id_utils.py", "keys.py", "pkg/tokens.yaml"} <= copied
    for name in SECRETS:
        assert os.readlink(tmp_path / "code" / name) == str(plain / name)


def test_modes_do_not_widen(plain: Path, tmp_path: Path) -> None:
    modes = {"a.py": 0o600, "b.py": 0o666, "c.sh": 0o777, "d.py": 0o444, "e.py": 0o640}
    for name, mode in modes.items():
        (plain / name).touch()
        (plain / name).chmod(mode)
    umask = os.umask(0)
    try:
        take(plain, tmp_path / "code")
    finally:
        os.umask(umask)
    found = {name: (tmp_path / "code" / name).stat().st_mode & 0o7777 for name in (*modes, "", "pkg")}
    assert (found.pop(""), found.pop("pkg")) == (0o755, 0o755)
    assert found == {"a.py": 0o600, "b.py": 0o644, "c.sh": 0o755, "d.py": 0o444, "e.py": 0o640}


# ---- git: settings that execute, owners, worktrees ------------------------------------------------------------------


def test_nothing_that_a_checkout_configures_is_executed(repository: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    command = tmp_path / "command"
    command.write_text(f"#!/bin/sh\ntouch '{mark}'\ncat\n")
    command.chmod(0o755)
    inner = repository / "inner"
    git(tmp_path, "init", "-q", str(inner))
    (inner / "i.py").touch()
    git(inner, "add", "--all")
    (repository / ".gitattributes").write_text("*.py filter=f diff=d\n")
    for root in (repository, inner):
        for name in ("post-index-change", "fsmonitor-watchman", "post-checkout"):
            (root / ".git/hooks" / name).write_text(command.read_text())
            (root / ".git/hooks" / name).chmod(0o755)
        (tmp_path / "more").write_text(f'[filter "f"]\n\tprocess = {command}\n')
        for key in ("core.fsmonitor", "filter.f.clean", "filter.f.smudge", "diff.d.textconv", "diff.d.command"):
            git(root, "config", key, str(command))
        git(root, "config", "diff.external", str(command))
        git(root, "config", "core.hooksPath", str(root / ".git/hooks"))
        git(root, "config", "include.path", str(tmp_path / "more"))
        git(root, "config", "core.worktree", "/etc")
    os.utime(repository / "kept.py")  # git has to compare the file, which calls the filter
    git(repository, "-c", f"core.worktree={repository}", "status")
    assert mark.exists()
    mark.unlink()
    os.utime(repository / "kept.py", (1, 1))
    taken = take(repository, tmp_path / "code")
    assert not mark.exists()
    assert "changed.py" in taken.diff
    assert {"inner/i.py", "kept.py"} <= names(tmp_path / "code")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a checkout to a second user")
def test_a_checkout_of_another_user_is_a_checkout(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = take(repository, tmp_path / "own")
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))  # without safe.directory
    refused = subprocess.run(["git", "-C", repository, "status"], capture_output=True, text=True, check=False)
    assert "dubious ownership" in refused.stderr
    assert take(repository, tmp_path / "code") == expected
    assert names(tmp_path / "code") == names(tmp_path / "own")


def test_a_worktree_and_a_sparse_checkout(repository: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    git(repository, "worktree", "add", "-q", "-b", "other", str(tree))
    (tree / "kept.py").write_text("in the tree\n")
    taken = take(tree, tmp_path / "code")
    assert (taken.commit, taken.dirty) == (git(repository, "rev-parse", "HEAD").strip(), True)
    assert "in the tree" in taken.diff
    assert (tmp_path / "code/kept.py").read_text() == "in the tree\n"
    assert "package/module.py" in names(tmp_path / "code")
    git(tree, "checkout", "-q", "kept.py")
    git(tree, "sparse-checkout", "set", "--sparse-index", "ünï")
    sparse = take(tree, tmp_path / "sparse")
    assert (sparse.dirty, sparse.diff) == (False, "")
    assert "package/module.py" not in names(tmp_path / "sparse")
    assert "ünï/côdé.py" in names(tmp_path / "sparse")


def test_a_split_index_another_hash_and_a_head_without_a_branch(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "--object-format=sha256", "new")
    root = tmp_path / "new"
    for name in ("a.py", "data.txt"):
        (root / name).touch()
    git(root, "add", "--all")
    git(root, "commit", "-qm", "first")
    git(root, "update-index", "--split-index")
    git(root, "checkout", "-q", "--detach")
    taken = take(root, tmp_path / "code")
    assert (len(taken.commit or ""), taken.files, taken.dirty) == (64, 2, False)


@pytest.mark.parametrize("damage", ["index", "config", "HEAD"])
def test_a_damaged_checkout_is_taken_like_a_plain_folder_and_that_is_said(
    repository: Path, tmp_path: Path, damage: str
) -> None:
    (repository / ".git" / damage).unlink()
    os.mkfifo(repository / ".git" / damage)  # git would wait for a writer
    taken = take(repository, tmp_path / "code")
    assert (tmp_path / "code/kept.py").is_file()
    assert (taken.commit is None, ".git" in taken.left) == (damage == "HEAD",) * 2


@pytest.mark.parametrize("variable", ["GIT_DIR", "GIT_INDEX_FILE", "GIT_EXTERNAL_DIFF", "GIT_OBJECT_DIRECTORY"])
def test_variables_of_a_surrounding_git_do_not_matter(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    expected = take(repository, tmp_path / "one")
    monkeypatch.setenv(variable, str(tmp_path / "nothing"))
    assert take(repository, tmp_path / "two") == expected


# ---- which folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "folder", "cwd", "root"),
    [
        ([], "p/scripts", None, "p/scripts"),
        ([], "p/scripts", "p", "p"),
        ([], "p/scripts", "q", "p/scripts"),
        (["p/pyproject.toml"], "p/scripts/deep", None, "p"),
        (["p/setup.py", "p/scripts/setup.py"], "p/scripts", "p", "p/scripts"),
        (["p/pkg/__init__.py", "p/pkg/sub/__init__.py"], "p/pkg/sub", None, "p"),
        (["home/pyproject.toml"], "home/exp", "home", "home/exp"),
    ],
)
def test_the_project_outside_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], folder: str, cwd: str | None, root: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    assert project_root(tmp_path / folder, tmp_path / cwd if cwd else None) == tmp_path / root


def test_a_script_in_the_home_folder_takes_little_along(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = repository.parent
    for name in ("train.py", "helpers/h.py", "other/deep/x.py", "videos/1.mp4"):
        (home / name).parent.mkdir(exist_ok=True, parents=True)
        (home / name).touch()
    monkeypatch.setenv("HOME", str(home))
    taken = snapshot.take(project_root(home), tmp_path / "runs/n/code", exclude=home / "runs")
    assert names(tmp_path / "runs/n/code") == {"train.py", "helpers/h.py", "other", "videos", repository.name}
    few = "no code directly in it, beside many other projects"
    assert taken.linked == {"other": few, "videos": few, repository.name: "a checkout of more than 0 files"}


def test_folders_on_pythonpath_that_are_no_project_or_too_large(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "many").mkdir()
    for number in range(3):
        (tmp_path / f"many/m{number}.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "many"), str(Path.home()), "/", "/no/such/folder", *sys.path])
    monkeypatch.setattr(snapshot, "MOST_OUTSIDE", 2)
    found, moved, first = snapshot.parts(repository, repository, tmp_path / "runs/n", as_module=False)
    assert (moved, first) == ({}, [str(tmp_path / "runs/n/packages/many")])
    looked = {part.root: part.look(tmp_path / "runs").left.get("", "") for part in found[1:]}
    shared = "many projects lie in it; edits of its modules reach the run"
    assert looked == {
        tmp_path / "many": f"more than 2 files; {outside.INSTALL}",
        Path.home(): shared,
        Path("/"): shared,
    }
    taken = snapshot.take_part(found[1], tmp_path / "runs")
    assert (taken.files, os.readlink(tmp_path / "runs/n/packages/many")) == (0, str(tmp_path / "many"))


def test_a_repository_of_the_home_folder_is_not_the_project_of_all_in_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(repository))
    assert project_root(repository / "package") == repository / "package"
    assert project_root(repository) == repository


def test_without_git_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert project_root(tmp_path) == tmp_path
