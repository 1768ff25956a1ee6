"""Read files as they grow, in bounded memory, and make text of a run safe for a terminal."""

from __future__ import annotations

import codecs
import errno
import os
import re
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from training.files import open_plain

CHUNK = 1 << 16
LONGEST_LINE = 1 << 20
"""Bytes of an incomplete line; the beginning of a longer one is dropped."""

_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""Characters that change the order in which the others are shown."""

_OTHER = (
    r"|\x1b\[[0-?]*[ -/]*[@-~]"  # other control sequences, such as modes and reports
    r"|\x1b[\]PX^_][^\x07\x1b\n\x9c]*(?:\x07|\x1b\\|\x9c)"  # strings to the terminal: title, clipboard, links
    r"|\x1b[ -/]*[0-~]?"
)
_COLOUR = r"\x1b\[[0-9;:]{0,64}m"
_SEQUENCE = re.compile(
    r"(?P<kept>\x1b\[[0-9;:]{0,64}[mA-GK])"  # colours, cursor movements of progress bars, erase in line
    rf"{_OTHER}|[\x00-\x07\x0b\x0c\x0e-\x1f\x7f-\x9f{_BIDI}]"
)
_IN_LINE = re.compile(rf"(?P<kept>{_COLOUR}){_OTHER}|[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029{_BIDI}]")
_RESET = re.compile(r"\x1b\[0{0,8}m")
_BEGUN = re.compile(r"\x1b(?:\[[0-?]{0,64}[ -/]{0,8}|[\]PX^_][^\x07\x1b\n\x9c]{0,512}\x1b?|[ -/]{0,8})?\Z")


def safe(text: str) -> str:
    r"""Return output of a rank, as it comes, without what acts on a terminal beyond the lines that are written.

    Colours (``ESC [ ... m``), cursor movements (A to G), erasure in the line (K), tabs, backspaces and carriage returns are kept.
    Other escape sequences and control characters are dropped, such as titles, clipboard access, links, reports and modes,
    and characters that change the order of others.
    """
    return _SEQUENCE.sub(lambda match: match["kept"] or "", text)


def safe_line(text: str) -> str:
    """Return a whole line of output without control characters except tabs, and escape sequences except colours.

    A colour that is not reset in the line ends with it.
    """
    if text.isprintable():
        return text
    text = _IN_LINE.sub(lambda match: match["kept"] or "", text)
    begun = text.rfind("\x1b")
    return text if begun < 0 or _RESET.match(text, begun) else f"{text}\x1b[0m"


def printable(text: object, most: int = 100_000) -> str:
    r"""Return a text about a run, such as a name, a host or a message, with characters that cannot be printed as ``\x1b``.

    Line breaks and tabs are kept. A text of more than `most` characters is cut in its middle.
    """
    text = str(text)
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-most // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escaped(c) for c in text)


def uncoloured(text: str) -> str:
    """Return a text that quotes lines of output as `printable` does, without their colours."""
    return printable(re.sub(_COLOUR, "", text))


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode() if character > "\x7f" else f"\\x{ord(character):02x}"


class Tail:
    """The lines that a growing file gained since the last look; the file may not exist yet.

    With `top`, a folder above the file, no folder between the two may be a link.
    """

    def __init__(self, path: Path, top: Path | None = None) -> None:
        self.path, self.top = path, top
        self.offset = 0
        self.rest = b""

    def _chunks(self) -> Iterator[bytes]:
        try:
            with FileIO(open_plain(self.path, top=self.top)) as file:
                file.seek(self.offset)
                while data := file.read(CHUNK):
                    self.offset += len(data)
                    yield data
                    if data[-1] == 0:
                        self._skip_hole(file)
        except FileNotFoundError:
            return

    def _skip_hole(self, file: FileIO) -> None:
        """Leave out a part that was never written, of which a file can have gigabytes."""
        try:
            found = os.lseek(file.fileno(), self.offset, os.SEEK_DATA)
        except OSError as error:  # no data follows, or the file system knows no holes
            found = os.fstat(file.fileno()).st_size if error.errno == errno.ENXIO else self.offset
        self.offset = file.seek(max(self.offset, found))

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

    def __init__(self, path: Path, top: Path | None = None) -> None:
        super().__init__(path, top)
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
