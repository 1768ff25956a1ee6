"""Print the figures of both packages, or a report of replaced words."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

from tests.structure.measure import LIMITS, Figures, Size, measure
from tests.structure.words import PACKAGES, report

HERE = Path(__file__).parents[2]

Table = dict[str, Figures]


def tables(repo: Path) -> Table:
    """The figures of the packages in a checkout."""
    return {name: measure(repo / name) for name in PACKAGES if (repo / name).is_dir()}


def tables_of_commit(repo: Path, revision: str) -> Table:
    """The figures of a commit, from a temporary copy of its files."""
    archive = subprocess.run(["git", "-C", str(repo), "archive", revision], check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        return tables(Path(folder))


def cells(figures: Figures | None) -> list[str]:
    """One column of the table."""
    if figures is None:
        return ["-"] * len(ROWS)
    return [
        str(len(figures.top)),
        str(figures.depth),
        str(figures.pairs),
        circles(figures.circles),
        circles(figures.typing_circles),
        circles(figures.folder_circles),
        first(figures.folders),
        first(figures.classes),
        first(figures.functions),
    ]


def circles(found: tuple[tuple[str, ...], ...]) -> str:
    """The number of circles and their members."""
    return str(len(found)) + ("" if not found else ": " + "; ".join(" <-> ".join(circle) for circle in found))


def first(found: tuple[Size, ...]) -> str:
    """The largest size, with its name and location."""
    return " ".join([str(found[0].count), found[0].name, found[0].where]).rstrip() if found else "0"


ROWS = (
    ("modules and folders at the top", "top"),
    ("import depth", "depth"),
    ("imports between them", ""),
    ("circles of modules", "circles"),
    ("with imports for type checkers", "typing circles"),
    ("circles of folders", "folder circles"),
    ("most files in a folder", "files"),
    ("longest class", "class"),
    ("longest function", "function"),
)


def text(columns: dict[str, Table]) -> str:
    """An aligned table per package: figure, limit, one column per checkout."""
    lines = []
    for package in dict.fromkeys(name for table in columns.values() for name in table):
        rows = [[package, "limit", *columns]]
        values = [cells(table.get(package)) for table in columns.values()]
        for number, (label, limit) in enumerate(ROWS):
            rows.append([label, str(LIMITS[limit]) if limit else "", *(column[number] for column in values)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] + [""]
        for name, table in columns.items():
            if package in table:
                folders = ", ".join(f"{size.name} {size.count}" for size in table[package].folders[:8])
                lines += [f"{name}: files: {folders}", f"{name}: longest chain: {' > '.join(table[package].chain)}"]
        lines.append("")
    return "\n".join(lines).rstrip()


def as_json(columns: dict[str, Table], most: int = 10) -> str:
    """The figures as JSON, with the `most` largest folders, classes and functions."""
    plain = {
        column: {package: dataclasses.asdict(figures) for package, figures in table.items()}
        for column, table in columns.items()
    }
    for table in plain.values():
        for figures in table.values():
            figures |= {key: figures[key][:most] for key in ("folders", "classes", "functions")}
    return json.dumps(plain, indent=2)


def main() -> None:
    """Parse the options and print the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.structure", description=__doc__)
    parser.add_argument("--repo", type=Path, default=HERE, help="another checkout (default: this one)")
    parser.add_argument("--against", metavar="REV", help="print the figures of this commit beside")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--words", action="store_true", help="count the replaced words in each file")
    options = parser.parse_args()
    if options.words:
        print(report(options.repo))
        return
    columns = {options.against: tables_of_commit(options.repo, options.against)} if options.against else {}
    columns["now"] = tables(options.repo)
    print(as_json(columns) if options.json else text(columns))


if __name__ == "__main__":
    main()
