"""Building and loading sentence-pair classifiers: a Hub name, a local folder, or `tiny`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = "tiny"
VOCABULARY = Path(__file__).parent / "corpus" / "vocab.txt"
# Two layers compare two sentences; weights start wide because at BERT's usual 0.02 so few units take many more steps to
# find that words of the first sentence should look at the same words of the second.
TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.06,
}


def check_model(name: str) -> None:
    """Raise ConfigError where `name` is a path, or looks like one, without a model in it. Touches no network."""
    folder = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or folder.is_dir()
    if name == TINY or not looks_local:
        return
    if not folder.is_dir():
        raise ConfigError(f"--model {name}: no such folder; give a folder with a config.json, a Hub name, or `{TINY}`")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model {name}: the folder has no config.json, so it holds no model saved by save_pretrained"
        )
    try:
        json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ConfigError(f"--model {name}: its config.json cannot be read ({error})") from None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokeniser of the model `name`. Raises ConfigError where it cannot be loaded."""
    if name == TINY:
        from transformers import BertTokenizer

        vocabulary = {
            piece: number for number, piece in enumerate(VOCABULARY.read_text(encoding="utf-8").split("\n")[:-1])
        }
        return BertTokenizer(vocab=vocabulary, model_max_length=TINY_SHAPE["max_position_embeddings"])
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(_source(name))
    except (OSError, ValueError) as error:
        raise ConfigError(_cannot_load(name, error)) from error


def load_model(name: str, num_labels: int) -> PreTrainedModel:
    """The classifier `name`: parameters float32, on the CPU, a fresh head of `num_labels` outputs where it has none.

    Raises ConfigError where it cannot be loaded.
    """
    if name == TINY:
        from transformers import BertConfig, BertForSequenceClassification

        size = len(VOCABULARY.read_text(encoding="utf-8").split("\n")) - 1
        return BertForSequenceClassification(BertConfig(vocab_size=size, num_labels=num_labels, **TINY_SHAPE))
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        # Parameters are kept in float32 whatever the file has; lower precision is the business of autocast.
        return AutoModelForSequenceClassification.from_pretrained(
            _source(name), num_labels=num_labels, dtype=torch.float32, ignore_mismatched_sizes=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(_cannot_load(name, error)) from error


def _source(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _cannot_load(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"--model {name} cannot be loaded: {first} (give a local folder, `{TINY}`, or a Hub name; "
        "a Hub name needs the network or an earlier download on this machine)"
    )
