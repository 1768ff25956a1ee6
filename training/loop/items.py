"""Items of a saved state: which are the same on all ranks, their state without wrappers, and how it is put back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from training.checkpoints.sharding import like, load_model_state
from training.loop.steps import Steps

if TYPE_CHECKING:
    import torch

    Encoded = tuple[Any, dict[str, torch.Tensor]]

DEVICE_OPTIONS = ("fused", "foreach", "capturable")
"""Options of an optimizer that depend on the device, which may be another one after a restart."""


def is_replicated(item: Any) -> bool:
    """Whether the state of `item` is the same on all ranks: models, optimizers, learning-rate schedulers and steps."""
    import torch

    kinds = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler, Steps)
    return isinstance(item, (*kinds, torch.optim.lr_scheduler.ReduceLROnPlateau))


def is_sharded(item: Any) -> bool:
    """Whether `item` is a model with sharded parameters (FSDP2), or an optimizer of such parameters."""
    import torch

    if "torch.distributed.fsdp" not in sys.modules:  # importing it takes time
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if isinstance(item, torch.nn.Module):  # its parameters are whole for a while after a forward pass
        return any(isinstance(module, FSDPModule) for module in item.modules())
    if isinstance(item, torch.optim.Optimizer):
        return any(isinstance(parameter, DTensor) for group in item.param_groups for parameter in group["params"])
    return False


def state_of(item: Any) -> Any:
    """The state of `item`; names of parameters are those of the model without DDP and torch.compile around it."""
    import torch

    state = item.state_dict()
    if not isinstance(item, torch.nn.Module):
        return state
    wrappers = list(_wrappers(item))
    return {_bare(name, wrappers): value for name, value in state.items()}


def settled(item: Any, encoded: Encoded) -> Encoded:
    """`encoded` without tensors that may change before the next update: buffers, and those of other things, are copied."""
    import torch

    if isinstance(item, torch.optim.Optimizer):
        return encoded
    kept: set[str] = set()
    if isinstance(item, torch.nn.Module):
        wrappers = list(_wrappers(item))
        kept = {_bare(name, wrappers) for name, _ in item.named_parameters()}
    tree, tensors = encoded
    return tree, {name: tensor if name in kept else tensor.clone() for name, tensor in tensors.items()}


def put_back(item: Any, state: Any) -> None:
    """Load a state that `state_of` has returned; of sharded items this rank takes its part. Raises the item's errors."""
    import torch

    if isinstance(item, torch.nn.Module):
        wrappers = list(_wrappers(item))
        names = {_bare(name, wrappers): name for name in item.state_dict()}
        state = {names.get(name, name): value for name, value in state.items()}
        if is_sharded(item):
            load_model_state(item, state)
            return
    if isinstance(item, torch.optim.Optimizer):
        for saved, fresh in zip(state["param_groups"], item.param_groups, strict=False):
            saved |= {option: fresh[option] for option in DEVICE_OPTIONS if option in fresh}
        parameters = [parameter for group in item.param_groups for parameter in group["params"]]
        for number, fields in state["state"].items() if is_sharded(item) else ():
            for name, value in fields.items():
                if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape:
                    fields[name] = like(value, parameters[number])
    item.load_state_dict(state)


def _wrappers(model: torch.nn.Module) -> Iterator[str]:
    """What DDP and torch.compile add to the names of parameters, such as ``generator.module.``, the outermost first."""
    import torch
    from torch._dynamo import OptimizedModule

    for path, module in model.named_modules():
        added = {torch.nn.parallel.DistributedDataParallel: "module", OptimizedModule: "_orig_mod"}.get(type(module))
        if added is not None:
            yield f"{path}.{added}." if path else f"{added}."


def _bare(name: str, wrappers: list[str]) -> str:
    """`name` without the wrappers; the innermost is taken out first, so that the paths of the others still fit."""
    for prefix in reversed(wrappers):
        if name.startswith(prefix):
            outer, _, _ = prefix[:-1].rpartition(".")
            name = f"{outer}.{name[len(prefix) :]}" if outer else name[len(prefix) :]
    return name


def digest(encoded: Encoded) -> str:
    """A hash (XXH3) of an encoded state, by which ranks compare their states."""
    import json

    import torch
    import xxhash

    tree, tensors = encoded
    found = xxhash.xxh3_128(json.dumps(tree).encode())
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def on_cpu(encoded: Encoded) -> Encoded:
    """An encoded state whose tensors can be sent to another rank."""
    tree, tensors = encoded
    return tree, {name: tensor.cpu() for name, tensor in tensors.items()}
