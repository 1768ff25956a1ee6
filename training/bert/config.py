"""The options of the reference job."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from training.bert.metric_lookup import check_metric
from training.bert.model import TINY, check_model
from training.bert.sources import PAIRS, check_source, find_source
from training.errors import ConfigError
from training.reporting.trackers import check_trackers


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training. The defaults train a small BERT from scratch, offline, in about a minute."""

    model: str = TINY  # a Hub name, a folder saved by save_pretrained, or `tiny`: a small BERT from scratch
    dataset: str = PAIRS  # `glue/mrpc` (Hub), a folder with train.csv and validation.csv, module:function, or `pairs`
    train_file: str = ""  # CSV, JSON-lines or Parquet with sentence1, sentence2, label; instead of the dataset's
    validation_file: str = ""  # the same for evaluation
    num_labels: int = 2  # classes 0..N-1; 1 means regression
    metric: str = ""  # package.module:function, or what evaluate loads; by default GLUE's accuracy and F1
    max_length: int = 128  # tokens of a pair; longer ones are cut
    batch_size: int | None = None  # samples a rank takes at once; by default 8; for `tiny` 32, shared among all ranks
    global_batch: int = 0  # samples of an optimizer step over all ranks; 0 means batch size x ranks, or 32 for `tiny`
    eval_batch_size: int = 32  # samples a rank evaluates at once; has no influence on the result
    epochs: int | None = None  # passes over the training data; by default 3, and 4 for `tiny`
    max_steps: int = 0  # stop after so many optimizer steps; 0 means at the end of the epochs
    lr: float | None = None  # peak learning rate of AdamW; by default 5e-5, and 1e-3 for `tiny`
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"  # of the learning rate
    warmup_steps: int = 0  # steps during which the learning rate rises to its peak
    weight_decay: float = 0.01  # of AdamW
    max_grad_norm: float = 0.0  # clip gradients to this norm; 0 means never
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # arithmetic of forward and backward passes
    shard: bool = False  # shard parameters and optimizer over the ranks (FSDP2) instead of copying them to each (DDP)
    compile: bool = False  # compile the model; batches are then padded to multiples of 32 tokens
    length_buckets: bool = False  # put samples of similar length together, which saves padding and changes the order
    seed: int = 42  # decides the order of the data, fresh weights and dropout
    deterministic: bool = False  # the same bits each time on GPUs, too; slower. CPUs repeat them anyway
    log_every: int = 10  # steps between two lines of metrics
    save_every: int = 500  # steps between two checkpoints; one is also saved after every epoch
    log_with: tuple[str, ...] = ("tensorboard",)  # trackers of accelerate, with commas between; `--log-with=` for none
    mirror: str = ""  # copy checkpoints to this store too, and resume from it: s3://bucket/folder or any fsspec URI
    keep: int = 2  # newest checkpoints to keep; the best is kept besides
    cache: Path | None = None  # folder for tokenised data; by default ~/.cache/launch/tokens

    def resolved(self) -> TrainConfig:
        """Return a copy with the defaults that depend on `model`."""
        tiny = self.model == TINY
        return replace(
            self,
            batch_size=self.batch_size or (32 if tiny else 8),
            global_batch=self.global_batch or (32 if tiny and not self.batch_size else 0),
            epochs=self.epochs or (4 if tiny else 3),
            lr=self.lr or (1e-3 if tiny else 5e-5),
        )


def check(config: TrainConfig) -> None:
    """Raise ConfigError for a request that cannot work; cheap and without torch, to run before anything is sent."""
    for name in ("num_labels", "max_length", "eval_batch_size", "log_every", "save_every", "keep"):
        if getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)} must be 1 or more")
    for name in ("global_batch", "max_steps", "warmup_steps", "weight_decay", "max_grad_norm", "seed"):
        if getattr(config, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)} must be 0 or more")
    for name in ("batch_size", "epochs", "lr"):
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(config, name)} must be more than 0")
    check_trackers(config.log_with)
    check_metric(config.metric)
    if config.mirror:
        from training.checkpoints.mirror import open_store

        open_store(config.mirror)
    check_model(config.model)
    for split, file in (("train", config.train_file), ("validation", config.validation_file)):
        check_source(find_source(split, config.dataset, file), config.num_labels)
