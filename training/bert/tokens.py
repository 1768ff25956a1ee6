"""Tokenise sentence pairs once per node, with a cache on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.bert.model import load_tokenizer
from training.bert.sources import Source, check_label, find_source, fingerprint_of, read
from training.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from training.bert.config import TrainConfig
    from training.context import Context

CACHE = Path("~/.cache/launch/tokens")
IN_MEMORY_ROWS = 50_000
TOKENS_VERSION = 1  # increase it if the result of `_encode` changes
STATIC_LENGTHS = 32  # tokens to a multiple of which batches are padded, if each shape is compiled
PARALLEL_ROWS = 100_000  # with fewer rows, starting several processes takes longer than tokenising


class Encoded:
    """A tokenised split. Sample ids are row numbers.

    Attributes:
        fingerprint: hash of the content.
        lengths: number of tokens of each sample.
        labels: label of each sample.
    """

    def __init__(self, data: Dataset, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.lengths: list[int] = data["length"][:] if len(data) else []
        self.labels: list[float] = data["labels"][:] if len(data) else []
        self._data = data.remove_columns("length")
        # A small dataset is held as lists: for single rows they are 20 times as fast as Arrow.
        self._columns: dict[str, list[Any]] | None = self._data[:] if len(data) <= IN_MEMORY_ROWS else None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sample: int) -> dict[str, Any]:
        return self.rows((sample,))[0]

    def __getitems__(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        return self.rows(ids)

    def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The features (input_ids, ..., labels; lists of int) of the samples `ids`, in their order."""
        if self._columns is not None:
            return [{name: values[sample] for name, values in self._columns.items()} for sample in ids]
        columns = self._data[list(ids)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def load_data(ctx: Context, config: TrainConfig) -> tuple[PreTrainedTokenizerBase, Encoded, Encoded]:
    """The tokeniser and both splits. The first rank of each node fills the cache, then the others read it.

    Raises ConfigError, on all ranks, for unusable data and for data that are not the same everywhere.
    """

    def load() -> tuple[PreTrainedTokenizerBase, Encoded, Encoded]:
        tokenizer = load_tokenizer(config.model)
        longest = min(config.max_length, tokenizer.model_max_length)
        train_data, validation = (
            encode(
                find_source(split, config.dataset, file),
                tokenizer,
                max_length=longest,
                num_labels=config.num_labels,
                cache=config.cache,
            )
            for split, file in (("train", config.train_file), ("validation", config.validation_file))
        )
        return tokenizer, train_data, validation

    quiet()
    loaded, problem = None, None
    if ctx.world.local_rank == 0:
        try:
            loaded = load()
        except ConfigError as error:  # sent to all ranks, which would otherwise wait for this one
            problem = str(error)
    problems = [text for text in ctx.group.gather(problem) if text]
    if problems:
        raise ConfigError(problems[0])
    tokenizer, *splits = loaded or load()
    prints = ctx.group.gather([split.fingerprint for split in splits])
    different = next((rank for rank, found in enumerate(prints) if found != prints[0]), None)
    if different is not None:
        raise ConfigError(
            f"rank {different} has other data than rank 0; give every node the same files, and let a function of your "
            "own return the same rows in the same order every time"
        )
    return tokenizer, splits[0], splits[1]


def quiet() -> None:
    """Keep the libraries' bars and advice out of the log."""
    from datasets import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


class Collate:
    """Makes a batch of samples: int64 tensors of shape (samples, tokens of the longest), by name.

    With `static`, lengths are rounded up to few values, because each shape is compiled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, static: bool) -> None:
        from transformers import DataCollatorWithPadding

        self._pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=STATIC_LENGTHS if static else None)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return dict(self._pad(samples))


def encode(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, max_length: int, num_labels: int, cache: Path | None = None
) -> Encoded:
    """Return the tokens of `source` from the cache, or tokenise it and add an entry to the cache.

    The name of an entry is a hash of all that it depends on, and an entry is created by one rename. Runs that start at the
    same time therefore share an entry safely.

    Raises:
        ConfigError: the data cannot be used.
    """
    folder = (cache or CACHE).expanduser()
    # Data from the Hub or a function may change under the same name, so the rows are read and hashed.
    data = read(source) if source.path is None else None
    fingerprint = fingerprint_of(source.path if data is None else data)
    key = _digest(TOKENS_VERSION, fingerprint, _tokenizer_state(tokenizer), max_length, num_labels == 1)
    entry = folder / key
    loaded = _load(entry)
    if loaded is None:
        loaded = _encode(data or read(source), source, tokenizer, max_length, num_labels)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(dir=folder, prefix=".staging-"))
        except OSError as error:  # such as a home that cannot be written; the next run tokenises again
            print(f"launch: {folder} cannot be written, so the tokens are not kept: {error.strerror}", file=sys.stderr)
            return Encoded(loaded, fingerprint)
        try:
            loaded.save_to_disk(str(staging / "entry"))
            _publish(staging / "entry", entry)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        loaded = _load(entry)
        assert loaded is not None, f"{entry} has been written and cannot be loaded"
    return Encoded(loaded, fingerprint)


def _load(entry: Path) -> Dataset | None:
    from datasets import load_from_disk

    if not entry.is_dir():
        return None
    try:
        return load_from_disk(str(entry))
    except Exception:  # a damaged entry raises various errors; it is replaced
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _publish(staged: Path, entry: Path) -> None:
    try:
        os.rename(staged, entry)
    except OSError:
        if not entry.is_dir():  # otherwise another run has published the same entry
            raise


def _encode(
    data: Dataset, source: Source, tokenizer: PreTrainedTokenizerBase, max_length: int, num_labels: int
) -> Dataset:
    for row, label in enumerate(data["label"], start=1):
        check_label(label, num_labels, f"{source}, row {row}")
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


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else repr(tokenizer) + repr(sorted(tokenizer.get_vocab().items()))


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:32]
