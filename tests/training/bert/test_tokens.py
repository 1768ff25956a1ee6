from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from tests.training.conftest import write_csv
from training.bert import tokens as module
from training.bert.model import load_tokenizer
from training.bert.sources import CORPUS, Source, check_source, find_source
from training.bert.tokens import Encoded, encode
from training.errors import ConfigError

HEADER = ["sentence1", "sentence2", "label"]


def encoded(source: Source, cache: Path, num_labels: int = 2, max_length: int = 128) -> Encoded:
    return encode(source, load_tokenizer("tiny"), max_length=max_length, num_labels=num_labels, cache=cache)


@pytest.mark.slow
def test_every_format_gives_the_same(tmp_path: Path) -> None:
    rows: list[list[object]] = [["a boat", 'the "boat" , sold', 1], ["käse\nhouse", "house", 0], ["anna", "boris", 1]]
    write_csv(tmp_path / "a.csv", HEADER, rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(dict(zip(HEADER, row, strict=True))) + "\n" for row in rows))
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    columns = {name: [row[number] for row in rows] for number, name in enumerate(HEADER)}
    parquet.write_table(pa.table({**columns, "idx": [0, 1, 2]}), tmp_path / "a.parquet")
    found = []
    for suffix in ("csv", "jsonl", "parquet"):
        source = find_source("train", "pairs", str(tmp_path / f"a.{suffix}"))
        check_source(source, 2)
        data = encoded(source, tmp_path / "cache")
        found.append((data.rows([2, 0, 1]), data.labels, data.lengths))
    assert found[0] == found[1] == found[2]
    assert found[0][1] == [1, 0, 1]
    assert found[0][2] == [len(row["input_ids"]) for row in encoded(source, tmp_path / "cache").rows([0, 1, 2])]


@pytest.mark.slow
def test_a_large_data_set_is_read_from_arrow(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source("train", str(small), "")
    rows = encoded(source, tmp_path).rows([3, 1])
    monkeypatch.setattr(module, "IN_MEMORY_ROWS", 1)
    assert encoded(source, tmp_path).rows([3, 1]) == rows


def test_several_processes_tokenise_alike(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source("train", str(small), "")
    rows = encoded(source, tmp_path / "one").rows(range(50))
    monkeypatch.setattr(module, "PARALLEL_ROWS", 1)
    assert encoded(source, tmp_path / "many").rows(range(50)) == rows


def test_tokens_are_made_once_and_for_all_that_they_depend_on(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_source("train", str(small), "")
    first = encoded(source, tmp_path / "cache")
    made = module._encode
    monkeypatch.setattr(module, "_encode", None)
    assert encoded(source, tmp_path / "cache").rows([0]) == first.rows([0])
    monkeypatch.setattr(module, "_encode", made)
    assert max(encoded(source, tmp_path / "cache", max_length=9).lengths) == 9
    assert isinstance(encoded(source, tmp_path / "cache", num_labels=1).labels[0], float)
    (small / "train.csv").write_text("sentence1,sentence2,label\na,b,1\n")
    assert len(encoded(source, tmp_path / "cache")) == 1
    assert encoded(source, tmp_path / "cache").fingerprint != first.fingerprint
    assert len(os.listdir(tmp_path / "cache")) == 4
    for entry in (tmp_path / "cache").iterdir():
        shutil.rmtree(entry)
        entry.mkdir()  # damaged
    assert len(encoded(source, tmp_path / "cache")) == 1


def test_runs_that_start_together_do_not_disturb_each_other(tmp_path: Path, small: Path) -> None:
    source = find_source("train", str(small), "")
    encoded(source, tmp_path / "warm")
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(len(encoded(source, tmp_path / "cache")))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [50] * 4
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_names_of_data_sets() -> None:
    assert find_source("train", "glue/mrpc", "") == Source("train", None, "nyu-mll/glue", "mrpc")
    assert find_source("train", "some/set/part", "") == Source("train", None, "some/set", "part")
    assert find_source("validation", "pairs", "").path == (CORPUS / "validation.csv").resolve()


@pytest.mark.parametrize(
    ("dataset", "file", "message"),
    [
        ("/nowhere", "", "no such folder"),
        ("my data:set", "", "written package.module:function"),
        ("a//b", "", "no such folder"),
        ("pairs", "/nowhere.csv", "there is no file"),
        ("pairs", __file__, r"none of \.csv"),
        (os.path.dirname(__file__), "", "holds no train file"),
    ],
)
def test_sources_that_cannot_be(dataset: str, file: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_source("train", dataset, file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "column sentence1 and sentence2 and label missing; it has none"),
        ("a.csv", "sentence1,label\na,1\n", "column sentence2 missing; it has sentence1, label"),
        ("a.csv", "sentence1,sentence2,label\n", "has no rows"),
        ("a.csv", "sentence1,sentence2,label\na,b,2\n", r"row 1: label 2 is outside the model's range 0\.\.1"),
        ("a.csv", "sentence1,sentence2,label\na,b,0.5\n", "label 0.5 is outside"),
        ("a.csv", "sentence1,sentence2,label\na,b,yes\n", "label 'yes' is no number"),
        ("a.csv", "sentence1,sentence2,label\na\n", "line 2: 1 columns, and the header has 3"),
        ("a.csv", 'sentence1,sentence2,label\n"a"b,c,1\n', "cannot be read as csv"),
        ("a.jsonl", "[1]\n", "no JSON object"),
        ("a.jsonl", "{", "cannot be read as jsonl"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": null, "label": 1}\n', "row 1: a sentence is missing"),
        ("a.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 1}\n{\n', "cannot be read as jsonl"),
        ("a.parquet", "no parquet", "cannot be read as parquet"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        check_source(find_source("train", "pairs", str(tmp_path / name)), 2)


ROWS = [{"sentence1": f"a boat {row}", "sentence2": "a boat", "label": row % 2} for row in range(5)]


def made(split: str) -> Dataset:
    return Dataset.from_list([{**row, "idx": number} for number, row in enumerate(ROWS)])


def plain(split: str) -> list[dict[str, object]]:
    return ROWS


def incomplete(split: str) -> list[dict[str, object]]:
    return [{"sentence1": "a"}]


def empty(split: str) -> Dataset:
    return made(split).select([])


def both(split: str) -> DatasetDict:
    return DatasetDict({split: made(split)})


def stream(split: str) -> IterableDataset:
    return made(split).to_iterable_dataset()


def generator(split: str) -> Iterator[dict[str, object]]:
    return iter(ROWS)


def test_a_data_set_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("made", "plain"):
        source = find_source("train", f"{__name__}:{name}", "")
        check_source(source, 2)
        data = encoded(source, tmp_path)
        assert data.labels == [0, 1, 0, 1, 0]
    assert len(os.listdir(tmp_path)) == 1, "the same rows are the same data"
    monkeypatch.setitem(ROWS[0], "label", 1)
    assert encoded(source, tmp_path).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stream", r"IterableDataset for the split 'train', a stream: .*exact epoch.*to_parquet.*--train-file"),
        ("generator", "a list_iterator for the split 'train', a stream"),
        ("both", "returned a DatasetDict .* let it return a datasets.Dataset, or a sequence"),
        ("incomplete", "column sentence2 and label missing; it has sentence1"),
        ("empty", "there are no rows"),
        ("absent", "cannot be loaded: .*absent"),
    ],
)
def test_data_sets_of_the_users_own_that_do_not_fit(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoded(find_source("train", f"{__name__}:{name}", ""), tmp_path)


def test_the_advice_for_a_stream_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code in the error message writes the file for --train-file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        encoded(find_source("train", f"{__name__}:stream", ""), tmp_path)
    eval(str(refused.value).split("`")[1], {"datasets": datasets, "stream": stream("train")})
    assert encoded(find_source("train", "", "train.parquet"), tmp_path / "cache").labels == [0, 1, 0, 1, 0]


def test_data_that_only_loading_finds_wrong(tmp_path: Path) -> None:
    for text, message in (
        ("sentence1,label\na,1\n", "column sentence2 missing"),
        ("sentence1,sentence2,label\n", "there are no rows"),
    ):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ConfigError, match=message):
            encoded(find_source("train", "pairs", str(tmp_path / "a.csv")), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_a_network_the_hub_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nyu-mll/glue mrpc \(train\) cannot be loaded from the Hub.*--dataset pairs"
    ):
        encoded(find_source("train", "glue/mrpc", ""), tmp_path)
