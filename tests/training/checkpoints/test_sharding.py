from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training.checkpoints.sharding import assemble, is_part, load_model_state, part_name
from training.errors import CheckpointError


def test_parts_are_put_together_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    names = [part_name("model.safetensors", rank) for rank in range(11)]
    for rank, name in enumerate(names):
        assert is_part(name)
        save_file({"weight": torch.full((1, 2), float(rank))}, tmp_path / name)
    found = assemble(tmp_path, [*reversed(names), "state.json"])
    assert found.keys() == {"model.safetensors"}
    assert found["model.safetensors"]["weight"][:, 0].tolist() == list(range(11))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: there are parts of ranks \[0, 2\] only"):
        assemble(tmp_path, [names[0], names[2]])


def test_a_tensor_of_another_shape_is_named() -> None:
    model = torch.nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=r"another model .* weight has shape \(3, 5\) there and \(3, 2\) here"):
        load_model_state(model, {"bias": torch.zeros(3), "weight": torch.zeros(3, 5)})
    assert torch.equal(model.weight, before)
