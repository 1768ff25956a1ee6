"""``python torch_tpu_env.py FOLDER CHIPS JSON``: print the result of torch_tpu's `set_tpu_launch_env(**JSON)`.

FOLDER holds its Python files, unchanged. Without a TPU the package cannot be imported, because its C++ part loads libtpu.
This program replaces that part: variables, free ports (7001, 7002, ...), and the number of CHIPS.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

TOPOLOGIES = {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"}  # from torch_tpu, for v5e and v6e


def module(name: str, **content: Any) -> None:
    made = types.ModuleType(name)
    made.__path__ = []
    made.__dict__.update(content)
    bind(name, made)


def bind(name: str, made: types.ModuleType) -> None:
    sys.modules[name] = made
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, made)


def real(name: str, folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, folder / (name.replace(".", "/") + ".py"))
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    bind(name, made)
    spec.loader.exec_module(made)
    return made


def main(folder: Path, chips: int, arguments: dict[str, Any]) -> dict[str, str]:
    ports = iter(range(7001, 7100))
    for name in ("torch", "torch.tpu", "torch.tpu.distributed", "torch_tpu", "torch_tpu._internal", "absl"):
        module(name)
    module("absl.logging", info=print_nothing, warning=print_nothing)
    module("portpicker", pick_unused_port=lambda: next(ports))
    module("immutabledict", immutabledict=dict)
    module("torch_tpu._internal.utils")
    module("torch_tpu._internal.utils.annotations", experimental=lambda *_: lambda function: function)
    module("torch_tpu._internal.distributed")
    module("torch_tpu._internal.distributed.multiprocessing", init_spawn=lambda: None)
    module(
        "torch_tpu._internal.env",
        get_str_env_once=lambda name, default_value=None: os.environ.get(name, default_value),
        get_int_env_once=lambda name, default_value=None: int(os.environ.get(name) or default_value or 0),
    )
    real("torch_tpu._internal.env_utils", folder)
    hardware = real("torch_tpu._internal.utils.hardware", folder)
    hardware._scan_pci_tpus = lambda: (chips, TOPOLOGIES if chips else None)
    os.environ["TORCH_TPU_XPROF_SESSION_ID"] = "session"
    before = dict(os.environ)
    real("torch_tpu._internal.distributed.distributed", folder).set_tpu_launch_env(**arguments)
    return {name: value for name, value in sorted(os.environ.items()) if before.get(name) != value}


def print_nothing(*_: Any) -> None:
    """Replacement of absl's logging."""


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))))
