from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.errors import ConfigError, did_you_mean, nearest
from training.model import check_model, load_model, load_tokenizer


def test_a_saved_model_is_loaded_in_float32_with_the_asked_labels(tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    load_model("tiny", 2).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    check_model(str(folder))
    model = load_model(str(folder), 2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (
        load_tokenizer(str(folder))("anna sold the boat .")["input_ids"]
        == load_tokenizer("tiny")("anna sold the boat .")["input_ids"]
    )
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(str(folder), 5)


def test_the_tiny_tokeniser_knows_any_word() -> None:
    tokenizer = load_tokenizer("tiny")
    assert "[UNK]" not in tokenizer.convert_ids_to_tokens(tokenizer("a zebra 42 sold !")["input_ids"])


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        check_model(str(tmp_path))
    with pytest.raises(ConfigError, match="no such folder"):
        check_model(str(tmp_path / "none"))
    check_model("bert-base-uncased")


def test_without_a_network_a_hub_name_is_a_clear_error() -> None:
    for load in (load_tokenizer, lambda name: load_model(name, 2)):
        with pytest.raises(ConfigError, match=r"--model no/such-model cannot be loaded.*needs the network"):
            load("no/such-model")


def test_near_names() -> None:
    assert did_you_mean("--epoch", ["--epochs", "--lr"]) == "; did you mean --epochs?"
    assert did_you_mean("zzz", ["--epochs"]) == ""


def test_the_nearest_names_come_first_and_a_long_word_takes_no_time() -> None:
    assert nearest("epoch", ["lr", "epochs", "epoch2"], most=3)[:1] == ["epochs"]
    assert nearest("x" * 1_000_000, ["epochs"]) == []
    assert did_you_mean("lrr", ["lr"], " ({!r})") == " ('lr')"
    assert did_you_mean("%s{}", ["%s{x}"]) == "; did you mean %s{x}?"
