"""The runtimes that ranks compute with: the CPU, CUDA, and two for TPUs (torch_tpu, and torch_xla through accelerate).

All in which they differ is here, a class each, so that nobody else has to ask which one it is.
"""

from __future__ import annotations

import os
import socket
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from training.distributed.cuda_faults import driver_fault, why_no_gpu
from training.distributed.random_state import rng_state, seed_all, set_rng_state
from training.distributed.world import World
from training.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    import torch


class Runtime:
    """The CPU; and the others, as far as they are like it.

    Attributes:
        backend: of the process group.
        fused: AdamW can be one kernel; where not, torch chooses how to compute it.
        any_shape: a batch of a new shape costs nothing; elsewhere a program is compiled for it.
        by_itself: the device works while Python goes on, so that the next batches can be made meanwhile.
        group_first: the device can be used only once the process group is made; elsewhere the group needs the device.
        pins: copies to the device are fast from page-locked memory.
        ddp: DDP averages the gradients; elsewhere the optimizer of accelerate does.
        shards: parameters can be sharded over the ranks (FSDP2).
        precisions: what forward and backward passes can be computed in.
    """

    backend: ClassVar[str] = "gloo"
    fused: ClassVar[bool] = True
    dynamic_shapes: ClassVar[bool] = True
    async_dispatch: ClassVar[bool] = False
    group_first: ClassVar[bool] = False
    pin_memory_by_default: ClassVar[bool] = False
    ddp: ClassVar[bool] = True
    shards: ClassVar[bool] = True
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")

    def device(self, world: World) -> torch.device:
        """The device of the rank that `world` describes. Raises DeviceError if there is none that can be used."""
        import torch

        return torch.device("cpu")

    def init_method(self, world: World) -> str:
        """Where the ranks of the process group meet."""
        host = f"[{world.master_addr}]" if ":" in world.master_addr else world.master_addr  # IPv6
        return f"tcp://{host}:{world.master_port}"

    def check(self, precision: str, *, shard: bool) -> None:
        """Raise ConfigError for what this runtime cannot do."""
        if precision not in self.precisions:
            raise ConfigError(f"--precision {precision} does not exist here; use one of {', '.join(self.precisions)}")
        if shard and not self.shards:
            raise ConfigError("--shard does not work on torch_xla; leave it out, or use torch_tpu or GPUs")

    def submit(self) -> None:
        """Let the device begin with what it was given so far, where it does not by itself."""

    def without_gradients(self) -> AbstractContextManager[Any]:
        """A block in which nothing is kept for a backward pass."""
        import torch

        return torch.inference_mode()

    def seed(self, seed: int) -> None:
        """Seed every random generator of this process."""
        seed_all(seed)

    def rng_state(self) -> dict[str, torch.Tensor]:
        """The state of every random generator of this process, as tensors by name."""
        return rng_state()

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put back what `rng_state` took; a generator that the run had not where it was saved stays as it was seeded."""
        set_rng_state(state)


class Accelerator(Runtime):
    """A device of its own, of which torch has a module (`torch.cuda`, `torch.tpu`)."""

    name: ClassVar[str]
    async_dispatch = True

    def _module(self) -> Any:
        import torch

        return torch.get_device_module(self.name)

    def seed(self, seed: int) -> None:
        super().seed(seed)
        self._module().manual_seed_all(seed)

    def rng_state(self) -> dict[str, torch.Tensor]:
        return {**super().rng_state(), self.name: self._module().get_rng_state()}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        super().set_rng_state(state)
        if self.name in state:
            self._module().set_rng_state(state[self.name])


class Cuda(Accelerator):
    """NVIDIA's GPUs. The local rank indexes the visible ones; where each rank sees only one, it is that."""

    name = "cuda"
    backend = "cpu:gloo,cuda:nccl"
    pin_memory_by_default = True

    def device(self, world: World) -> torch.device:
        import torch

        visible = torch.cuda.device_count()
        # Ranks that see one GPU each were given it by the variable; without it, all see the same one.
        own = visible == 1 and (world.local_world_size == 1 or "CUDA_VISIBLE_DEVICES" in os.environ)
        index = 0 if own else world.local_rank
        needs = f"local rank {world.local_rank} on {socket.gethostname()} needs GPU {index}"
        if index >= visible:
            raise DeviceError(
                f"{needs}, but {visible} are visible: {why_no_gpu(index, visible)}; or ask for fewer GPUs a node, or for"
                " CPU ranks"
            )
        if visible == 1 and not own:
            raise DeviceError(
                f"{world.local_world_size} ranks on {socket.gethostname()} need a GPU each, but 1 is visible to all of them:"
                f" {why_no_gpu(1, 1)}; ask for fewer GPUs a node, or for CPU ranks"
            )
        try:
            torch.cuda.set_device(index)
        except (RuntimeError, AssertionError) as error:
            fault = driver_fault(str(error))
            if not fault:
                raise
            raise DeviceError(f"{needs}, but {fault}; or ask for CPU ranks") from error
        return torch.device("cuda", index)


class TorchTpu(Accelerator):
    """TPUs through torch_tpu: one process a chip, which it finds by the variables that the process was started with."""

    name = "tpu"
    backend = "tpu_dist"
    fused = False
    dynamic_shapes = False
    precisions = ("fp32", "bf16")

    def device(self, world: World) -> torch.device:
        import torch

        _need("torch_tpu")
        return torch.device("tpu")


class TorchXla(Runtime):
    """TPUs through torch_xla. Operations are recorded, and compiled and run when a value is asked for or at `submit`."""

    backend = "xla"
    fused = False
    dynamic_shapes = False
    async_dispatch = True
    group_first = True
    ddp = False
    shards = False
    precisions = ("fp32", "bf16")

    def device(self, world: World) -> torch.device:
        device: torch.device = _need("torch_xla").device()
        return device

    def init_method(self, world: World) -> str:
        _need("torch_xla.distributed.xla_backend")
        return "xla://"  # at MASTER_ADDR, once it has told the chips of each other

    def submit(self) -> None:
        _need("torch_xla").sync()

    def without_gradients(self) -> AbstractContextManager[Any]:
        import torch

        return torch.no_grad()  # its tensors cannot be those of the inference mode

    def seed(self, seed: int) -> None:
        super().seed(seed)
        _need("torch_xla").manual_seed(seed)

    def rng_state(self) -> dict[str, torch.Tensor]:
        import torch

        state = _need("torch_xla.core.xla_model").get_rng_state()
        return {**super().rng_state(), "xla": torch.tensor([state], dtype=torch.uint64)}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        super().set_rng_state(state)
        if "xla" in state:
            _need("torch_xla.core.xla_model").set_rng_state(int(state["xla"].item()))


RUNTIMES: dict[str, Runtime] = {"cpu": Runtime(), "cuda": Cuda(), "tpu": TorchTpu(), "xla": TorchXla()}
"""By `World.device`."""


def _need(module: str) -> Any:
    """Import a TPU runtime.

    Raises:
        ConfigError: it is not installed, so the profile names a runtime that this environment does not have.
        DeviceError: it is, and cannot be loaded on this machine.
    """
    import importlib

    package = module.partition(".")[0]
    other = {"torch_tpu": "torch_xla", "torch_xla": "torch_tpu"}[package]
    host = socket.gethostname()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise DeviceError(
                f"{package} on {host} lacks a part: {error}; install it again where the ranks run"
            ) from error
        raise ConfigError(
            f"{host} has no {package} ({error}); install it where the ranks run, or set "
            f'tpu_runtime = "{other}" in the profile of the cluster'
        ) from None
    except (ImportError, OSError) as error:
        raise DeviceError(f"{package} cannot be loaded on {host}: {error}") from error
