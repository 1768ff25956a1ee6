"""The optimizer steps of a run: which samples, in which order, and what is done with their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from training.data.fetch import Fetch, Key, batches, check_map_style, to_device
from training.data.sampler import Position, steps, steps_per_epoch
from training.data.sampler import Step as Plan
from training.distributed.random_state import mixed_seed
from training.distributed.replicas import mean_of_ranks
from training.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from training.loop.rank import Rank
    from training.loop.setup import Models

MOST_WAITING = 100  # losses that are kept on the device


class Steps:
    """The steps of a run from its position on; iterating continues where the last iteration ended.

    Args:
        data: a dataset with `len(data)` and `data[number]`, the same on all ranks. Its order in an epoch is a function of
            (`seed`, epoch), and independent of the number of ranks.
        collate: makes a batch of a list of samples; that of torch by default.
        global_batch: samples of one step, over all ranks. The last step of an epoch may have fewer.
        epochs: passes over the data.
        max_steps: end after so many steps, if that is sooner.
        microbatch: samples of one forward pass of a rank; by default all that it has of a step.
        lengths: length of each sample, such as its number of tokens. Samples of similar length then share a step, which
            saves padding and changes the order.
        workers: processes of each rank that load samples ahead; with 0 the rank loads them itself.
        prefetch: a thread of the rank loads samples ahead; `data` and `collate` must then draw no random numbers.
        adopt: continue with the global batch of the checkpoint; without it, a checkpoint of another one is refused.

    Raises:
        ConfigError: the dataset is empty, a stream, or of different sizes on the ranks, or a number is less than 1.

    Attributes:
        number: steps done since the beginning of the run.
        global_batch: samples of one step; that of the checkpoint after `state.restore`, as are `total` and `per_epoch`.
        total: steps of the whole run.
        per_epoch: steps of one epoch.
        loss: mean loss of the last step that was done, also of one before a restart; None before the first.
    """

    def __init__(
        self,
        rank: Rank,
        models: Models,
        data: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        *,
        global_batch: int,
        epochs: int = 1,
        max_steps: int | None = None,
        microbatch: int | None = None,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        workers: int = 0,
        prefetch: bool = False,
        adopt: bool = False,
    ) -> None:
        for name, value in (("global_batch", global_batch), ("epochs", epochs), ("microbatch", microbatch)):
            if value is not None and value < 1:
                raise ConfigError(f"ctx.steps: {name}={value} must be 1 or more")
        self._rank, self._models = rank, models
        self._size = check_map_style(data, "ctx.steps", lengths)
        sizes = rank.group.gather(self._size)
        if len(set(sizes)) > 1:
            raise ConfigError(f"ctx.steps: the ranks have datasets of different sizes: {sizes[:8]}")
        self._fetch, self._workers, self._prefetch = Fetch(data, collate, seeded=not prefetch), workers, prefetch
        self._lengths, self._epochs, self._max_steps, self._asked = lengths, epochs, max_steps, microbatch
        self._adopt = adopt
        self._at = Position(seed)
        self.number = 0
        self._share_out(global_batch)
        self._loss: Callable[[], float | None] = lambda: None
        self._losses = Losses()
        self._open = False  # whether a step has begun and its batches are not all used
        self._unchecked = rank.world.world_size > 1  # until the weights are compared after the first update

    def _share_out(self, global_batch: int) -> None:
        share = -(-global_batch // self._rank.world.world_size)
        self.global_batch = global_batch
        self._microbatch = min(self._asked or share, share)
        self.per_epoch = steps_per_epoch(self._size, global_batch)
        most = self.per_epoch * self._epochs
        self.total = min(most, self._max_steps if self._max_steps is not None else most)

    @property
    def loss(self) -> float | None:
        """Mean loss of the last step that was done; waits for it. Not a collective."""
        return self._loss()

    def mean_loss(self) -> float:
        """Mean of the losses of the steps since the last call, also of those before a restart; NaN if there are none."""
        return self._losses.mean()

    def __iter__(self) -> Iterator[Step]:
        while self.number < self.total:
            left = self.total - self.number
            keys = (key for plan in islice(self._plans(), left) for key in self._keys(plan))
            pin = self._rank.runtime.pin_memory_by_default
            made = batches(self._fetch, keys, self._workers, pin=pin, prefetch=self._prefetch)
            try:
                for plan in islice(self._plans(), left):
                    step = Step(self, plan, made)
                    yield step
                    if self.number != step.number:
                        raise ConfigError(
                            f"step {step.number} has ended before its batches: use all of `for batch in step`, and leave"
                            " only the outer loop with `break`"
                        )
                    self._rank.runtime.submit()
                    self.check_ranks()
            finally:
                made.close()

    def check_ranks(self) -> None:
        """After the first update, raise ReplicaError unless all ranks have the same weights and position. A collective."""
        if self._unchecked and self.number and not self._open:
            self._models.check_replicas(self._at)
            self._unchecked = self._models.scale.skipped  # such an update has changed nothing

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, the same on all ranks. Raises ConfigError inside a step."""
        if self._open:
            raise ConfigError("a checkpoint inside of `for batch in step` would lose gradients; save after the update")
        at = self._at
        return {
            "number": self.number, "seed": at.seed, "epoch": at.epoch, "position": at.position,
            "samples": self._size, "global_batch": self.global_batch, "lengths": self._order(), "loss": self.loss,
            "losses": self._losses.state(), "loss_scale": [self._models.scale.value, self._models.scale.good],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of `state`. Raises ConfigError for other data, order, seed or global batch."""
        now = {
            "samples": self._size,
            "global_batch": self.global_batch,
            "seed": self._at.seed,
            "lengths": self._order(),
        }
        if self._adopt:
            del now["global_batch"]
        for name, value in now.items():
            if state.get(name) != value:
                what = "the number of samples" if name == "samples" else name
                raise ConfigError(
                    f"{what} is {value}, but this run began with {state.get(name)}, on which its position in the data"
                    " rests; use that one, or start a new run"
                )
        self._share_out(state["global_batch"])
        self._at = Position(state["seed"], state["epoch"], state["position"])
        self.number = state["number"]
        if self._models.scale.value != 1.0 != state["loss_scale"][0]:
            self._models.scale.value, self._models.scale.good = state["loss_scale"]
        loss = state["loss"]
        self._loss = lambda: loss
        self._losses = Losses(*state.get("losses", (0.0, 0)))

    def _order(self) -> str | None:
        """A hash of the lengths, on which the order of the samples rests."""
        return None if self._lengths is None else f"{mixed_seed(*self._lengths):016x}"

    def _plans(self) -> Iterator[Plan]:
        world = self._rank.world
        return steps(
            self._size, self._at, rank=world.rank, world_size=world.world_size, batch_size=self._microbatch,
            global_batch=self.global_batch, lengths=self._lengths,
        )  # fmt: skip

    def _keys(self, plan: Plan) -> Iterator[Key]:
        rank = self._rank.world.rank
        for number, ids in enumerate(plan.microbatches):
            at = plan.after
            seed = mixed_seed(at.seed, at.epoch, at.position, rank, number)
            yield seed, ids or (plan.padding_sample,)


class Step:
    """One optimizer step. Iterating gives this rank's microbatches, on its device; it can be done once.

    Every rank gets the same number of microbatches. A rank that has fewer samples than the others gets a sample of another
    rank in place of a missing microbatch, with weight 0, because all ranks must take part in the communication.

    Attributes:
        number: number of the step in the run, from 1; ``int(step)`` and ``operator.index(step)`` give it, too.
        epoch: number of its epoch, from 0.
        samples: samples in the step, over all ranks.
        ids: the ids of this rank's samples, in order.
        ends_epoch: it is the last step of its epoch.
        is_last: it is the last step of the run.
        skipped: with fp16, gradients were not finite and have been removed, so that optimizers change nothing.
    """

    def __init__(self, steps: Steps, plan: Plan, made: Iterator[Any]) -> None:
        self._steps, self._plan, self._made = steps, plan, made
        self.number = steps.number + 1
        self.epoch = steps._at.epoch
        self.samples = plan.samples
        self.ids = tuple(sample for ids in plan.microbatches for sample in ids)
        self.ends_epoch = plan.after.position == 0
        self.is_last = self.number == steps.total
        self.skipped = False
        self._share = 0.0  # the factor on the loss of the present microbatch; 0 if it is not of this rank
        self._by_weight, self._weights = False, 0.0
        self._sum: torch.Tensor | None = None
        self._backward_done = False  # for the present microbatch
        self._result: Callable[[], float] | None = None

    def __index__(self) -> int:
        return self.number

    @property
    def facts(self) -> dict[str, Any]:
        """What `Context.log` adds to the record of a step."""
        return {"epoch": self.number / self._steps.per_epoch, "total_steps": self._steps.total}

    @property
    def loss(self) -> float:
        """Mean loss over the samples of the step, over all ranks; known after its last batch. Waits for the device."""
        if self._result is None:
            raise ConfigError(f"the loss of step {self.number} is known after its last batch")
        return self._result()

    def __iter__(self) -> Iterator[Any]:
        steps = self._steps
        world_size, device = steps._rank.world.world_size, steps._rank.device
        steps._open = True
        for number, ids in enumerate(self._plan.microbatches, start=1):
            self._share = self._plan.weight(ids, world_size)
            steps._models.synchronise(number == len(self._plan.microbatches))
            self._backward_done = False
            yield to_device(next(self._made), device)
        if not self._backward_done and steps._models.communicate:
            raise ConfigError(
                f"step {self.number}: step.backward was not called for its last microbatch, so that the other ranks would"
                " wait for the gradients of this one; to leave a batch out, call it with the loss times 0"
            )
        self._finish()

    def backward(self, loss: torch.Tensor, *, weight: float | torch.Tensor | None = None) -> None:
        """Add the gradients of `loss`, the mean loss over the samples of the present microbatch (a scalar tensor).

        After the last microbatch the gradients are those of the mean over all samples of the step, on every rank. If `loss`
        is a mean over something else, such as tokens, `weight` is their number in the microbatch: then the gradients are
        those of the mean over all tokens of the step.

        Raises ConfigError if some calls of a step have a weight and others have none.
        """
        if self._sum is not None and (weight is not None) != self._by_weight:
            raise ConfigError(f"step {self.number}: give each call of step.backward a weight, or none of them")
        factor = self._share
        if weight is not None:
            self._by_weight = True
            factor = float(weight) if self._share else 0.0
            self._weights += factor
        weighted = loss * factor
        scale = self._steps._models.scale.value
        (weighted if scale == 1.0 else weighted * scale).backward()  # type: ignore[no-untyped-call]
        self._backward_done = True
        done = weighted.detach().float()
        self._sum = done if self._sum is None else self._sum + done

    def _finish(self) -> None:
        import torch

        steps, group = self._steps, self._steps._rank.group
        divisor = 1.0
        total = self._sum
        if total is None:
            total = torch.tensor(float("nan"), device=steps._rank.device)
        if self._by_weight:  # the ranks' average of gradients becomes a sum over all weights
            divisor = (
                mean_of_ranks(group, torch.tensor(self._weights, device=total.device, dtype=torch.float64))() or 1.0
            )
        steps._models.average_gradients()
        self.skipped = not steps._models.divide_gradients(divisor)
        self._result = _once(mean_of_ranks(group, total / divisor if self._by_weight else total))
        steps._loss = self._result
        steps._losses.add(self._result)
        steps._at, steps.number, steps._open = self._plan.after, self.number, False


class Losses:
    """The losses of the steps since the mean was last asked for; those of the newest steps may still be under way."""

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self._total, self._count = total, count
        self._waiting: list[Callable[[], float]] = []

    def add(self, loss: Callable[[], float]) -> None:
        """Add the loss of a step, which `loss` waits for."""
        self._waiting.append(loss)
        if len(self._waiting) > MOST_WAITING:  # nobody asks: these are done
            self._settle(MOST_WAITING // 2)

    def mean(self) -> float:
        """The mean; afterwards there are none."""
        self._settle(len(self._waiting))
        mean = self._total / self._count if self._count else math.nan
        self._total, self._count = 0.0, 0
        return mean

    def state(self) -> list[Any]:
        """The sum and the number of losses."""
        self._settle(len(self._waiting))
        return [self._total, self._count]

    def _settle(self, number: int) -> None:
        self._total += sum(wait() for wait in self._waiting[:number])
        self._count += number
        del self._waiting[:number]


def _once(wait: Callable[[], float]) -> Callable[[], float]:
    found: list[float] = []

    def result() -> float:
        if not found:
            found.append(wait())
        return found[0]

    return result
