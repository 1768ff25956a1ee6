"""States as JSON and tensors: what goes in comes out, bit for bit, and what cannot be held is named."""

from __future__ import annotations

import json
import math
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from training.checkpoints.tree import decode, encode
from training.errors import CheckpointError

Pair = namedtuple("Pair", "left right")


def there_and_back(state: Any) -> Any:
    tree, tensors = encode(state, "item")
    return decode(json.loads(json.dumps(tree)), tensors)


@pytest.mark.parametrize(
    "state",
    [
        None, True, False, 0, -(2**70), 1.5, 0.1, 1e-320, "text ü", "", b"\x00\xff", 1 - 2j,
        [], [1, [2.5, None]], (), (1, (2,)), {}, {"a": {"b": [1]}}, {0: "int", (1, 2): "tuple", None: 3, 2.5: 4, True: 5},
        {1, "a"}, ["tensor", "x", "cpu"], ["dict", []], {"list": ["list", 1]}, torch.float32, math.inf, -math.inf,
    ],
    ids=repr,
)  # fmt: skip
def test_plain_values(state: Any) -> None:
    found = there_and_back(state)
    assert found == state
    assert type(found) is type(state)


def test_nan_and_minus_zero() -> None:
    found = there_and_back([math.nan, -0.0])
    assert math.isnan(found[0])
    assert math.copysign(1, found[1]) == -1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 2), torch.tensor(5), torch.zeros(0, 4), torch.tensor([True, False]), torch.randn(4).to(torch.bfloat16),
        torch.randn(3, dtype=torch.complex128), torch.randn(2, dtype=torch.complex64), torch.randn(3, 4).t(),
        torch.tensor([2**63 + 5], dtype=torch.uint64), torch.randn(2, dtype=torch.complex128).conj(),
        torch.randn(4).to(torch.float8_e4m3fn), torch.nn.Parameter(torch.randn(2)),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)  # fmt: skip
def test_tensors(tensor: torch.Tensor) -> None:
    found = there_and_back({"a": [tensor]})["a"][0]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    left, right = (each.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for each in (found, tensor))
    assert torch.equal(left, right)


def test_tensors_are_named_by_their_path_and_those_of_a_model_as_in_its_state() -> None:
    _, tensors = encode(torch.nn.Linear(2, 2).state_dict(), "model")
    assert list(tensors) == ["weight", "bias"]
    _, tensors = encode({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1), 0: torch.ones(2)}, "x")
    assert list(tensors) == ["a.b", "a.b_", "0"]
    assert there_and_back({"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)})["a.b"].item() == 0


@pytest.mark.parametrize(
    "value",
    [np.float32(0.1), np.float64(-0.0), np.int64(-5), np.bool_(True), np.uint64(2**64 - 1), np.float16(math.nan)],
    ids=repr,
)
def test_numbers_of_numpy(value: Any) -> None:
    found = there_and_back(value)
    assert type(found) is type(value)
    assert found.tobytes() == value.tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.array(5),
        np.zeros((0, 2)),
        np.array([1 + 2j]),
        np.array([True]),
        np.array([7], "u2"),
    ],
    ids=repr,
)
def test_arrays(array: Any) -> None:
    found = there_and_back(array)
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert (found == array).all()


def test_a_read_only_array() -> None:
    array = np.arange(3)
    array.flags.writeable = False
    assert there_and_back(array).tolist() == [0, 1, 2]


@pytest.mark.parametrize("state", [OrderedDict(b=1, a=2), defaultdict(int, x=1)], ids=repr)
def test_other_mappings_become_dicts_in_the_same_order(state: Any) -> None:
    assert list(there_and_back(state).items()) == list(state.items())


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"), (len, "builtin_function_or_method"), (Pair(1, 2), "Pair"), (np.array(["a"]), "ndarray"),
        (np.str_("a"), "str_"), (np.array([object()]), "ndarray"), (torch.ones(2).to_sparse(), "Tensor"),
        (torch.ones(2, device="meta"), "Tensor"), (np.datetime64("2020"), "datetime64"), (torch.device("cpu"), "device"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_what_cannot_be_held_is_named_with_its_path(value: Any, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^loader\.a\.1 is of type [\w.]*{kind}, which"):
        encode({"a": [0, value]}, "loader")


def test_a_state_that_contains_itself() -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(CheckpointError, match="nested more than 64 levels"):
        encode(state, "item")


@pytest.mark.parametrize("tree", [["nosuch", 1], {"a": 1}, ["dtype", "save"], ["tensor", 1, 2], []], ids=repr)
def test_what_is_no_saved_state_is_refused(tree: Any) -> None:
    with pytest.raises(CheckpointError, match="no value of a saved state"):
        decode(tree, {})
