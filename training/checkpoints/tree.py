"""Convert nested states to named tensors and JSON, the two kinds that a checkpoint holds, and back. Nothing is pickled.

A value is written as JSON itself if JSON has it; the others as a list with a tag:

    ["list", [...]]  ["tuple", [...]]  ["set", [...]]  ["dict", [[key, value], ...]]  ["float", "nan"]  ["bytes", base64]
    ["tensor", name, device]  ["complex tensor", name, device, dtype]  ["array", tensor, shape]  ["scalar", dtype, value]
    ["complex", real, imaginary]  ["dtype", "float32"]
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from training.checkpoints.host_memory import without_collection
from training.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_DEPTH = 64
"""Levels of containers inside each other that can be saved; a state that contains itself has more."""


def encode(state: Any, name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return `state` as a JSON value and tensors by name; the tensors are those of the state, and not copies.

    A tensor is named after its path of keys in the state. Raises CheckpointError, naming the path that begins with `name`,
    for a value that cannot be saved without pickle.
    """
    encoder = _Encoder(name)
    with without_collection():
        return encoder.encode(state, ()), encoder.tensors


class _Encoder:
    """Encodes one state; see `encode`."""

    def __init__(self, name: str) -> None:
        import numpy as np
        import torch

        self.np, self.torch = np, torch  # an import in each call would take longer than the rest of it
        self.name = name
        self.tensors: dict[str, torch.Tensor] = {}

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        """Return `value` as a JSON value; add its tensors."""
        kind = type(value)
        if kind in (bool, str, int) or value is None:  # the usual ones first: a state may have ten thousand of them
            return value
        if isinstance(value, self.torch.Tensor):
            return self._tensor(value, path)
        if kind is dict:
            return self._dict(value, path)
        if kind is list:
            return ["list", [self._inner(number, item, path) for number, item in enumerate(value)]]
        return self._other(value, path)

    def _other(self, value: Any, path: tuple[str, ...]) -> Any:
        np, torch = self.np, self.torch
        match value:
            case np.generic():
                return _scalar(value, self.name, path)
            case float():
                return value if math.isfinite(value) else ["float", repr(float(value))]
            case complex():
                return ["complex", repr(value.real), repr(value.imag)]
            case bytes():
                return ["bytes", base64.b64encode(value).decode()]
            case np.ndarray() if value.dtype.kind in "biufc":
                tensor = torch.from_numpy(np.array(value, order="C"))
                return ["array", self._tensor(tensor, path), list(value.shape)]
            case torch.dtype():
                return ["dtype", str(value).removeprefix("torch.")]
            case Mapping():
                return self._dict(value, path)
            case list():
                return ["list", [self._inner(number, item, path) for number, item in enumerate(value)]]
            case tuple() if not hasattr(value, "_fields"):
                return ["tuple", [self._inner(number, item, path) for number, item in enumerate(value)]]
            case set() | frozenset():
                items = sorted(value, key=repr)
                return ["set", [self._inner(number, item, path) for number, item in enumerate(items)]]
        raise _refused(value, self.name, path)

    def _dict(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        pairs = []
        for key in value:
            written = key if type(key) is str else self._inner("key", key, path)
            pairs.append([written, self._inner(key, value[key], path)])
        return ["dict", pairs]

    def _inner(self, key: Any, item: Any, path: tuple[str, ...]) -> Any:
        if len(path) >= MAX_DEPTH:
            raise CheckpointError(
                f"{_where(self.name, path[:4])}...: the state is nested more than {MAX_DEPTH} levels deep"
            )
        return self.encode(item, (*path, str(key)))

    def _tensor(self, value: torch.Tensor, path: tuple[str, ...]) -> list[Any]:
        tensor = value.detach()
        device = "cpu" if tensor.device.type == "cpu" else "accelerator"
        if tensor.layout is not self.torch.strided or tensor.is_quantized or tensor.device.type == "meta":
            raise _refused(value, self.name, path)
        if tensor.is_complex():
            kind = str(tensor.dtype).removeprefix("torch.")
            return [
                "complex tensor",
                self._add(self.torch.view_as_real(tensor.resolve_conj()), path),
                device,
                kind,
            ]
        return ["tensor", self._add(tensor.resolve_neg(), path), device]

    def _add(self, tensor: torch.Tensor, path: tuple[str, ...]) -> str:
        full = ".".join(path) or "value"
        while full in self.tensors:
            full += "_"
        self.tensors[full] = tensor
        return full


def _scalar(value: Any, name: str, path: tuple[str, ...]) -> list[Any]:
    """A number of numpy; every kind is written as text that gives the same bits."""
    if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
        raise _refused(value, name, path)
    item = value.item()
    return ["scalar", value.dtype.name, repr(item) if isinstance(item, float) else item]


def _refused(value: Any, name: str, path: tuple[str, ...]) -> CheckpointError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return CheckpointError(
        f"{_where(name, path)} is of type {kind}, which a checkpoint cannot hold without pickle; let its state_dict return"
        " tensors, arrays, numbers, strings, and lists, tuples and dicts of these"
    )


def _where(name: str, path: tuple[str, ...]) -> str:
    return ".".join((name, *path))[:200]


def decode(value: Any, tensors: Mapping[str, torch.Tensor], device: torch.device | str = "cpu") -> Any:
    """Return what `encode` took apart; tensors that were on an accelerator are put on `device`.

    Raises CheckpointError for a value that `encode` does not write.
    """
    import numpy as np
    import torch

    def inner(item: Any) -> Any:
        return decode(item, tensors, device)

    match value:
        case None | bool() | int() | float() | str():
            return value
        case ["list", [*items]]:
            return [inner(item) for item in items]
        case ["tuple", [*items]]:
            return tuple(inner(item) for item in items)
        case ["set", [*items]]:
            return {inner(item) for item in items}
        case ["dict", [*items]]:
            return {inner(key): inner(item) for key, item in items}
        case ["float", str(text)]:
            return float(text)
        case ["complex", str(real), str(imaginary)]:
            return complex(float(real), float(imaginary))
        case ["bytes", str(text)]:
            return base64.b64decode(text)
        case ["tensor", str(name), str(kind)]:
            return tensors[name] if kind == "cpu" else tensors[name].to(device)
        case ["complex tensor", str(name), str(kind), str(_)]:
            tensor = torch.view_as_complex(tensors[name])
            return tensor if kind == "cpu" else tensor.to(device)
        case ["array", tensor, [*shape]]:
            return inner(tensor).numpy().reshape(shape)
        case ["scalar", str(kind), number]:
            return np.dtype(kind).type(float(number) if isinstance(number, str) else number)
        case ["dtype", str(kind)] if isinstance(getattr(torch, kind, None), torch.dtype):
            return getattr(torch, kind)
    raise CheckpointError(f"{str(value)[:80]} is no value of a saved state")
