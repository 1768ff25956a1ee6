"""The files of a checkpoint from the items of a saved state, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.checkpoints.sharding import local_parts, part_name, whole
from training.checkpoints.tree import decode, encode
from training.distributed.random_state import mixed_seed
from training.errors import CheckpointError, ConfigError
from training.loop.agreed import FORMAT
from training.loop.items import digest, is_replicated, is_sharded, on_cpu, put_back, settled, state_of

if TYPE_CHECKING:
    import torch

    from training.loop.items import Encoded
    from training.loop.rank import Rank


def capture(
    rank: Rank, items: dict[str, Any], step: int, *, in_parts: bool = True, overlap: bool = False
) -> dict[str, Any]:
    """The files that this rank writes: all of them on rank 0, its parts of sharded items on another one. A collective.

    Without `in_parts`, rank 0 writes sharded items, too. With `overlap`, the tensors of the files stay as they are until the
    next update; without it, until this rank goes on.

    Raises CheckpointError, on all ranks, if the state of an item cannot be saved on one of them.
    """
    encoded, ranks = _states(rank, items, overlap)
    trees: dict[str, list[Any]] = {}
    parts: dict[str, Any] = {}
    sharded: dict[str, Any] = {}  # what every rank writes
    for name, item in items.items():
        file = f"{name}.safetensors"
        if any(each[2].get(name) != ranks[0][2].get(name) for each in ranks):
            of_ranks = rank.group.collect(on_cpu(encoded[name]))  # rank 0 writes them
            trees[name] = [tree for tree, _ in of_ranks]
            parts |= {f"{name}@{number:05d}.safetensors": tensors for number, (_, tensors) in enumerate(of_ranks)}
        elif name in encoded:
            tree, tensors = encoded[name]
            trees[name] = [tree]
            if not is_sharded(item):
                parts[file] = tensors
            elif in_parts:
                sharded[part_name(file, rank.world.rank)] = local_parts(tensors, rank.world.rank)
            else:
                parts[file] = whole(tensors, keep=rank.world.rank == 0)
    if rank.world.rank:
        return sharded
    states = {f"{number}.{name}": tensor for number, each in enumerate(ranks) for name, tensor in each[1].items()}
    return {
        **sharded,
        **{file: tensors for file, tensors in parts.items() if tensors},
        "rng.safetensors": states,
        "state.json": {"format": FORMAT, "step": step, "ranks": len(ranks), "items": trees},
    }


def _states(rank: Rank, items: dict[str, Any], overlap: bool) -> tuple[dict[str, Encoded], list[Any]]:
    """The states that this rank has to write, and the problem, generators and hashes of every rank. A collective."""
    encoded: dict[str, Encoded] = {}
    generators: dict[str, torch.Tensor] = {}
    problem = ""
    rank.runtime.submit()  # the update as one graph; else torch_xla compiles one for each tensor that is copied
    try:
        for name, item in items.items():
            if rank.world.rank == 0 or not is_replicated(item) or is_sharded(item):
                encoded[name] = encode(state_of(item), name)
                if overlap:
                    encoded[name] = settled(item, encoded[name])
        generators = rank.runtime.rng_state()
    except Exception as error:  # the other ranks wait for this one
        problem = f"{type(error).__name__}: {error}"
    own = {name: digest(each) for name, each in encoded.items() if not is_replicated(items[name])}
    ranks = rank.group.gather((problem, generators, own))
    for number, (text, _, _) in enumerate(ranks):
        if text:
            raise CheckpointError(f"rank {number}: {text}" if len(ranks) > 1 else text)
    return encoded, ranks


def restore(rank: Rank, items: dict[str, Any], parts: dict[str, Any]) -> None:
    """Put the state of a checkpoint back into `items`, and into the generators of this rank.

    Raises CheckpointError if the checkpoint is of other items, and ConfigError if the run has changed otherwise.
    """
    import torch

    saved = parts["state.json"]
    strange = sorted(saved["items"].keys() ^ items.keys())
    if strange:
        raise CheckpointError(
            f"the checkpoint of step {saved['step']} holds {', '.join(sorted(saved['items']))}, and ctx.state was given"
            f" {', '.join(sorted(items))}; {strange[0]} is in one of them only. Use the same names, or start a new run"
        )
    for name, item in items.items():
        state = decode(*_own(rank, name, parts), rank.device)
        try:
            put_back(item, state)
        except ConfigError:
            raise
        except Exception as error:
            kind = " of another model" if isinstance(item, torch.nn.Module) else ""
            raise CheckpointError(f"{name} does not take the state of step {saved['step']}{kind}: {error}") from error
    generators: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in parts["rng.safetensors"].items():
        owner, _, name = full.partition(".")
        generators.setdefault(owner, {})[name] = tensor
    if len(generators) == rank.world.world_size:
        rank.runtime.set_rng_state(generators[str(rank.world.rank)])
    else:
        words = generators["0"]["torch"].numpy().tobytes()
        rank.runtime.seed(mixed_seed(words, saved["step"], rank.world.rank))


def _own(rank: Rank, name: str, parts: dict[str, Any]) -> tuple[Any, Any]:
    """The encoded state of an item, as this rank is to have it."""
    trees = parts["state.json"]["items"][name]
    if len(trees) == 1:
        return trees[0], parts.get(f"{name}.safetensors", {})
    if len(trees) != rank.world.world_size:
        raise CheckpointError(
            f"the state of {name} differs from rank to rank, and it was saved by {len(trees)} ranks; resume with that number"
            f" of ranks, and not {rank.world.world_size}"
        )
    return trees[rank.world.rank], parts.get(f"{name}@{rank.world.rank:05d}.safetensors", {})
