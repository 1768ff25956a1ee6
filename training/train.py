"""The reference job: fine-tune a BERT classifier on sentence pairs. Start reading here, at `train`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from training.bert.config import TrainConfig, check
from training.bert.metric_lookup import find_metric
from training.bert.model import learning_rate, load_model, publish, settings_of
from training.bert.record import Record
from training.bert.tokens import Collate, load_data
from training.reporting.curve import draw_curve
from training.reporting.report import Report

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from training.bert.tokens import Encoded
    from training.context import Context
    from training.loop.steps import Steps

__all__ = ["TrainConfig", "check", "train"]


def train(ctx: Context, config: TrainConfig) -> dict[str, Any]:
    """Train and evaluate; the result is {"accuracy", "f1", "samples", "steps", "epochs", "best", "model"}.

    Resumes from the newest good checkpoint of the run. When the run is asked to stop, saves a checkpoint and returns
    with `ctx.stopped` true.

    Raises ConfigError if the input cannot be used, and CheckpointError if no checkpoint of the run can be used.
    """
    import torch

    if ctx.world.attempt == 1:  # a later one has the same options, and what is loaded below is checked there
        check(config)
    asked, config = config, config.resolved()
    tokenizer, data, validation = load_data(ctx, config)
    ctx.seed(config.seed, deterministic=config.deterministic)
    bert = load_model(config.model, config.num_labels).train()
    static = {"dynamic": False} if config.compile else False
    model = ctx.setup(bert, precision=config.precision, compile=static, shard=config.shard)
    fused = ctx.runtime.fused or None
    optimizer = torch.optim.AdamW(model.parameters(), config.lr or 0.0, weight_decay=config.weight_decay, fused=fused)
    collate = Collate(tokenizer, static=config.compile or not ctx.runtime.dynamic_shapes)
    steps = order_of(ctx, config, data, collate)
    schedule = learning_rate(config.schedule, config.warmup_steps, optimizer, steps)
    record = Record(asked, data, steps)
    state = ctx.state(
        record=record, steps=steps, model=model, optimizer=optimizer, schedule=schedule,
        keep=config.keep, mirror=config.mirror, overlap=True, files={"config.json": settings_of(bert)},
    )  # fmt: skip
    ctx.seed(config.seed)  # so that dropout does not depend on how the weights were made
    state.restore()
    evaluate = evaluation_of(ctx, config, model, validation, collate)
    with closing(Report(ctx, steps, config.log_with, asdict(config))) as report:
        for step in steps:
            for batch in step:
                step.backward(model(**batch).loss)
            if config.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            if not step.skipped:
                schedule.step()
            optimizer.zero_grad()
            if step.number % config.log_every == 0 or step.is_last:
                report.step(step, lr=float(schedule.get_last_lr()[0]))
            if step.ends_epoch or step.is_last:
                state.save(step, score=record.add(step, report.evaluation(step, evaluate)))
            if ctx.should_stop(step, save=state, every=config.save_every):
                break
    state.wait()
    return record.result() | finish(ctx, config, bert, tokenizer)


train.check = check  # type: ignore[attr-defined]  # the launcher asks for it before it sends anything


def finish(
    ctx: Context, config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, str]:
    """Draw the learning curve and, unless the run was stopped, publish the model. A collective."""
    with ctx.phase("finishing"):
        if ctx.world.rank == 0:
            draw_curve(ctx.run_dir, f"{config.model} on {config.dataset}")
        return {} if ctx.stopped else {"model": publish(ctx, model, tokenizer)}


def order_of(ctx: Context, config: TrainConfig, data: Encoded, collate: Collate) -> Steps:
    """The optimizer steps over the training data."""
    return ctx.steps(
        data,
        collate,
        global_batch=config.global_batch or (config.batch_size or 1) * ctx.world.world_size,
        microbatch=config.batch_size,
        epochs=config.epochs or 1,
        max_steps=config.max_steps or None,
        seed=config.seed,
        lengths=data.lengths if config.length_buckets else None,
        prefetch=ctx.runtime.async_dispatch,
        adopt=True,  # `Record` refuses another global batch than the one that was asked for
    )


def evaluation_of(
    ctx: Context, config: TrainConfig, model: torch.nn.Module, data: Encoded, collate: Collate
) -> Callable[[], dict[str, float]]:
    """The evaluation of `model`: its metric over all validation data. A collective."""
    import numpy as np
    import torch

    metric = find_metric(config.metric, config.num_labels, config.dataset)
    labels = np.array(data.labels, dtype=np.float64)

    def predict(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)

    def measure(predictions: np.ndarray[Any, Any]) -> dict[str, float]:
        return metric(predictions.astype(np.float64), labels)

    def evaluate() -> dict[str, float]:
        # Compiled for evaluation, the model would be compiled again for each shape.
        with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
            return ctx.evaluate(
                predict, data, measure, collate=collate, batch_size=config.eval_batch_size, lengths=data.lengths
            )

    return evaluate
