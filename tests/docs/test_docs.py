"""README and docs/: links resolve, commands and programs run as shown, and the site builds without a warning."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.cli.launch import parse_request
from launcher.cli.main import parsers
from launcher.cli.parser import COMMANDS
from launcher.config import profiles
from launcher.errors import BadRequest
from launcher.request.spec import DEFAULT_TARGET
from tests.docs.pages import (
    LANGUAGES,
    NEEDS,
    PAGES,
    ROOT,
    Block,
    Command,
    anchors,
    blocks,
    inline_commands,
    links,
    prose,
)
from tests.launcher.engines import COMMAND
from tests.structure.words import PROSE
from training.bert.config import TrainConfig
from training.flags.fields import parse

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
on_every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)
BLOCKS = [block for page in PAGES for block in blocks(page)]


@on_every_page
def test_links_resolve(page: Path) -> None:
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}: known: {sorted(anchors(target))}"


@on_every_page
def test_every_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: ```{block.language}"
        assert block.notes.keys() <= {"needs", "exit"}, f"{block.place}: {block.notes}"
        assert set(block.notes.get("needs", NEEDS[0]).split(", ")) <= set(NEEDS), f"{block.place}: {block.notes}"
        if block.language == "text":
            assert not re.search(r"^(\$ |launch )", block.text, re.MULTILINE), (
                f"{block.place}: a command in a text block"
            )


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "profiles.md"], ids=lambda page: page.stem)
def test_the_prose_has_none_of_the_replaced_words(page: Path) -> None:
    """profiles.md is generated from docstrings, which tests.structure checks."""
    assert [match[0] for match in PROSE.finditer(re.sub(r"`[^`]*`", "", prose(page)))] == []


def test_every_event_is_in_the_reference() -> None:
    sources = [path.read_text() for package in ("launcher", "training") for path in (ROOT / package).rglob("*.py")]
    kinds = {kind for source in sources for kind in re.findall(r'\.event\(\s*"([\w-]+)"', source)}
    table = (ROOT / "docs/reference/run-directory.md").read_text().split("## Events")[1]
    first = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    assert {kind for cell in first for kind in re.findall(r"`([\w-]+)`", cell)} == kinds


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("python", "toml")], ids=lambda b: b.place)
def test_programs_and_profiles_can_be_read(block: Block) -> None:
    if block.language == "python":
        compile(block.text, block.place, "exec")
    else:
        tomllib.loads(block.text)


# ---- commands -------------------------------------------------------------------------------------------------------


def check_options(argv: Sequence[str], place: str) -> None:
    """Check that the options and the shipped profile of ``launch ARGV`` exist, and the types of values."""
    try:
        if argv and argv[0] in COMMANDS:
            if list(argv[:2]) != ["clusters", "new"]:
                parsers()[argv[0]].parse_args(list(argv[1:]))
            return
        spec, _ = parse_request(argv)
        if spec.target == DEFAULT_TARGET:
            parse(TrainConfig, spec.args)
        if spec.cluster and spec.cluster.startswith("examples/"):
            assert spec.cluster in [profile.name for profile in profiles.profiles(ROOT)], f"{place}: {spec.cluster}"
    except SystemExit:
        pass  # --help, --version; errors are BadRequest
    except (BadRequest, ValueError) as error:
        pytest.fail(f"{place}: launch {shlex.join(argv)}: {error}")


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language in ("sh", "console") and "needs" in b.notes], ids=lambda b: b.place
)
def test_options_of_commands_that_are_not_run(block: Block) -> None:
    for command in block.commands():
        if command.argv[0] == "launch":
            check_options(command.argv[1:], block.place)


@on_every_page
def test_options_of_commands_in_the_text(page: Path) -> None:
    for text in inline_commands(page):
        argv = shlex.split(text)[1:]
        placeholders = [word for word in argv if (word.isupper() and word != "RUN") or "..." in word or "[" in word]
        if not placeholders and argv[0] not in (COMMANDS if len(argv) == 1 else ()):
            check_options(argv, f"{page}: `{text}`")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language in ("sh", "console") for b in blocks(page))], ids=lambda p: p.stem
)
def test_commands_run_as_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page in order in one folder: save programs and profiles, run commands."""
    monkeypatch.setenv("USER", "me")
    for block in blocks(page):
        if block.language in ("python", "toml") and block.file:
            (tmp_path / block.file).parent.mkdir(exist_ok=True)
            (tmp_path / block.file).write_text(block.text)
        elif block.language in ("sh", "console") and "needs" not in block.notes:
            for command in block.commands():
                run(command, block, tmp_path)


def run(command: Command, block: Block, folder: Path) -> None:
    """Run one command of `block` in `folder`; check its exit status and the output that the page shows."""
    program, *rest = command.argv
    words = {"launch": COMMAND, "python": [sys.executable]}
    assert program in words, f"{block.place}: {program} is not run by this test; say what it needs"
    output = None
    if ">" in rest:
        output, rest = folder / rest[-1], rest[: rest.index(">")]
    done = subprocess.run(
        [*words[program], *rest],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    expected = int(block.notes.get("exit", 0))
    assert done.returncode == expected, f"{block.place}: {shlex.join(command.argv)}: {done.returncode}\n{done.stdout}"
    if output is not None:
        output.write_text(done.stdout)
    real = done.stdout.replace(str(folder), "/home/me").replace(socket.gethostname(), "node1")
    if command.output:
        problem = differs(command.output, real.splitlines())
        assert not problem, f"{block.place}: {shlex.join(command.argv)}: {problem}; it printed\n\n{real}"


def differs(shown: Sequence[str], printed: Sequence[str]) -> str:
    """Compare the lines on a page with the output of a command; returns the differences, empty if they agree.

    Numbers match each other, ``...`` in a line matches any text, and a line ``...`` matches any lines. The order of lines
    does not matter, since ranks and launcher print independently.
    """
    left = list(printed)
    for line in shown:
        if line.strip() in ("...", ""):
            continue
        words = re.sub(r"\d+(\\\.\d+)?", r"\\d+(?:[.]\\d+)?", re.escape(line.rstrip())).replace(r"\.\.\.", ".*")
        match = next((each for each in left if re.fullmatch(words, each.rstrip())), None)
        if match is None:
            return f"there is no line {line!r}"
        left.remove(match)
    left = [line for line in left if line.strip()]
    return f"the page does not show {left[0]!r}" if left and "..." not in map(str.strip, shown) else ""


def test_lines_that_differ_are_found() -> None:
    shown = ["run 12: ok in 0.8 s", "at ... by me", "done"]
    assert differs(shown, ["done", "run 3: ok in 1 s", "", "at home by me"]) == ""
    assert differs(["...", "b"], ["a", "b", "c"]) == ""
    assert "no line 'done'" in differs(shown, ["run 3: ok in 1 s", "at home by me"])
    assert "no line 'run 12" in differs(shown, ["run x: ok in 1 s", "at home by me", "done"])
    assert "does not show 'more'" in differs(shown, ["run 3: ok in 1 s", "at home by me", "done", "more"])


# ---- the site -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("_build", "_generated"))
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(tmp_path / "docs"), str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    commands = (tmp_path / "site/reference/command-line.html").read_text()
    assert all(f"launch {name}" in commands for name in COMMANDS)
    assert "should_stop" in (tmp_path / "site/reference/python-api.html").read_text()


def test_contributing_names_files_that_exist() -> None:
    named = re.findall(r"`((?:launcher|training|tests|scripts|docs)/[\w./-]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
