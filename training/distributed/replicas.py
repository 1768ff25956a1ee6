"""Replicate a model over ranks (DDP), and check that all replicas stay equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from training.distributed.group import Group
from training.errors import ReplicaError

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel


def replicate(model: torch.nn.Module, device: torch.device, **options: Any) -> DistributedDataParallel:
    """Wrap `model`, which is on `device`, in DDP over the default process group. A collective.

    `device_ids` is the device of this rank, if it has an index. It differs from the local rank if each rank sees only one
    GPU, as with MIG. `options` are those of DDP.
    """
    import torch

    ids = None if device.type == "cpu" or device.index is None else [device.index]
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, **options)


def fix_order_of_gradients(replica: DistributedDataParallel) -> None:
    """Make DDP group its gradients now as it does for the rest of the run; no code of the model runs. A collective.

    DDP regroups the gradients after its first backward pass, in the order in which they became ready. With more than two
    ranks the grouping decides the order in which numbers are added, so that a resumed run would round differently in its
    first step. Here the first backward pass is one over the sum of the parameters, times 0.
    """
    import torch

    model = replica.module
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    class Zero(torch.nn.Module):
        """Takes the place of the model for one pass."""

        def forward(self, zero: torch.Tensor) -> torch.Tensor:
            return zero + torch.stack([parameter.flatten()[:1].float().sum() for parameter in parameters]).sum() * 0

    replica._modules["module"] = Zero()
    replica.require_forward_param_sync = False  # DDP fails for a model without buffers; a forward pass sets it again
    try:
        replica(torch.zeros((), device=parameters[0].device)).backward()  # on a GPU, DDP fails without an input
    finally:
        replica._modules["module"] = model
    for parameter in parameters:
        parameter.grad = None


def same_on_all_ranks(group: Group, model: torch.nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to all ranks. A collective."""
    import torch
    import torch.distributed as dist

    if group.size > 1:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)


def mean_of_ranks(group: Group, value: torch.Tensor) -> Callable[[], float]:
    """Start the sum of `value` (a scalar) over all ranks, divided by their number; the result is a wait. A collective."""
    import torch.distributed as dist

    if group.size == 1:
        return value.item
    total = value.clone()
    work = dist.all_reduce(total, async_op=True)

    def wait() -> float:
        work.wait()
        return total.item() / group.size

    return wait


def check_replicas(group: Group, model: torch.nn.Module, also: Any = None) -> None:
    """Raise ReplicaError on all ranks unless all hold the same parameters to the bit. A collective.

    Parameters are copied to the CPU one at a time and hashed (XXH3, 64 bits). Sharded parameters (FSDP2) are excluded,
    because each rank holds a different part. The `repr` of `also` must be equal on all ranks as well.
    """
    if group.size == 1:
        return
    prints = _prints(model)
    found = group.gather((prints, repr(also)))
    odd = _odd([hashes for hashes, _ in found])
    if odd:
        reference = next(hashes for rank, (hashes, _) in enumerate(found) if rank not in odd)
        names = sorted(name for name in reference if any(found[rank][0].get(name) != reference[name] for rank in odd))
        raise ReplicaError(
            f"{_ranks(odd)} of {group.size} ranks hold other weights than the rest ({len(names)} of {len(reference)}"
            f" parameters differ, such as {names[0] if names else 'further ones there'}), so gradients are not averaged"
            f" between the ranks, or a rank changes its weights by itself; if the loss does not depend on all parameters,"
            f" give ctx.setup find_unused_parameters=True"
        )
    odd = _odd([text for _, text in found])
    if odd:
        texts = {text for _, text in found}
        raise ReplicaError(
            f"{_ranks(odd)} of {group.size} ranks are at another place in the data than the rest"
            f" ({' and '.join(sorted(texts)[:2])}), so some samples would be used twice and others never"
        )


def _prints(model: torch.nn.Module) -> dict[str, str]:
    """A hash of each parameter that is not sharded, by name."""
    import torch
    import xxhash
    from torch.distributed.tensor import DTensor

    prints = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            data = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            kind = f"{parameter.dtype} {tuple(parameter.shape)} "
            prints[name] = kind + xxhash.xxh3_64_hexdigest(data.numpy().data)
    return prints


def _odd(values: list[Any]) -> list[int]:
    """The ranks whose value differs from the most frequent one; the lowest rank decides between equally frequent values."""
    keys = [repr(value) for value in values]
    usual = Counter(keys).most_common(1)[0][0]
    return [rank for rank, key in enumerate(keys) if key != usual]


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' * (len(numbers) > 1)} {shown}"
