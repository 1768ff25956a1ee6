"""The reference job: fine-tune a BERT classifier on sentence pairs. Start reading here, at `train`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from training.bert.config import TrainConfig
from training.bert.metric_lookup import check_metric, find_metric
from training.bert.model import check_model
from training.bert.sources import check_source, find_source
from training.bert.state import State
from training.data.sampler import Step, steps, steps_per_epoch
from training.errors import ConfigError
from training.reporting.progress import Progress
from training.reporting.trackers import Trackers, check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from training.bert.checkpointing import Store
    from training.bert.engine import Engine
    from training.bert.tokens import Encoded
    from training.context import Context


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


def train(ctx: Context, config: TrainConfig) -> dict[str, Any]:
    """Train and evaluate; the result is {"accuracy", "f1", "samples", "steps", "epochs", "best", "model"}.

    Resumes from the newest good checkpoint of the run. When the run is asked to stop, saves a checkpoint and returns
    with `ctx.stopped` true.

    Raises:
        ConfigError: the input cannot be used.
        CheckpointError: no checkpoint of the run can be used.
    """
    from training.bert.checkpointing import Store
    from training.bert.engine import Engine
    from training.bert.model import load_model
    from training.bert.state import restore
    from training.reporting.curve import draw_curve

    check(config)
    requested_batch, config = config.global_batch, config.resolved()
    quiet(ctx)
    tokenizer, data, validation = load_data(ctx, config)
    ctx.runtime.seed(config.seed)
    model = load_model(config.model, config.num_labels)
    state = State.fresh(config, ctx.world.world_size, data)
    store = Store(ctx, config)
    parts = store.find()
    if parts is not None:
        state = State.resumed(parts["state.json"], state, requested_batch)
    per_epoch = steps_per_epoch(len(data), state.global_batch)
    assert config.epochs, "resolved() has set it"
    total = min(per_epoch * config.epochs, config.max_steps or sys.maxsize)
    engine = Engine(ctx, config, model, tokenizer, total)
    engine.warm_up(data)
    ctx.runtime.seed(config.seed + ctx.world.rank)  # dropout differs from rank to rank
    if parts is not None:
        restore(engine, parts)
        ctx.note_resumed(state.step)
    loop = Loop(ctx, config, engine, store, state, total, per_epoch)
    with closing(store), closing(loop):
        loop.run(data, validation)
        with ctx.phase("finishing"):
            if ctx.world.rank == 0:
                draw_curve(ctx.run_dir, f"{config.model} on {config.dataset}")
            store.finish()
    result: dict[str, Any] = {**state.evaluations[-1]} if state.evaluations else {}
    result |= {"steps": state.step, "epochs": state.step / per_epoch, "best": state.best}
    if not ctx.stopped:
        with ctx.phase("finishing"):
            result["model"] = store.publish(engine, tokenizer)
    return result


train.check = check  # type: ignore[attr-defined]  # the launcher asks for it before it sends anything


class Loop:
    """The training loop of one rank: steps, metrics, evaluations, checkpoints and the agreed stop."""

    def __init__(
        self, ctx: Context, config: TrainConfig, engine: Engine, store: Store, state: State, total: int, per_epoch: int
    ) -> None:
        self._ctx, self._config, self._engine, self._store, self._state = ctx, config, engine, store, state
        self._total, self._per_epoch = total, per_epoch
        self._metric = find_metric(config.metric, config.num_labels, config.dataset)
        first = ctx.world.rank == 0  # accelerate takes each rank for the main one on a device that it does not know
        self._progress = Progress(total, state.step, state.global_batch, enabled=first)
        self._trackers = Trackers(engine.accelerator, config.log_with if first else (), ctx.run_dir, asdict(config))

    def run(self, data: Encoded, validation: Encoded) -> None:
        """Train from the position of the state until the last step, or until the run is asked to stop."""
        while self._state.step < self._total and not self._ctx.stopped:
            steps = epoch_steps(self._ctx, self._config, self._state, data)
            with closing(self._engine.batches(data, steps)) as batches:
                for step, tensors in batches:
                    self._train_step(step, tensors)
                    stop = self._after_step(validation)
                    if stop or self._state.step == self._total:
                        break

    def close(self) -> None:
        """Close the progress bar, then the trackers."""
        with closing(self._trackers), closing(self._progress):
            pass

    def _train_step(self, step: Step, tensors: list[Any]) -> None:
        ctx, state, engine = self._ctx, self._state, self._engine
        engine.step(step, tensors)
        state.step += 1
        state.at = step.after
        ctx.heartbeat.beat(state.step)
        if state.step % self._config.log_every == 0 or state.step == self._total:
            lr = engine.scheduler.get_last_lr()[0]
            self._record(self._progress.line(state.step, engine.mean_loss(), lr, self._per_epoch))

    def _after_step(self, validation: Encoded) -> bool:
        """Evaluate and save if it is due; whether all ranks stop now. A collective."""
        ctx, state = self._ctx, self._state
        score = None
        if state.at.position == 0 or state.step == self._total:
            score = self._evaluate(validation)
        stop = state.step < self._total and ctx.should_stop(state.step)
        if stop or score is not None or state.step % self._config.save_every == 0:
            with ctx.phase("saving"):
                self._store.save(self._engine, state.step, asdict(state), score)
        return stop

    def _evaluate(self, validation: Encoded) -> float:
        began = time.monotonic()
        with self._ctx.phase("evaluating"):
            evaluation = self._engine.evaluate(validation, self._config.eval_batch_size, self._metric)
        seconds = round(time.monotonic() - began, 6)
        score = self._state.note(evaluation)
        self._record({"epoch": self._state.step / self._per_epoch, "eval": evaluation, "seconds": seconds})
        self._progress.evaluation(self._state.step, evaluation)
        return score

    def _record(self, values: dict[str, Any]) -> None:
        self._ctx.log(self._state.step, **values)
        self._trackers.log(self._state.step, values)


def load_data(ctx: Context, config: TrainConfig) -> tuple[PreTrainedTokenizerBase, Encoded, Encoded]:
    """The tokeniser and both splits. The first rank of each node fills the cache, then the others read it.

    Raises ConfigError, on all ranks, for unusable data and for data that are not the same everywhere.
    """
    from training.bert.model import load_tokenizer
    from training.bert.tokens import encode

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


def epoch_steps(ctx: Context, config: TrainConfig, state: State, data: Encoded) -> Iterator[Step]:
    """The steps from where `state` is to the end of that epoch, for this rank."""
    return steps(
        len(data),
        state.at,
        rank=ctx.world.rank,
        world_size=ctx.world.world_size,
        batch_size=config.batch_size or 1,
        global_batch=state.global_batch,
        lengths=data.lengths if config.length_buckets else None,
    )


def quiet(ctx: Context) -> None:
    """Set the number of CPU threads, and keep the libraries' bars and advice out of the log."""
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    if ctx.world.threads:
        torch.set_num_threads(ctx.world.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
