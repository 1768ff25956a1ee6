"""Read files as they grow, in bounded memory, and make text of a run safe for a terminal."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path

from training.files import open_plain

CHUNK = 1 << 16
LONGEST_LINE = 1 << 20
"""Bytes of an incomplete line; the beginning of a longer one is dropped."""

_SEQUENCE = re.compile(
    r"(?P<kept>\x1b\[[0-9;:]{0,64}[mA-GK])"  # colours, cursor movements of progress bars, erase in line
    r"|\x1b\[[0-?]*[ -/]*[@-~]"  # other control sequences, such as modes and reports
    r"|\x1b[\]PX^_][^\x07\x1b\n\x9c]*(?:\x07|\x1b\\|\x9c)"  # strings to the terminal: title, clipboard, links
    r"|\x1b[ -/]*[0-~]?"
    r"|[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)
_BEGUN = re.compile(r"\x1b(?:\[[0-?]{0,64}[ -/]{0,8}|[\]PX^_][^\x07\x1b\n\x9c]{0,512}\x1b?|[ -/]{0,8})?\Z")


def safe(text: str) -> str:
    r"""Return `text` without what acts on a terminal beyond the line that is written.

    Colours (``ESC [ ... m``), cursor movements (A to G), erasure in the line (K), tabs, backspaces and carriage returns are kept.
    Other escape sequences and control characters are dropped, such as titles, clipboard access, links, reports and modes.
    """
    return _SEQUENCE.sub(lambda match: match["kept"] or "", text)


class Tail:
    """The lines that a growing file gained since the last look; the file may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.rest = b""

    def _chunks(self) -> Iterator[bytes]:
        try:
            with os.fdopen(open_plain(self.path), "rb") as file:
                file.seek(self.offset)
                while data := file.read(CHUNK):
                    self.offset += len(data)
                    yield data
        except FileNotFoundError:
            return

    def read(self, end: bool = False) -> Iterator[str]:
        """Yield the new lines; of one that a progress bar wrote over, what was left to see.

        With `end`, the file does not grow any more, and an incomplete last line is one, too.
        """
        for data in self._chunks():
            *lines, rest = (self.rest + data).split(b"\n")
            text = rest.rstrip(b"\r")
            self.rest = (text[text.rfind(b"\r") + 1 :] + rest[len(text) :][:1])[-LONGEST_LINE:]
            yield from map(_visible, lines)
        if end and self.rest:
            line, self.rest = self.rest, b""
            yield _visible(line)


def _visible(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


class LiveTail(Tail):
    """As `Tail`, for a screen: text as it comes, with incomplete lines, safe for a terminal."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begun = ""

    def read(self, end: bool = False) -> Iterator[str]:
        """Yield the new text; a begun escape sequence is held back unless this is the `end`."""
        for data in self._chunks():
            text = self._begun + self._decoder.decode(data)
            begun = None if end else _BEGUN.search(text)
            cut = begun.start() if begun else len(text)
            self._begun = text[cut:]
            yield safe(text[:cut])
        if end:
            text, self._begun = self._begun + self._decoder.decode(b"", True), ""
            yield safe(text)
