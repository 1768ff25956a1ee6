"""Where a followed run is shown: lines about it, the output of a rank, and one line of progress below."""

from __future__ import annotations

import os
import shutil
from typing import TextIO


class Screen:
    """Writes to a stream, and keeps the line of progress at the bottom of it.

    Attributes:
        live: the stream shows incomplete lines and can write over them: a terminal or a notebook.
        raw: the terminal does not begin a new line at the left by itself.
        written: how often something was written.
    """

    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.terminal = out.isatty()
        self.live = self.terminal or type(out).__module__.partition(".")[0] == "ipykernel"
        self.raw = False
        self.written = 0
        self._at_left = True
        self._progress = ""

    def line(self, text: str) -> None:
        """Write a line of its own."""
        self.erase()
        self._write(f"{text}\n" if self._at_left else f"\n{text}\n")
        self._at_left = True

    def text(self, text: str) -> None:
        """Write output of a rank."""
        if text:
            self.erase()
            self._write(text)
            self._at_left = text.endswith("\n")

    def data(self, data: bytes) -> None:
        """Write output of a rank to the terminal as it is."""
        self.erase()
        self.written += 1
        self.out.flush()
        while data:
            self._at_left = data.endswith(b"\n")
            data = data[os.write(self.out.fileno(), data) :]

    def progress(self, text: str) -> None:
        """Show `text` below the output, unless that ended within a line."""
        if not self.live or not self._at_left or text == self._progress:
            return
        self.erase()
        shown = text[: shutil.get_terminal_size().columns - 1]
        self._write(shown)
        self._progress = shown

    def erase(self) -> None:
        """Remove the line of progress."""
        if self._progress:
            self._write("\r\x1b[K" if self.terminal else f"\r{' ' * len(self._progress)}\r")
            self._progress = ""

    def flush(self) -> None:
        self.out.flush()

    def _write(self, text: str) -> None:
        self.written += 1
        encoding = getattr(self.out, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        self.out.write(text.replace("\n", "\r\n") if self.raw else text)
