"""The files of a checkpoint from the items of a saved state, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from training.checkpoints.sharding import local_parts, part_name
from training.checkpoints.tree import decode, encode
from training.distributed.random_state import mixed_seed
from training.errors import CheckpointError, ConfigError
from training.loop.items import digest, is_replicated, is_sharded, on_cpu, put_back, state_of

if TYPE_CHECKING:
    import torch

    from training.loop.items import Encoded
    from training.loop.rank import Rank


def capture(rank: Rank, items: dict[str, Any], step: int) -> dict[str, Any]:
    """The files that this rank writes: all of them on rank 0, its parts of sharded items on another one. A collective.

    Raises CheckpointError, on all ranks, if the state of an item cannot be saved on one of them.
    """
    encoded: dict[str, Encoded] = {}
    generators: dict[str, torch.Tensor] = {}
    problem = ""
    try:
        for name, item in items.items():
            if rank.world.rank == 0 or not is_replicated(item) or is_sharded(item):
                encoded[name] = encode(state_of(item), name)
        generators = rank.runtime.rng_state()
    except Exception as error:  # the other ranks wait for this one
        problem = f"{type(error).__name__}: {error}"
    own = {name: digest(each) for name, each in encoded.items() if not is_replicated(items[name])}
    ranks = rank.group.gather((problem, generators, own))
    for number, (text, _, _) in enumerate(ranks):
        if text:
            raise CheckpointError(f"rank {number}: {text}" if len(ranks) > 1 else text)
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
            trees[name] = [encoded[name][0]]
            if is_sharded(item):
                sharded[part_name(file, rank.world.rank)] = local_parts(encoded[name][1], rank.world.rank)
            else:
                parts[file] = encoded[name][1]
    if rank.world.rank:
        return sharded
    states = {f"{number}.{name}": tensor for number, each in enumerate(ranks) for name, tensor in each[1].items()}
    return {
        **sharded,
        **{file: tensors for file, tensors in parts.items() if tensors},
        "rng.safetensors": states,
        "state.json": {"format": 1, "step": step, "ranks": len(ranks), "items": trees},
    }


def restore(rank: Rank, items: dict[str, Any], parts: dict[str, Any]) -> None:
    """Put the state of a checkpoint back into `items`, and into the generators of this rank.

    Raises CheckpointError if the checkpoint is of other items, and ConfigError if the run has changed otherwise.
    """
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
            raise CheckpointError(f"{name} does not take the state of step {saved['step']}: {error}") from error
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
