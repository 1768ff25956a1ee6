"""State of the reference job in a checkpoint: the position in the data, and the state of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from training.checkpoints.sharding import like, load_model_state, local_parts, part_name, whole
from training.checkpoints.state import join_optimizer, split_optimizer
from training.data.sampler import Position
from training.errors import ConfigError

if TYPE_CHECKING:
    from training.bert.config import TrainConfig
    from training.bert.engine import Engine
    from training.bert.tokens import Encoded

WAYS = ("fused", "foreach", "capturable")  # options of AdamW that depend on the device


@dataclass
class State:
    """The content of `state.json` of a checkpoint: position in the data, step and evaluations."""

    at: Position
    global_batch: int
    identity: dict[str, Any]  # what determines the order of the data; must not change on resume
    step: int = 0
    best: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def fresh(cls, config: TrainConfig, world_size: int, data: Encoded) -> State:
        """Return the state of a run before its first step."""
        identity = {"data": data.fingerprint, "samples": len(data), "length_buckets": config.length_buckets}
        return cls(Position(config.seed), config.global_batch or (config.batch_size or 1) * world_size, identity)

    @classmethod
    def resumed(cls, saved: dict[str, Any], fresh: State, global_batch: int) -> State:
        """Return the saved state. Raises ConfigError if data, order or `global_batch` (0: any) differ."""
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
        """Add an evaluation and return its score, the first value of the metric."""
        score = next(iter(evaluation.values()))
        self.evaluations.append(evaluation)
        if self.best is None or score >= self.best["score"]:
            self.best = {"step": self.step, "score": score, **evaluation}
        return score


def capture(engine: Engine, *, in_parts: bool) -> dict[str, Any]:
    """Return the parts of a checkpoint from the engine; gathers the state of all ranks. A collective.

    Parameters and moments are the engine's tensors, which change in the next `step` after they are copied. Buffers, which a
    forward pass may change, are copies.

    Args:
        in_parts: each rank returns its own part of a sharded model; otherwise rank 0 returns whole tensors.
    """
    ranks = engine.ctx.group.gather(
        {"rng": engine.runtime.rng_state(), "loss": [float(engine.loss_sum.item()), engine.loss_steps]}
    )
    tensors, plain = split_optimizer(engine.optimizer.state_dict())
    scaler = engine.accelerator.scaler
    model = engine.model.state_dict()
    model |= {name: tensor.clone() for name, tensor in engine.model.named_buffers() if name in model}
    state: dict[str, Any] = {"model.safetensors": model, "optimizer.safetensors": tensors}
    rank = engine.ctx.world.rank
    if in_parts:
        state = {part_name(file, rank): local_parts(content, rank) for file, content in state.items()}
    elif engine.sharded:
        state = {file: whole(content, keep=rank == 0) for file, content in state.items()}
    if rank:
        return state
    return {
        **state,
        "rng.safetensors": {
            f"{rank}.{name}": tensor for rank, state in enumerate(ranks) for name, tensor in state["rng"].items()
        },
        "engine.json": {
            "optimizer": plain,
            "scheduler": engine.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "losses": [state["loss"] for state in ranks],
        },
        "config.json": engine.model.config.to_dict() | {"architectures": [type(engine.model).__name__]},
    }


def restore(engine: Engine, parts: dict[str, Any]) -> None:
    """Restore the engine from the result of `capture`.

    If the number of ranks has changed, random generators keep their initial seeds.

    Raises:
        CheckpointError: the parts are of another model.
    """
    import torch

    load_model_state(engine.model, parts["model.safetensors"])
    plain = parts["engine.json"]
    joined = join_optimizer(parts["optimizer.safetensors"], plain["optimizer"])
    for saved, fresh in zip(joined["param_groups"], engine.optimizer.param_groups, strict=True):
        saved |= {way: fresh[way] for way in WAYS}
    parameters = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]
    for number, fields in joined["state"].items():
        for name, value in fields.items():
            if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape:
                fields[name] = like(value, parameters[number])
    engine.optimizer.load_state_dict(joined)
    engine.scheduler.load_state_dict(plain["scheduler"])
    if engine.accelerator.scaler is not None and plain["scaler"]:
        engine.accelerator.scaler.load_state_dict(plain["scaler"])
    if len(plain["losses"]) == engine.world_size:
        rank = engine.ctx.world.rank
        total, engine.loss_steps = plain["losses"][rank]
        engine.loss_sum = torch.tensor(total, device=engine.ctx.device)
        local = {
            name.partition(".")[2]: tensor
            for name, tensor in parts["rng.safetensors"].items()
            if name.partition(".")[0] == str(rank)
        }
        engine.runtime.set_rng_state(local)
