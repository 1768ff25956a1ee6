"""Read and check sentence pairs from a file, the Hub, or a user's function.

A dataset needs a length and row numbers. Without them the number of steps is unknown, ranks cannot share a shuffle, and a
resumed run cannot skip the samples it has used. A stream therefore raises ConfigError; the message has the code that
writes it to a file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError
from training.flags.fields import check_function, find_function
from training.flags.typed import brief

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS = "pairs"
CORPUS = Path(__file__).parents[1] / "corpus"
COLUMNS = ("sentence1", "sentence2", "label")
SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
CHECKED_ROWS = 20_000  # rows of a file checked before the submission; training checks all rows


@dataclass(frozen=True)
class Source:
    """Source of a split: a file, a function, or the Hub dataset `name` with configuration `config`."""

    split: str
    path: Path | None = None
    name: str = ""  # a Hub name, or package.module:function
    config: str = ""

    def __str__(self) -> str:
        return str(self.path or f"{f'{self.name} {self.config}'.strip()} ({self.split})")


def find_source(split: str, dataset: str, file: str) -> Source:
    """Find the source of `split` ("train", "validation"): `file` if given, else that of `dataset`.

    Args:
        dataset: `pairs`, a folder, a Hub name, or `package.module:function`. The function takes the name of the split and
            returns a `datasets.Dataset` or a sequence of {"sentence1", "sentence2", "label"}.

    Raises:
        ConfigError: there is no such file or folder, or its format is unknown.
    """
    flag = f"--{split}-file {file}" if file else f"--dataset {dataset}"
    if file:
        path = Path(file).expanduser()
    elif dataset == PAIRS:
        path = CORPUS / f"{split}.csv"
    elif ":" in dataset:
        check_function("--dataset", dataset)
        return Source(split, None, dataset)
    else:
        folder = Path(dataset).expanduser()
        if not folder.is_dir():
            parts = dataset.split("/")
            if dataset.startswith((".", "/", "~")) or len(parts) > 3 or not all(parts):
                raise ConfigError(
                    f"{flag}: no such folder; give a folder with train.csv and validation.csv, or `{PAIRS}`"
                )
            if parts[0] == "glue":  # the former name of the dataset
                return Source(split, None, "nyu-mll/glue", "/".join(parts[1:]))
            return Source(split, None, "/".join(parts[:2]), "/".join(parts[2:]))
        found = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
        if not found:
            raise ConfigError(f"{flag}: the folder holds no {split} file; it needs {split}.csv, .jsonl or .parquet")
        path = found[0]
    if not path.is_file():
        raise ConfigError(f"{flag}: there is no file {path}")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{flag}: {path.name} is none of {', '.join(SUFFIXES)}")
    return Source(split, path.resolve())


def check_source(source: Source, num_labels: int) -> None:
    """Check the first CHECKED_ROWS rows of a file, without torch; other sources are checked by `read`.

    Raises:
        ConfigError: a column is missing, the file is empty, or a label is outside the model's range.
    """
    if source.path is None:
        return
    columns, rows = _peek(source.path)
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise ConfigError(
            f"{source.path}: column {' and '.join(missing)} missing; it has {', '.join(columns) or 'none'}; "
            f"needed are {', '.join(COLUMNS)}"
        )
    count = 0
    for count, row in enumerate(itertools.islice(rows, CHECKED_ROWS), start=1):
        check_label(row["label"], num_labels, f"{source.path}, row {count}")
        if not isinstance(row["sentence1"], str) or not isinstance(row["sentence2"], str):
            raise ConfigError(f"{source.path}, row {count}: a sentence is missing")
    if not count:
        raise ConfigError(f"{source.path}: the file has no rows")


def check_label(label: Any, num_labels: int, where: str) -> None:
    """Check a label for a model of `num_labels` outputs (1: regression).

    Raises:
        ConfigError: it is not a number, or not a class of the model.
    """
    try:
        number = float(label)
        plain = not isinstance(label, str) or (label.isascii() and "_" not in label)  # float() takes more than that
    except (OverflowError, TypeError, ValueError):
        number, plain = math.nan, False
    if not plain or not math.isfinite(number):
        kind = "finite " * plain
        raise ConfigError(f"{where}: label {brief(label, 40)} is no {kind}number; write classes as 0, 1, ...")
    if num_labels > 1 and (number != int(number) or not 0 <= number < num_labels):
        raise ConfigError(
            f"{where}: label {label!s:.40} is outside the model's range 0..{num_labels - 1}; "
            "change the labels, or give --num-labels (1 for regression)"
        )


def _peek(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The columns of a file and an iterator over its rows.

    Raises:
        ConfigError: the file has not the format of its suffix.
    """
    try:
        if path.suffix == ".csv":
            # Of the characters that str.splitlines() takes for the end of a line, only the line break ends a row.
            reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True)
            names = list(reader.fieldnames or ())
            if twice := [column for column in COLUMNS if names.count(column) > 1]:
                raise ConfigError(f"{path}: there are {names.count(twice[0])} columns {twice[0]!r}; one is needed")
            return names, _guarded(path, _regular(path, reader))
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet  # type: ignore[import-untyped]

            file = parquet.ParquetFile(path)
            names = list(file.schema_arrow.names)
            wanted = [column for column in COLUMNS if column in names]
            return names, (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        first = json.loads(lines[0]) if lines else {}
        if not isinstance(first, dict):
            raise ConfigError(f"{path}: the first line is no JSON object; write one object on each line")
        return list(first), _guarded(path, map(json.loads, lines))
    except ConfigError:
        raise
    except (ValueError, OSError, RecursionError, csv.Error) as error:  # errors of pyarrow are ValueErrors
        raise ConfigError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None


def _regular(path: Path, reader: csv.DictReader[str]) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file.

    Raises:
        ConfigError: a row has more or fewer columns than the header.
    """
    for row in reader:
        if None in row or None in row.values():
            extra: Sequence[str] = row.get(None) or ()
            found = sum(value is not None for key, value in row.items() if key is not None) + len(extra)
            raise ConfigError(
                f"{path}, line {reader.line_num}: {found} columns, and the header has {len(reader.fieldnames or ())};"
                " put a text that holds a comma in quotes"
            )
        yield row


def _guarded(path: Path, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        for row in rows:
            if not isinstance(row, dict):
                raise ConfigError(f"{path}: a line is no JSON object: {str(row)[:40]!r}; write one object on each line")
            yield {column: row.get(column) for column in COLUMNS}
    except ConfigError:
        raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None


def read(source: Source) -> Dataset:
    """Read all rows of `source`.

    Raises:
        ConfigError: it cannot be loaded, lacks a column, has no rows, or is a stream.
    """
    data = _read_function(source) if ":" in source.name else _read_hub(source) if source.name else _read_file(source)
    missing = [column for column in COLUMNS if column not in data.column_names]
    if missing:
        raise ConfigError(
            f"{source}: column {' and '.join(missing)} missing; it has {', '.join(data.column_names) or 'none'}; "
            f"needed are {', '.join(COLUMNS)}"
        )
    if not len(data):
        raise ConfigError(f"{source}: there are no rows")
    return data


def _read_file(source: Source) -> Dataset:
    from datasets import Dataset

    assert source.path is not None
    columns, rows = _peek(source.path)
    present = [column for column in COLUMNS if column in columns]
    table: dict[str, list[Any]] = {column: [] for column in present}
    for row in rows:
        for column in present:
            table[column].append(row[column])
    return Dataset.from_dict(table)


def _read_hub(source: Source) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(source.name, source.config or None, split=source.split)
    except Exception as error:  # many types: no network, no such name, no such split
        raise ConfigError(
            f"the data set {source} cannot be loaded from the Hub: {error}; without a network give a folder with "
            f"train.csv and validation.csv, or `--dataset {PAIRS}`"
        ) from error


def _read_function(source: Source) -> Dataset:
    from datasets import Dataset

    made = find_function("--dataset", source.name)(source.split)
    if isinstance(made, Dataset):
        return made
    kind = f"--dataset {source.name} returned a {type(made).__name__} for the split {source.split!r}"
    if not hasattr(made, "__len__") and (hasattr(made, "__iter__") or hasattr(made, "__next__")):
        raise ConfigError(
            f"{kind}, a stream: without a length and row numbers there is no exact epoch, no shuffle that all ranks "
            "share, and no resume that meets each sample once. Make a file of it once, "
            "`datasets.Dataset.from_generator(lambda: (yield from stream)).to_parquet('train.parquet')`, "
            "and give --train-file and --validation-file"
        )
    if isinstance(made, Mapping) or not hasattr(made, "__getitem__"):
        raise ConfigError(
            f"{kind}; let it return a datasets.Dataset, or a sequence of {{{', '.join(map(repr, COLUMNS))}}}"
        )
    rows = [made[number] for number in range(len(made))]
    return Dataset.from_list([{column: row[column] for column in COLUMNS if column in row} for row in rows])


def fingerprint_of(content: Path | Dataset) -> str:
    """SHA-256 of the bytes of a file, or of the rows of a dataset."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for batch in content.select_columns(list(COLUMNS)).iter(batch_size=10_000):
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()
