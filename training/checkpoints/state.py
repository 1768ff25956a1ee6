"""Convert the state of an optimizer to named tensors and JSON values, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def split_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's state_dict into tensors, named `<parameter>.<field>`, and JSON values."""
    import torch

    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for parameter, fields in state["state"].items():
        for field, value in fields.items():
            (tensors if isinstance(value, torch.Tensor) else values)[f"{parameter}.{field}"] = value
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def join_optimizer(tensors: Mapping[str, torch.Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    """Restore a state_dict from the results of `split_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **plain["values"]}.items():
        parameter, _, field = name.partition(".")
        state.setdefault(int(parameter), {})[field] = value
    return {"state": state, "param_groups": plain["param_groups"]}
