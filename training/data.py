"""Sentence pairs: where they come from, whether they fit, and their tokens, made once per node and kept in a cache."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PAIRS = "pairs"
CORPUS = Path(__file__).parent / "corpus"
CACHE = Path("~/.cache/launch/tokens")
COLUMNS = ("sentence1", "sentence2", "label")
SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
CHECKED_ROWS = 20_000  # rows of a file looked at before a run is sent; training itself checks all
IN_MEMORY_ROWS = 50_000
TOKENS_VERSION = 1  # raise it when `_encode` changes what it makes
PARALLEL_ROWS = 100_000  # from here on several processes tokenise; below, starting them takes longer


@dataclass(frozen=True)
class Source:
    """Where a split comes from: a file, or (path None) the Hub data set `name`, configuration `config`."""

    split: str
    path: Path | None = None
    name: str = ""
    config: str = ""


def find_source(split: str, dataset: str, file: str) -> Source:
    """The source of `split` ("train", "validation"): `file` where it is given, else that of `dataset`.

    Raises ConfigError where there is no such file, folder, or readable format.
    """
    flag = f"--{split}-file {file}" if file else f"--dataset {dataset}"
    if file:
        path = Path(file).expanduser()
    elif dataset == PAIRS:
        path = CORPUS / f"{split}.csv"
    else:
        folder = Path(dataset).expanduser()
        if not folder.is_dir():
            parts = dataset.split("/")
            if dataset.startswith((".", "/", "~")) or len(parts) > 3 or not all(parts):
                raise ConfigError(
                    f"{flag}: no such folder; give a folder with train.csv and validation.csv, or `{PAIRS}`"
                )
            if parts[0] == "glue":  # the name of old: the scripts behind it are gone, the data are under this one
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
    """Raise ConfigError where a file lacks columns, is empty, or has labels outside the model's range; without torch.

    Looks at the first CHECKED_ROWS rows; a Hub data set is looked at only when it is loaded.
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
    """Raise ConfigError for a label that a model of `num_labels` outputs (1: regression) cannot learn."""
    try:
        number = float(label)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: label {label!r} is no number; write classes as 0, 1, ...") from None
    if num_labels > 1 and (number != int(number) or not 0 <= number < num_labels):
        raise ConfigError(
            f"{where}: label {label} is outside the model's range 0..{num_labels - 1}; "
            "change the labels, or give --num-labels (1 for regression)"
        )


def _peek(path: Path) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """The columns of a file and its rows, one by one. Raises ConfigError for a file that is not what its name says."""
    try:
        if path.suffix == ".csv":
            reader = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines(keepends=True), strict=True)
            return list(reader.fieldnames or ()), _guarded(path, reader)
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet  # type: ignore[import-untyped]

            file = parquet.ParquetFile(path)
            names = list(file.schema_arrow.names)
            wanted = [column for column in COLUMNS if column in names]
            return names, (row for batch in file.iter_batches(columns=wanted) for row in batch.to_pylist())
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        first = json.loads(lines[0]) if lines else {}
        if not isinstance(first, dict):
            raise ConfigError(f"{path}: the first line is no JSON object; write one object on each line")
        return list(first), _guarded(path, map(json.loads, lines))
    except ConfigError:
        raise
    except (ValueError, OSError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        raise ConfigError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None


def _guarded(path: Path, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    try:
        for row in rows:
            yield {column: row.get(column) for column in COLUMNS}
    except (ValueError, csv.Error, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from None


class Encoded:
    """A tokenised split. Sample ids are row numbers. `lengths` counts tokens; `fingerprint` names the content."""

    def __init__(self, data: Dataset, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.lengths: list[int] = data["length"][:] if len(data) else []
        self.labels: list[float] = data["labels"][:] if len(data) else []
        self._data = data.remove_columns("length")
        # A small data set is held as lists, which is twenty times as fast as Arrow for the few rows of a batch.
        self._columns: dict[str, list[Any]] | None = self._data[:] if len(data) <= IN_MEMORY_ROWS else None

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The features (input_ids, ..., labels; lists of int) of the samples `ids`, in that order."""
        if self._columns is not None:
            return [{name: values[sample] for name, values in self._columns.items()} for sample in ids]
        columns = self._data[list(ids)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def encode(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, max_length: int, num_labels: int, cache: Path | None = None
) -> Encoded:
    """The tokens of `source`, from the cache or made now and put there.

    A cache entry is named by all that it depends on and appears by one rename, so runs that start together cannot
    disturb each other: the one that comes second uses the entry of the first. Raises ConfigError for unusable data.
    """
    folder = (cache or CACHE).expanduser()
    fingerprint = _fingerprint(source)
    key = _digest(TOKENS_VERSION, fingerprint, _tokenizer_state(tokenizer), max_length, num_labels == 1)
    entry = folder / key
    loaded = _load(entry)
    if loaded is None:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=".staging-"))
        try:
            data = _encode(_read(source), source, tokenizer, max_length, num_labels)
            data.save_to_disk(str(staging / "entry"))
            _publish(staging / "entry", entry)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        loaded = _load(entry)
        assert loaded is not None, f"{entry} was written a moment ago"
    return Encoded(loaded, fingerprint)


def _load(entry: Path) -> Dataset | None:
    from datasets import load_from_disk

    if not entry.is_dir():
        return None
    try:
        return load_from_disk(str(entry))
    except Exception:  # whatever a damaged entry raises, it is made again
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _publish(staged: Path, entry: Path) -> None:
    try:
        os.rename(staged, entry)
    except OSError:
        if not entry.is_dir():  # otherwise another run was faster, with the same content
            raise


def _read(source: Source) -> Dataset:
    from datasets import Dataset, load_dataset

    if source.path is None:
        try:
            return load_dataset(source.name, source.config or None, split=source.split)
        except Exception as error:  # the Hub library raises many kinds: no network, no such name, no such split
            raise ConfigError(
                f"the data set {source.name} {source.config} ({source.split}) cannot be loaded from the Hub: {error}; "
                f"without a network give a folder with train.csv and validation.csv, or `--dataset {PAIRS}`"
            ) from error
    columns, rows = _peek(source.path)
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise ConfigError(f"{source.path}: column {' and '.join(missing)} missing; needed are {', '.join(COLUMNS)}")
    table: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    for row in rows:
        for column in COLUMNS:
            table[column].append(row[column])
    return Dataset.from_dict(table)


def _encode(
    data: Dataset, source: Source, tokenizer: PreTrainedTokenizerBase, max_length: int, num_labels: int
) -> Dataset:
    where = str(source.path or f"{source.name} {source.config} ({source.split})")
    missing = [column for column in COLUMNS if column not in data.column_names]
    if missing:
        raise ConfigError(f"{where}: column {' and '.join(missing)} missing; it has {', '.join(data.column_names)}")
    if not len(data):
        raise ConfigError(f"{where}: the file has no rows")
    for row, label in enumerate(data["label"], start=1):
        check_label(label, num_labels, f"{where}, row {row}")
    kind = float if num_labels == 1 else int

    def tokens(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made = dict(tokenizer(batch["sentence1"], batch["sentence2"], truncation=True, max_length=max_length))
        made["length"] = [len(ids) for ids in made["input_ids"]]
        made["labels"] = [kind(float(label)) for label in batch["label"]]
        return made

    processes = (os.cpu_count() or 1) if len(data) >= PARALLEL_ROWS else None
    return data.map(
        tokens, batched=True, remove_columns=data.column_names, num_proc=processes, load_from_cache_file=False,
        keep_in_memory=source.path is not None and processes is None,
    )  # fmt: skip


def _fingerprint(source: Source) -> str:
    if source.path is None:
        return _digest(source.name, source.config, source.split)
    with source.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else repr(tokenizer) + repr(sorted(tokenizer.get_vocab().items()))


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:32]
