from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

from tests.training.conftest import write_csv
from tests.training.ranks import train_in
from training.bert.sources import CORPUS
from training.corpus.generate import pairs, render
from training.distributed.world import World


def read(name: str) -> list[dict[str, str]]:
    with (CORPUS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_generating_it_again_gives_the_same_bytes() -> None:
    for name, text in render().items():
        assert (CORPUS / name).read_bytes() == text.encode()


def test_it_has_the_shape_of_mrpc() -> None:
    train, validation = read("train.csv"), read("validation.csv")
    assert list(train[0]) == ["sentence1", "sentence2", "label", "idx"]
    assert len(validation) == 408
    for rows in (train, validation):
        assert sum(row["label"] == "1" for row in rows) / len(rows) == pytest.approx(0.68, abs=0.02)
    assert sum((CORPUS / name).stat().st_size for name in ("train.csv", "validation.csv", "vocab.txt")) < 1_000_000
    seen = {(row["sentence1"], row["sentence2"]) for row in train}
    assert sum((row["sentence1"], row["sentence2"]) in seen for row in validation) < 5


def test_one_sentence_alone_says_nothing_about_the_label() -> None:
    """The best prediction from a single word of the second sentence is little better than the majority class."""
    rows = pairs(20_000, 1)
    share = sum(label for _, _, label, _ in rows) / len(rows)
    for word in {word for _, sentence, _, _ in rows for word in sentence.split()}:
        labels = [label for _, sentence, label, _ in rows if word in sentence.split()]
        assert sum(labels) / len(labels) == pytest.approx(share, abs=0.05), word


@pytest.mark.slow
def test_labels_from_a_hat_are_not_learnt(tmp_path: Path) -> None:
    """In half the epochs of a default run, which reaches 0.9 (`tests/launcher/config/test_profile_reference.py`)."""
    rows = read("train.csv")
    labels = [row["label"] for row in rows]
    random.Random(0).shuffle(labels)
    shuffled: list[list[object]] = [
        [row["sentence1"], row["sentence2"], label] for row, label in zip(rows, labels, strict=True)
    ]
    file = write_csv(tmp_path / "train.csv", ["sentence1", "sentence2", "label"], shuffled)
    result, _ = train_in(World(threads=1), tmp_path / "shuffled", train_file=str(file), epochs=2, log_with=())
    majority = sum(row["label"] == "1" for row in read("validation.csv")) / 408
    assert result["accuracy"] <= majority + 0.03
