"""Data files as other programs write them: what is read as it is, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.bert.sources import Source, check_label, check_source, read
from training.errors import ConfigError

HEADER = "sentence1,sentence2,label\n"
SEPARATORS = ["\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\u2028", "\u2029"]
"""What str.splitlines() takes for the end of a line, besides line breaks."""


def source(folder: Path, name: str, content: str | bytes) -> Source:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Source("train", path)


@pytest.mark.parametrize("character", SEPARATORS)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_only_a_line_break_ends_a_row(tmp_path: Path, name: str, character: str) -> None:
    row = {
        "a.csv": f"{HEADER}a{character}b,c,1\n",
        "a.jsonl": f'{{"sentence1": "a{character}b", "sentence2": "c", "label": 1}}\n',
    }
    made = row[name]
    if name == "a.jsonl" and ord(character) < 32:
        made = made.replace(character, f"\\u{ord(character):04x}")  # JSON has no control characters in strings
    found = source(tmp_path, name, made)
    check_source(found, 2)
    assert [dict(r) for r in read(found)] == [
        {"sentence1": f"a{character}b", "sentence2": "c", "label": "1" if name == "a.csv" else 1}
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str) -> None:
    text = f"{HEADER}a,b,1\n" if name == "a.csv" else '{"sentence1": "a", "sentence2": "b", "label": 1}\n'
    found = source(tmp_path, name, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    check_source(found, 2)
    assert read(found)["sentence1"] == ["a"]


ROW = '{"sentence1": "a", "sentence2": "b", "label": 1}\n'
WRONG: list[tuple[str, str | bytes, str]] = [
    ("a.csv", f"{HEADER}a,b,1\nno, quotes,b,1\n", "line 3: 4 columns, and the header has 3"),
    ("a.csv", f"{HEADER}a,b\n", "line 2: 2 columns, and the header has 3"),
    ("a.csv", f"{HEADER}a,b,1,,\n", "line 2: 5 columns"),
    ("a.csv", "sentence1,sentence2,label,label\na,b,1,0\n", "there are 2 columns 'label'"),
    ("a.csv", f'{HEADER}"a,b,1\n', "cannot be read as csv"),
    ("a.csv", f"{HEADER}a,b,1\0\n", "is no (finite )?number"),
    ("a.csv", HEADER.encode() + b"\xff\xfe,b,1\n", "cannot be read as csv"),
    ("a.csv", "", "sentence1 and sentence2 and label missing; it has none"),
    ("a.csv", HEADER, "has no rows"),
    ("a.csv", HEADER.upper(), "missing; it has SENTENCE1"),
    *(
        ("a.csv", f"{HEADER}a,b,{label}\n", "row 1: label .* is no (finite )?number")
        for label in ("nan", "NaN", "inf", "-inf", "1e999", "", "x", "٣", "1_0", "0x1", "None", "9" * 5000)
    ),
    *(
        ("a.csv", f"{HEADER}a,b,{label}\n", "outside the model's range")
        for label in ("2", "-1", "0.5", "1e300", "9" * 20)
    ),
    *(
        (
            "a.jsonl",
            f'{ROW}{{"sentence1": "a", "sentence2": "b", "label": {label}}}\n',
            "row 2: label .* is no (finite )?number",
        )
        for label in ("NaN", "Infinity", "-Infinity", "1e999", "null", '"x"', "[1]", "{}", "1" * 400)
    ),
    *(("a.jsonl", f"{ROW}{line}\n", "is no JSON object") for line in ("[]", "1", '"a"', "null", "true")),
    ("a.jsonl", "[1]\n", "first line is no JSON object"),
    ("a.jsonl", f"{ROW}{{\n", "cannot be read as jsonl"),
    ("a.jsonl", f"{ROW}{'[' * 100_000}\n", "cannot be read as jsonl"),
    ("a.jsonl", "[" * 100_000, "cannot be read as jsonl"),
    ("a.jsonl", '{"sentence1": 3, "sentence2": "b", "label": 1}\n', "a sentence is missing"),
    ("a.jsonl", '{"sentence1": "a", "sentence2": "b"}\n', "column label missing"),
    ("a.jsonl", ROW.encode("utf-16"), "cannot be read as jsonl"),
    ("a.parquet", b"PAR1", "cannot be read as parquet"),
    ("a.parquet", b"", "cannot be read as parquet"),
]


@pytest.mark.parametrize(
    ("name", "content", "words"), WRONG, ids=lambda value: f"{value!s:.40}".replace("\0", "").strip()
)
def test_what_is_refused(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        check_source(source(tmp_path, name, content), 2)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("label", ["nan", "inf", float("nan"), float("inf"), 10**400, "1_0", "٣", None, b"1x"])
def test_a_label_of_a_regression_is_a_finite_number(label: object) -> None:
    with pytest.raises(ConfigError, match=r"is no (finite )?number"):
        check_label(label, 1, "x")


@pytest.mark.parametrize("label", [0, "1", 1.0, " 1 ", "1e0", True])
def test_labels(label: object) -> None:
    check_label(label, 2, "x")
