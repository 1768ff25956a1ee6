"""What a followed log shows: whole lines behind a pipe, text as it comes on a screen, and nothing that acts on a terminal."""

from __future__ import annotations

import io
import os
import random
import re
import tracemalloc
from pathlib import Path

import pytest

from launcher.client.screen import Screen
from launcher.client.tail import LONGEST_LINE, LiveTail, Tail, printable, safe, safe_line, uncoloured
from launcher.lifecycle.run_dir import tail as last_lines
from training.files import NotPlain


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\nno newline", ["one", "no newline"]),
        (b"windows\r\nlines\r\n", ["windows", "lines"]),
        (b" 10%\r 20%\r100%\nafter\n", ["100%", "after"]),
        (b" 10%\r 20%\r", [" 20%"]),
        (b"a\r\r\nb\r\r", ["a", "b"]),
        (b"caf\xc3\xa9 \xff\n", ["café �"]),
        (b"\n\n", ["", ""]),
        (b"", []),
    ],
)
def test_the_lines_of_a_log_whatever_the_pieces_in_which_it_grows(
    tmp_path: Path, written: bytes, lines: list[str]
) -> None:
    path = tmp_path / "0.log"
    assert list(Tail(path).read()) == []
    for size in (1, 2, 3, 1000):
        path.write_bytes(b"")
        tail = Tail(path)
        found: list[str] = []
        for start in range(0, len(written), size):
            with path.open("ab") as file:
                file.write(written[start : start + size])
            found += tail.read()
        assert found + list(tail.read(end=True)) == lines
        assert list(tail.read(end=True)) == []


@pytest.mark.parametrize("byte", [b"\r", b"x", b"10%\r"])
def test_an_endless_line_takes_little_memory(tmp_path: Path, byte: bytes) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(byte * (60_000_000 // len(byte)))
    tail = Tail(path)
    tracemalloc.start()
    try:
        assert list(tail.read()) == []
        assert tracemalloc.get_traced_memory()[1] < 4 * LONGEST_LINE
    finally:
        tracemalloc.stop()
    assert len(tail.rest) <= LONGEST_LINE


def test_an_endless_line_on_a_screen_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_bytes(b"\r" * 60_000_000)
    tail, length = LiveTail(path), 0
    tracemalloc.start()
    try:
        for text in tail.read():
            length += len(text)
        assert tracemalloc.get_traced_memory()[1] < 4 * LONGEST_LINE
    finally:
        tracemalloc.stop()
    assert length == 60_000_000


LINES = b"one\r\n 10%\r 20%\r100%\nfeed\x0c\xc2\x85\xe2\x80\xa8on\n\xff caf\xc3\xa9\r\nlast"
SHOWN = ["one", "100%", "feed\x0c\x85\u2028on", "\ufffd caf\xe9", "last"]


def test_the_end_of_a_log_has_the_same_lines(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    for written in (LINES, LINES + b"\n", LINES + b"\r\n"):
        path.write_bytes(written)
        assert last_lines(path, 20) == SHOWN
        assert last_lines(path, 2) == SHOWN[-2:]
    path.write_bytes(b"")
    assert last_lines(path) == []
    path.write_bytes(b"\n")
    assert last_lines(path) == [""]


KEPT = ["\x1b[31mred\x1b[0m", "\x1b[38;5;208mx", "\x1b[A\r 10%|#  |\x1b[K\n", "tab\tback\bspace", "é 漢字 🙂"]
DROPPED = [
    ("\x1b]0;title\x07a", "a"),
    ("\x1b]52;c;ZXZpbA==\x1b\\a", "a"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1bP+q544e\x1b\\a", "a"),
    ("\x1b_Gf=100;AAAA\x1b\\a", "a"),
    ("\x1b[2J\x1b[3;4Ha", "a"),
    ("\x1b[?1049ha\x1b[?25l", "a"),
    ("\x1b[6n\x1b[c\x1bca", "a"),
    ("\x9b31ma\x9d0;x\x9c", "31ma0;x"),
    ("a\x07\x00\x0e\x7f\x0c", "a"),
    ("\x1b(0a\x1b#8", "a"),
    ("a\u202eb\u2066c\u200f", "abc"),
]


@pytest.mark.parametrize("text", KEPT)
def test_colours_and_bars_are_kept(text: str) -> None:
    assert safe(text) == text


@pytest.mark.parametrize(("text", "shown"), DROPPED)
def test_what_acts_on_the_terminal_is_dropped(text: str, shown: str) -> None:
    assert safe(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        *((text, text) for text in ["plain", "tab\tbed", "\x1b[31mred\x1b[0m", "\x1b[38;5;208mx\x1b[m", "é 漢字 🙂"]),
        ("\x1b[31mred", "\x1b[31mred\x1b[0m"),
        ("\x1b[0m\x1b[1;31mred\x1b[K", "\x1b[0m\x1b[1;31mred\x1b[0m"),
        ("\x1b[A\x1b[2Cup\b\b", "up"),
        ("a\rb\x0bc\x85d\u2028e", "abcde"),
        *DROPPED,
    ],
)
def test_a_whole_line_has_colours_and_tabs_only(text: str, shown: str) -> None:
    assert safe_line(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand é 漢字", "two\nlines\tand é 漢字"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b\x7f\r\b\x00", "\\x9b\\x7f\\x0d\\x08\\x00"),
        ("a\u202eb\u2028\udcff\ufeff", "a\\u202eb\\u2028\\udcff\\ufeff"),
    ],
)
def test_what_cannot_be_printed_is_shown_by_its_code(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert (
        printable(text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass") * 300, 100).count("...") == 1
    )


def test_quoted_lines_lose_their_colours() -> None:
    assert uncoloured("name\n\x1b[31mError\x1b[0m: \x1b]0;x\x07") == "name\nError: \\x1b]0;x\\x07"


@pytest.mark.parametrize("kind", [Tail, LiveTail])
def test_a_hole_is_left_out(tmp_path: Path, kind: type[Tail]) -> None:
    path = tmp_path / "0.log"
    with path.open("wb") as log:
        log.write(b"one\n")
        log.seek(1 << 40)
        log.write(b"two\n")
    assert "".join(kind(path).read()).replace("\n", "").replace("\0", "") == "onetwo"
    tail = kind(path)
    os.truncate(path, 2 << 40)
    assert "one" in "".join(tail.read())
    with path.open("ab") as log:
        log.write(b"three\n")
    assert "three" in "".join(tail.read())


def test_a_log_is_not_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.log").write_text("secret\n")
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "logs" / "1").symlink_to(tmp_path / "elsewhere")
    assert list(Tail(tmp_path / "run" / "logs" / "2" / "0.log", tmp_path / "run").read()) == []
    with pytest.raises(NotPlain, match="is a link or a file"):
        list(Tail(tmp_path / "run" / "logs" / "1" / "0.log", tmp_path / "run").read())


def test_text_that_comes_in_pieces_is_as_safe(tmp_path: Path) -> None:
    generator = random.Random(0)
    pieces = [*KEPT, *(text for text, _ in DROPPED), "plain\n", "\x1b", "\x1b]unended\n", "\x1b[", "ESC\\"]
    for trial in range(300):
        text = "".join(generator.choices(pieces, k=8))
        path = tmp_path / f"{trial}.log"
        written, tail, shown = text.encode(), LiveTail(path), ""
        while written:
            size = generator.randint(1, 12)
            with path.open("ab") as file:
                file.write(written[:size])
            written = written[size:]
            shown += "".join(tail.read())
        shown += "".join(tail.read(end=True))
        left = re.sub(r"\x1b\[[0-9;:]*[mA-GK]", "", shown)
        assert not re.search(r"[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]", left), (text, shown)


def test_a_long_unended_sequence_is_shown_as_text(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    path.write_text("\x1b]0;" + "x" * 5000)
    shown = "".join(LiveTail(path).read())
    assert "\x1b" not in shown
    assert shown.endswith("x" * 5000)


class Ascii(io.TextIOWrapper):
    """A terminal of a session without UTF-8."""

    def isatty(self) -> bool:
        return True


def test_a_screen_without_the_characters_shows_their_codes() -> None:
    raw = io.BytesIO()
    screen = Screen(Ascii(raw, "ascii"))
    screen.line("launch: café")
    screen.text("partial 漢")
    screen.progress("not shown within a line")
    screen.line("next")
    screen.progress("step 1")
    screen.text("more\n")
    screen.flush()
    assert raw.getvalue() == (
        b"launch: caf\\xe9\npartial \\u6f22\nnext\nstep 1\r\x1b[Kmore\n"
    )  # fmt: skip
