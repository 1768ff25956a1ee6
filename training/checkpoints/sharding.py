"""Shard parameters over ranks (FSDP2); save one part per rank, load with any number of ranks.

FSDP2 splits parameters along dimension 0 as `torch.chunk` does. This module calls torch's `fully_shard` directly, because
accelerate supports it on accelerators only, and tests run on CPU ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from training.distributed.world import World

_PART = re.compile(r"(.+)\.rank(\d{5})\.safetensors")


def part_name(file: str, rank: int) -> str:
    """`model.safetensors` -> `model.rank00003.safetensors`."""
    return f"{file.removesuffix('.safetensors')}.rank{rank:05d}.safetensors"


def shard(model: torch.nn.Module, world: World) -> None:
    """Shard the parameters of `model` over all ranks, in place; each layer is one FSDP unit."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device, (world.world_size,))
    for module in list(model.modules()):
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local_parts(tensors: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The tensors that `rank` saves: its piece of sharded tensors; rank 0 also the whole of the others."""
    from torch.distributed.tensor import DTensor

    local = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            local[name] = tensor.to_local()
        elif rank == 0:
            local[name] = tensor
    return local


def whole(tensors: Mapping[str, torch.Tensor], *, keep: bool = True) -> dict[str, torch.Tensor]:
    """Gather sharded tensors; returns all `tensors` on the CPU, or nothing without `keep`. A collective."""
    from torch.distributed.tensor import DTensor

    kept = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            kept[name] = full.cpu()
    return kept


def like(full: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Shard `full` like `target`, without communication; `full` itself if `target` is not sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(target, DTensor):
        return full
    return distribute_tensor(full.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


class Assembled(Mapping[str, "torch.Tensor"]):
    """Tensors of a file that was saved in parts; each is assembled on access, to save memory."""

    def __init__(self, parts: list[Path]) -> None:
        from safetensors import safe_open

        self._where: dict[str, list[Path]] = {}
        for path in parts:  # in the order of ranks, as the pieces are concatenated
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - the file is no mapping
                    self._where.setdefault(name, []).append(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch
        from safetensors import safe_open

        pieces = []
        for path in self._where[name]:
            with safe_open(path, "pt") as file:
                pieces.append(file.get_tensor(name))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def assemble(folder: Path, names: list[str]) -> dict[str, Assembled]:
    """The files in `folder` that were saved in parts, from the part names among `names`.

    Raises:
        CheckpointError: the part of a rank is missing.
    """
    found: dict[str, dict[int, Path]] = {}
    for name in names:
        match = _PART.fullmatch(name)
        if match:
            found.setdefault(f"{match[1]}.safetensors", {})[int(match[2])] = folder / name
    for name, parts in found.items():
        if sorted(parts) != list(range(len(parts))):
            raise CheckpointError(f"{folder / name}: there are parts of ranks {sorted(parts)} only")
    return {name: Assembled([parts[rank] for rank in sorted(parts)]) for name, parts in found.items()}


def is_part(name: str) -> bool:
    """Whether the file `name` is one rank's part of a file."""
    return _PART.fullmatch(name) is not None


def load_model_state(model: torch.nn.Module, saved: Mapping[str, Any]) -> None:
    """Copy `saved` (whole tensors by name) into `model`, sharded or not.

    Raises:
        CheckpointError: names or shapes are those of another model.
    """
    import torch

    targets: dict[str, torch.Tensor] = model.state_dict()
    strange = sorted(targets.keys() ^ saved.keys())
    if strange:
        raise CheckpointError(
            f"the checkpoint is of another model than --model builds: {strange[0]} is in one of them only; "
            "give the model it was made with, or another run name"
        )
    with torch.no_grad():
        for name, target in targets.items():
            tensor = saved[name]
            if tensor.shape != target.shape:
                raise CheckpointError(
                    f"the checkpoint is of another model than --model builds: {name} has shape {tuple(tensor.shape)} "
                    f"there and {tuple(target.shape)} here; give the model it was made with, or another run name"
                )
            target.copy_(like(tensor, target))
