"""Parse the Markdown of README and docs/: fenced blocks, links, anchors and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(
        path for path in (ROOT / "docs").rglob("*.md") if not path.relative_to(ROOT / "docs").parts[0].startswith("_")
    ),
]

LANGUAGES = ("console", "sh", "python", "toml", "text")
NEEDS = ("slurm", "ray", "gpu", "tpu", "network", "minutes")
"""Allowed values of ``<!-- needs: ... -->``; a block with this comment is checked but not run."""


@dataclass(frozen=True)
class Command:
    """A command of a block, with its output on the page (console blocks only)."""

    argv: tuple[str, ...]
    output: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: line number of its opening fence, from 1.
        notes: the ``<!-- name: value -->`` comments directly before it.
    """

    page: Path
    line: int
    language: str
    text: str
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file name that a first line such as ``# train.py`` gives; None without such a line."""
        match = re.match(r"# ([\w./-]+\.(?:py|toml))\n", self.text)
        return match[1] if match else None

    def commands(self) -> list[Command]:
        """The commands of a ``console`` block (lines after ``$``) or an ``sh`` block (every line)."""
        joined = self.text.replace("\\\n", " ")
        if self.language == "sh":
            return [Command(argv) for line in joined.splitlines() if (argv := _words(line))]
        found: list[tuple[tuple[str, ...], list[str]]] = []
        for line in joined.splitlines():
            if line.startswith("$ "):
                found.append((_words(line[2:]), []))
            else:
                found[-1][1].append(line)
        return [Command(argv, tuple(output)) for argv, output in found]


def _words(line: str) -> tuple[str, ...]:
    return tuple(shlex.split(line, comments=True))


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of `page` in order, without directives of the site generator (```` ```{name} ````)."""
    notes: dict[str, str] = {}
    opened: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if opened is not None:
            if line.strip() == "```":
                start, language, lines = opened
                if not language.startswith("{"):
                    yield Block(page, start, language, "\n".join(lines) + "\n", notes)
                opened, notes = None, {}
            else:
                opened[2].append(line)
        elif line.startswith("```"):
            opened = number, line[3:].strip(), []
        elif match := re.fullmatch(r"<!-- (\w+): (.+) -->", line):
            notes = notes | {match[1]: match[2]}
        elif line.strip():
            notes = {}


def prose(page: Path) -> str:
    """The text of `page` without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    """The targets of the links of `page`."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of `page`, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline_commands(page: Path) -> list[str]:
    """The code spans of `page` with ``launch`` and an option or a command."""
    return re.findall(r"(?<!`)`(launch [^`]+)`(?!`)", prose(page).replace("\n", " "))
