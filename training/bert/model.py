"""Load sentence-pair classifiers from the Hub or a local folder, or create the `tiny` one."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError
from training.files import sync_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from training.context import Context
    from training.loop.steps import Steps

TINY = "tiny"
VOCABULARY = Path(__file__).parents[1] / "corpus" / "vocab.txt"
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
    """Check that a local model `name` has a readable config.json; sends no request for a Hub name.

    Raises:
        ConfigError: the folder or its config.json is missing or damaged.
    """
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
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--model {name}: its config.json cannot be read ({error})") from None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokeniser of the model `name`.

    Raises:
        ConfigError: it cannot be loaded.
    """
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
    """Load the classifier `name` on the CPU in float32.

    A model without a head gets a new one with `num_labels` outputs.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if name == TINY:
        from transformers import BertConfig, BertForSequenceClassification

        size = len(VOCABULARY.read_text(encoding="utf-8").split("\n")) - 1
        model = BertForSequenceClassification(BertConfig(vocab_size=size, num_labels=num_labels, **TINY_SHAPE))
        _look_for_equal_words(model)
        return model
    import torch
    from transformers import AutoModelForSequenceClassification

    try:
        # Parameters are float32, whatever the file has; autocast lowers the precision.
        return AutoModelForSequenceClassification.from_pretrained(
            _source(name), num_labels=num_labels, dtype=torch.float32, ignore_mismatched_sizes=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(_cannot_load(name, error)) from error


def settings_of(model: PreTrainedModel) -> dict[str, Any]:
    """The content of config.json, with which `from_pretrained` loads the weights."""
    settings: dict[str, Any] = model.config.to_dict()
    return settings | {"architectures": [type(model).__name__]}


def learning_rate(
    name: str, warmup_steps: int, optimizer: torch.optim.Optimizer, steps: Steps
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule `name` of transformers over all steps, whose number a checkpoint may change."""
    import torch
    from transformers import get_scheduler

    @cache
    def factors(total: int) -> Callable[[int], float]:
        factor: Callable[[int], float] = get_scheduler(
            name, torch.optim.SGD([torch.zeros(1)], 1.0), warmup_steps, total
        ).lr_lambdas[0]
        return factor

    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors(steps.total)(step))


def publish(ctx: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Save the final model for `from_pretrained`, atomically, to `run_dir/model`; returns the folder name.

    Raises OSError if it cannot be written. A collective.
    """
    from safetensors import SafetensorError

    from training.checkpoints.sharding import whole

    weights = whole(model.state_dict(), keep=ctx.world.rank == 0)
    if ctx.world.rank == 0:
        staging, target = ctx.run_dir / ".model.staging", ctx.run_dir / "model"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            model.save_pretrained(staging, state_dict=weights)
        except SafetensorError as error:  # hides the errno, such as that of a full disk
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(staging)) from error
        tokenizer.save_pretrained(staging)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(staging, target)
        sync_folder(ctx.run_dir)
    ctx.group.barrier()
    return "model"


def _look_for_equal_words(model: PreTrainedModel) -> None:
    """Initialise the attention of the tiny model so that a word attends to equal words.

    Queries equal keys, and word embeddings outweigh position embeddings. With BERT's own initialisation, hundreds of steps
    pass until attention finds equal words; with some seeds, more than fit into a minute.
    """
    import torch

    bert = model.bert
    with torch.no_grad():
        bert.embeddings.word_embeddings.weight.normal_(0, 0.2)
        bert.embeddings.position_embeddings.weight.normal_(0, 0.04)
        bert.embeddings.token_type_embeddings.weight.normal_(0, 0.1)
        for layer in bert.encoder.layer:
            attention = layer.attention.self
            attention.query.weight.normal_(0, 0.15)
            attention.key.weight.copy_(attention.query.weight)


def _source(name: str) -> str:
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _cannot_load(name: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"--model {name} cannot be loaded: {first} (give a local folder, `{TINY}`, or a Hub name; "
        "a Hub name needs the network or an earlier download on this machine)"
    )
