"""The training engine of one rank: optimizer steps and evaluations, on top of accelerate."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from training.checkpoints.sharding import shard
from training.data.metrics import Metric, combine, evaluation_batches
from training.data.prefetch import prefetch
from training.data.sampler import Step
from training.distributed.group import environment
from training.distributed.replicas import check_replicas, replicate

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from training.bert.config import TrainConfig
    from training.bert.tokens import Encoded
    from training.context import Context

    Batch = dict[str, torch.Tensor]

COMPILED_LENGTHS = 32  # with --compile, batches are padded to multiples of this number of tokens


def make_accelerator(ctx: Context, precision: str) -> Accelerator:
    """Create an Accelerator that uses the device and the process group of `ctx`."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # for a second run in one process, as in a notebook
    GradientState._reset_state()
    _ = ctx.group  # created first, so that accelerate uses this process group
    facts: dict[str, str | None] = dict(ctx.world.environment())
    if ctx.world.world_size == 1:
        facts = dict.fromkeys(facts)
    facts["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # if unset, accelerate changes the number of threads
    facts["ACCELERATE_TORCH_DEVICE"] = str(ctx.device)
    facts["ACCELERATE_USE_CPU"] = str(ctx.world.device == "cpu").lower()
    with environment(facts):
        return Accelerator(cpu=ctx.world.device == "cpu", mixed_precision={"fp32": "no"}.get(precision, precision))


class Engine:
    """A model with its optimizer, scheduler and collator on one rank.

    Attributes:
        model: the model without DDP or compilation.
        loss_sum: float32 scalar on the device, the sum of this rank's weighted losses since the last `mean_loss`.
        loss_steps: number of optimizer steps in `loss_sum`.
    """

    def __init__(
        self, ctx: Context, config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int
    ) -> None:
        import torch
        from transformers import DataCollatorWithPadding, get_scheduler

        self.ctx = ctx
        self.runtime = ctx.runtime
        self.runtime.check(config.precision, shard=config.shard and ctx.world.world_size > 1)
        self.world_size = ctx.world.world_size
        self.max_grad_norm = config.max_grad_norm
        self.model = model
        self.accelerator = make_accelerator(ctx, config.precision)
        model.to(ctx.device)
        self.sharded = config.shard and self.world_size > 1
        if self.sharded:
            shard(model, ctx.world)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr or 0.0, weight_decay=config.weight_decay, fused=self.runtime.fused or None
        )
        # A runtime with static shapes compiles by itself.
        forward = torch.compile(model, dynamic=False) if config.compile and self.runtime.dynamic_shapes else model
        # `evaluation_mode` prevents DDP: accelerate wraps on known devices only, and selects them by the local rank.
        self.wrapped = self.accelerator.prepare_model(forward, device_placement=False, evaluation_mode=True)
        self.replicated = self.world_size > 1 and not self.sharded
        self.unchecked = self.replicated  # until the weights of all ranks are compared after the first update
        if self.replicated and self.runtime.ddp:
            self.wrapped = replicate(self.wrapped, ctx.device)
        self.prepared = self.accelerator.prepare_optimizer(self.optimizer, device_placement=False)
        self.scheduler = get_scheduler(config.schedule, self.optimizer, config.warmup_steps, steps)
        # Each shape is compiled, so lengths are rounded up to few values.
        self.collate = DataCollatorWithPadding(
            tokenizer,
            pad_to_multiple_of=COMPILED_LENGTHS if config.compile or not self.runtime.dynamic_shapes else None,
        )
        self.loss_sum = torch.zeros((), device=ctx.device)
        self.loss_steps = 0
        self.wrapped.train()

    def warm_up(self, data: Encoded) -> None:
        """Fix the gradient buckets of DDP by a backward pass without an update. A collective.

        DDP rebuilds its buckets after the first backward pass. With more than two ranks the buckets determine the order of
        additions, so that the rounding of a resumed run would differ from that of an uninterrupted run.
        """
        if self.world_size > 2 and self.replicated:
            self.accelerator.backward(self.wrapped(**self._send(self.batch(data, (0,)))).loss * 0)
            self.prepared.zero_grad()

    def batch(self, data: Encoded, samples: Sequence[int]) -> Batch:
        """Collate `samples` to padded int64 tensors of shape (samples, longest); in pinned memory for a GPU."""
        batch = self.collate(data.rows(samples))
        return {
            name: tensor.pin_memory() if self.runtime.pin_memory_by_default else tensor
            for name, tensor in batch.items()
        }

    def batches(self, data: Encoded, steps: Iterable[Step]) -> Generator[tuple[Step, list[Batch]]]:
        """The steps with the batches of this rank; for an accelerator, batches are prefetched in a thread.

        On a CPU, the thread would compete with training for the cores.
        """
        made = (
            (step, [self.batch(data, part or (step.padding_sample,)) for part in step.microbatches]) for step in steps
        )
        return prefetch(made) if self.runtime.async_dispatch else made

    def _send(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.ctx.device, non_blocking=True) for name, tensor in batch.items()}

    def step(self, step: Step, batches: list[Batch]) -> None:
        """Run one optimizer step over the microbatches of this rank."""
        import torch

        total = torch.zeros((), device=self.ctx.device)
        for number, (microbatch, batch) in enumerate(zip(step.microbatches, batches, strict=True), start=1):
            last = number == len(step.microbatches)
            weight = step.weight(microbatch, self.world_size)
            # Gradients are reduced once per step, with the last microbatch.
            with self._syncing(last):
                loss = self.wrapped(**self._send(batch)).loss * weight
                self.accelerator.backward(loss)
            total += loss.detach()
        self.ctx.checkpoints.wait_for_copy()
        if self.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.max_grad_norm)
        self.prepared.step()
        if not self.prepared.step_was_skipped:  # fp16: the scaler found infinite gradients or NaN
            self.scheduler.step()
        self.prepared.zero_grad()
        self.loss_sum += total
        self.loss_steps += 1
        self.runtime.submit()
        if self.unchecked:
            check_replicas(self.ctx.group, self.model, step.after)
            # fp16: a skipped step did not change the weights, so the next one is compared, too.
            self.unchecked = self.ctx.group.any(self.prepared.step_was_skipped)

    def _syncing(self, last: bool) -> AbstractContextManager[Any]:
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        elif self.replicated and self.runtime.ddp and not last:
            return self.wrapped.no_sync()  # type: ignore[no-any-return]
        return nullcontext()

    def mean_loss(self) -> float:
        """The mean loss over all samples of the steps since the last call, over all ranks. A collective."""
        import torch

        sums = self.ctx.group.gather(float(self.loss_sum.item()))
        mean: float = sum(sums) / self.world_size / max(1, self.loss_steps)
        self.loss_sum = torch.zeros((), device=self.ctx.device)
        self.loss_steps = 0
        return mean

    def evaluate(self, data: Encoded, batch_size: int, metric: Metric) -> dict[str, float]:
        """Compute the metric over all samples of `data`; independent of the number of ranks. A collective."""
        import torch

        ids: list[int] = []
        outputs: list[torch.Tensor] = []
        batches = evaluation_batches(data.lengths, batch_size)
        most = -(-len(batches) // self.world_size) * batch_size
        self.model.eval()
        try:
            without_gradients = torch.no_grad() if self.sharded else self.runtime.without_gradients()
            with without_gradients, self.accelerator.autocast():
                local = batches[self.ctx.world.rank :: self.world_size]
                for samples in local:
                    logits = self._logits(data, samples)
                    outputs.append(logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1))
                    ids += samples
                if self.sharded and len(local) < most // batch_size:
                    self._logits(data, batches[0])  # takes part in the all-gather of the parameters
        finally:
            self.model.train()
        predictions = torch.cat(outputs).tolist() if outputs else []
        references = [data.labels[sample] for sample in ids]
        return combine(self.ctx.group, metric, len(data), ids, predictions, references, most)

    def _logits(self, data: Encoded, samples: Sequence[int]) -> torch.Tensor:
        """The logits of `samples`: float32 of shape (samples, labels)."""
        batch = self._send(self.batch(data, samples))
        batch.pop("labels")
        logits: torch.Tensor = self.model(**batch).logits.float()
        self.runtime.submit()
        return logits
