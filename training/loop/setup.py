"""Prepare models for training: device, precision, replicas (DDP) or shards (FSDP2), compilation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from training.distributed.replicas import check_replicas, fix_order_of_gradients, replicate, same_on_all_ranks
from training.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from training.loop.rank import Rank

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000  # as in torch.amp.GradScaler

M = TypeVar("M", bound="torch.nn.Module")


@dataclass
class LossScale:
    """The factor on losses of fp16, whose small gradients would be 0; as `torch.amp.GradScaler` changes it.

    Attributes:
        value: the factor; 1 without fp16.
        good: steps with finite gradients since the factor was changed.
        skipped: the gradients of the last step were not finite.
    """

    value: float = 1.0
    good: int = 0
    skipped: bool = field(default=False, compare=False)

    def update(self, finite: bool) -> None:
        """Halve the factor after gradients that are not finite, and double it after GROWTH_STEPS steps without."""
        self.skipped = not finite
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good == GROWTH_STEPS:
            self.value, self.good = self.value * 2, 0


class Models:
    """The models of one rank that `Context.setup` has prepared.

    Attributes:
        sharded: those of them that are sharded.
        scale: the factor on losses.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self.scale = LossScale()
        self._models: list[torch.nn.Module] = []
        self._replicas: list[Any] = []
        self.sharded: list[Any] = []

    def prepare(
        self,
        model: M,
        *,
        precision: str,
        compile_model: bool | Mapping[str, Any],
        shard: bool,
        find_unused_parameters: bool,
    ) -> M | torch.nn.Module:
        """Prepare `model` and return what trains: `model` itself, or its replica. A collective."""
        import torch

        rank = self._rank
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"ctx.setup takes a torch.nn.Module, and not a {type(model).__name__}")
        several = rank.world.world_size > 1
        rank.runtime.check(precision, shard=shard and several)
        if rank.world.threads:
            torch.set_num_threads(rank.world.threads)
        model.to(rank.device)
        trained = any(parameter.requires_grad for parameter in model.parameters())
        if several and (shard or not trained):
            same_on_all_ranks(rank.group, model)
        if shard and several:
            from training.checkpoints.sharding import shard as shard_in_place

            shard_in_place(model, rank.world)
            self.sharded.append(model)
        if precision == "fp16":
            self.scale.value = FIRST_SCALE
        if precision != "fp32":
            _autocast(model, rank.device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
        self._models.append(model)
        prepared: torch.nn.Module = model
        if several and trained and not shard and rank.runtime.ddp:
            _ = rank.group
            prepared = replica = replicate(model, rank.device, find_unused_parameters=find_unused_parameters)
            if not find_unused_parameters and rank.world.world_size > 2:  # two numbers have one order
                fix_order_of_gradients(replica)
            self._replicas.append(replica)
        if compile_model and rank.runtime.dynamic_shapes:  # a runtime with static shapes compiles by itself
            options = {} if compile_model is True else compile_model
            model.compile(**options)  # in place, so that the names of the parameters stay
        return prepared

    @property
    def communicate(self) -> bool:
        """Whether a backward pass sends gradients to other ranks."""
        return bool(self._replicas or self.sharded)

    def synchronise(self, on: bool) -> None:
        """Whether the next backward pass averages the gradients over the ranks; False accumulates them."""
        for replica in self._replicas:
            replica.require_backward_grad_sync = on
        for model in self.sharded:
            model.set_requires_gradient_sync(on)

    def average_gradients(self) -> None:
        """Average the gradients of a step over the ranks, on a device for which DDP does not. A collective."""
        if self._rank.world.world_size > 1 and not self._rank.runtime.ddp:
            self._rank.runtime.average([_gradient(parameter) for parameter in self._parameters()])

    def check_replicas(self, also: Any) -> None:
        """Raise ReplicaError unless the models that are not sharded, and `also`, are the same on all ranks. A collective."""
        import torch

        whole = [model for model in self._models if model not in self.sharded]
        check_replicas(self._rank.group, torch.nn.ModuleList(whole), also)

    def _parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that have gradients, in the same order on all ranks; those that models share once."""
        every = dict.fromkeys(parameter for model in self._models for parameter in model.parameters())
        return [parameter for parameter in every if parameter.grad is not None]

    def divide_gradients(self, divisor: float) -> bool:
        """Divide the gradients by `divisor` and the factor on losses; returns false if that removes them.

        With fp16, gradients that are not finite are removed, so that an optimizer changes nothing. The result is the same
        on all ranks; a collective for sharded models.
        """
        import torch

        scaled = self.scale.value != 1.0
        if not scaled and divisor == 1.0:
            return True
        parameters = self._parameters()
        grads = [_gradient(parameter) for parameter in parameters]
        with torch.no_grad():
            for grad in grads:
                grad /= self.scale.value * divisor
        if not scaled:
            return True
        # Asked for once: each answer waits for the device.
        finite = not grads or bool(torch.stack([_local(grad).isfinite().all() for grad in grads]).all())
        if self.sharded:
            finite = not self._rank.group.any(not finite)
        self.scale.update(finite)
        if not finite:
            for parameter in parameters:
                parameter.grad = None
        return finite

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the models into evaluation mode, without gradients, inside the block. A collective at its beginning.

        All ranks then have the buffers of rank 0, such as the statistics of batch normalisation. A replica sends
        nothing inside the block, so ranks may evaluate different numbers of batches.
        """
        import torch
        import torch.distributed as dist

        modules = [*self._models, *self._replicas]
        modes = [module.training for module in modules]
        syncing = [replica.require_forward_param_sync for replica in self._replicas]
        for replica in self._replicas:
            for buffer in replica.module.buffers():
                dist.broadcast(buffer.detach(), 0)
            replica.require_forward_param_sync = False
        for module in modules:
            module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.train(mode)
            for replica, before in zip(self._replicas, syncing, strict=True):
                replica.require_forward_param_sync = before


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _local(tensor: Any) -> torch.Tensor:
    """The part of a sharded tensor on this rank; another tensor itself."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _autocast(model: torch.nn.Module, device: str, dtype: torch.dtype) -> None:
    """Run the forward pass of `model` in `dtype` where autocast allows it; outputs are float32."""
    import torch
    from torch.utils._pytree import tree_map

    forward = model.forward

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.dtype == dtype else value

    @wraps(forward)
    def lower(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype):
            out = forward(*args, **kwargs)
        return tree_map(wide, out)

    model.forward = lower
