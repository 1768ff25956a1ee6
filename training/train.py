"""The reference job: fine-tune a BERT classifier on sentence pairs. Start reading here, at `train`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from training.bert.config import TrainConfig
from training.bert.metric_lookup import check_metric, find_metric
from training.bert.model import check_model
from training.bert.sources import check_source, find_source
from training.data.sampler import Position, Step, steps, steps_per_epoch
from training.errors import ConfigError
from training.reporting.progress import Progress
from training.reporting.trackers import Trackers, check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    Goes on from the newest good checkpoint of the run by itself. When the run is asked to stop, saves and returns with
    `ctx.stopped` true. Raises ConfigError for unusable input and CheckpointError for an unusable checkpoint.
    """
    from training.bert.checkpointing import Store
    from training.bert.engine import Engine
    from training.bert.model import load_model
    from training.reporting.curve import draw_curve

    check(config)
    asked, config = config, config.resolved()
    assert config.epochs
    quiet(ctx)
    tokenizer, data, validation = load_data(ctx, config)
    ctx.runtime.seed(config.seed)
    model = load_model(config.model, config.num_labels)
    state = State.fresh(config, ctx.world.world_size, data)
    store = Store(ctx, config)
    parts = store.find()
    if parts is not None:
        state = State.resumed(parts["state.json"], state, asked.global_batch)
    per_epoch = steps_per_epoch(len(data), state.global_batch)
    total = min(per_epoch * config.epochs, config.max_steps or sys.maxsize)
    engine = Engine(ctx, config, model, tokenizer, total)
    engine.warm_up(data)
    ctx.runtime.seed(config.seed + ctx.world.rank)  # dropout differs from rank to rank
    if parts is not None:
        engine.restore(parts)
        ctx.event("resumed", step=state.step)
    metric = find_metric(config.metric, config.num_labels, config.dataset)
    progress = Progress(total, state, enabled=ctx.world.rank == 0)
    # accelerate takes every rank for the main one on a device that it does not know, so our own rank decides.
    names = config.log_with if ctx.world.rank == 0 else ()
    trackers = Trackers(engine.accelerator, names, ctx.run_dir, asdict(config))

    with closing(store), closing(trackers), closing(progress):
        while state.step < total and not ctx.stopped:
            with closing(engine.batches(data, epoch_steps(ctx, config, state, data))) as batches:
                for step, tensors in batches:
                    engine.step(step, tensors)
                    state.step += 1
                    state.at = step.after
                    ctx.heartbeat.beat(state.step)
                    if state.step % config.log_every == 0 or state.step == total:
                        values = progress.line(state, engine.mean_loss(), engine.scheduler.get_last_lr()[0], per_epoch)
                        record(ctx, trackers, state, values)
                    score = None
                    if state.at.position == 0 or state.step == total:
                        began = time.monotonic()
                        with ctx.phase("evaluating"):
                            evaluation = engine.evaluate(validation, config.eval_batch_size, metric)
                        seconds = round(time.monotonic() - began, 6)
                        score = state.note(evaluation)
                        record(
                            ctx,
                            trackers,
                            state,
                            {"epoch": state.step / per_epoch, "eval": evaluation, "seconds": seconds},
                        )
                        progress.evaluation(state)
                    stop = state.step < total and ctx.should_stop(state.step)
                    if stop or score is not None or state.step % config.save_every == 0:
                        with ctx.phase("saving"):
                            store.save(engine, state.step, asdict(state), score)
                    if stop or state.step == total:
                        break
        with ctx.phase("finishing"):
            if ctx.world.rank == 0:
                draw_curve(ctx.run_dir, f"{config.model} on {config.dataset}")
            store.finish()
    result = {**state.evaluations[-1]} if state.evaluations else {}
    result |= {"steps": state.step, "epochs": state.step / per_epoch, "best": state.best}
    if not ctx.stopped:
        with ctx.phase("finishing"):
            result["model"] = store.publish(engine, tokenizer)
    return result


train.check = check  # type: ignore[attr-defined]  # the launcher asks for it before it sends anything


@dataclass
class State:
    """Where a run is: what `state.json` of a checkpoint holds."""

    at: Position
    global_batch: int
    identity: dict[str, Any]  # what must be the same for the order of the data to have a meaning
    step: int = 0
    best: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def fresh(cls, config: TrainConfig, world_size: int, data: Encoded) -> State:
        identity = {"data": data.fingerprint, "samples": len(data), "length_buckets": config.length_buckets}
        return cls(Position(config.seed), config.global_batch or (config.batch_size or 1) * world_size, identity)

    @classmethod
    def resumed(cls, saved: dict[str, Any], fresh: State, global_batch: int) -> State:
        """The saved state; ConfigError where it belongs to other data, another order of them or `global_batch` (0: any)."""
        state = cls(**{**saved, "at": Position(**saved["at"])})
        if state.identity["length_buckets"] != fresh.identity["length_buckets"]:
            raise ConfigError(
                "--length-buckets cannot be changed within a run, because it changes the order of the data; "
                "give it as before, or start a new run with another name"
            )
        if state.identity != fresh.identity:
            raise ConfigError(
                f"the training data have changed since this run began ({state.identity['samples']} samples then, "
                f"{fresh.identity['samples']} now); put the old data back, or start a new run with another name"
            )
        if state.at.seed != fresh.at.seed:
            raise ConfigError(
                f"--seed is {fresh.at.seed}, but this run began with --seed {state.at.seed}; "
                "give that one, or start a new run with another name"
            )
        if global_batch not in (0, state.global_batch):
            raise ConfigError(
                f"--global-batch is {global_batch}, but this run began with {state.global_batch}, on which the position "
                "in its data and its learning rate rest; give that one, or start a new run with another name"
            )
        return state

    def note(self, evaluation: dict[str, float]) -> float:
        """Remember an evaluation; its score, the first value of the metric."""
        score = next(iter(evaluation.values()))
        self.evaluations.append(evaluation)
        if self.best is None or score >= self.best["score"]:
            self.best = {"step": self.step, "score": score, **evaluation}
        return score


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
        except ConfigError as error:  # told to all ranks, or they would wait for this one for ever
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


def record(ctx: Context, trackers: Trackers, state: State, values: dict[str, Any]) -> None:
    """Write `values` of the present step to the metrics file and to the trackers."""
    ctx.log(state.step, **values)
    trackers.log(state.step, values)


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
