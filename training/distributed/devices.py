"""Runtimes: what differs between the CPU, CUDA, and TPUs (torch_tpu, and torch_xla through accelerate).

A class for each runtime holds all its differences; other modules do not compare device types.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, ClassVar

from training.distributed.cuda_faults import driver_fault, why_no_gpu
from training.distributed.random_state import rng_state, seed_all, set_rng_state
from training.distributed.world import World
from training.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    import torch


class Runtime:
    """The runtime of the CPU, and the base of the others.

    Attributes:
        backend: backend of the process group.
        fused: AdamW can run as one kernel; otherwise torch chooses its implementation.
        dynamic_shapes: batches may differ in shape; otherwise a program is compiled for each shape.
        async_dispatch: the device computes while Python continues, so the next batches can be prepared meanwhile.
        group_first: the process group is created before the device is used; otherwise after it.
        pin_memory_by_default: copies to the device are faster from page-locked memory.
        ddp: DDP averages the gradients; otherwise the optimizer of accelerate does.
        shards: parameters can be sharded over the ranks (FSDP2).
        precisions: precisions of forward and backward passes.
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
        """Return the device of the rank. Raises DeviceError if it is missing or cannot be used."""
        import torch

        return torch.device("cpu")

    def init_method(self, world: World) -> str:
        """Return the rendezvous address of the process group."""
        host = f"[{world.master_addr}]" if ":" in world.master_addr else world.master_addr  # IPv6
        return f"tcp://{host}:{world.master_port}"

    def check(self, precision: str, *, shard: bool) -> None:
        """Raise ConfigError if this runtime does not support the precision, or sharding."""
        if precision not in self.precisions:
            raise ConfigError(
                f"--precision {precision} is not supported by this device; use one of {', '.join(self.precisions)}"
            )
        if shard and not self.shards:
            raise ConfigError("--shard does not work on torch_xla; leave it out, or use torch_tpu or GPUs")

    def connect(self) -> None:
        """Connect this rank to all others, where the process group would do so only at its first collective."""

    def submit(self) -> None:
        """Start the recorded operations on a device that does not start them at once."""

    def average(self, gradients: list[torch.Tensor]) -> None:
        """Average `gradients` over the ranks in place, if DDP does not do it on this device. A collective."""

    def seed(self, seed: int) -> None:
        """Seed every random generator of this process."""
        seed_all(seed)

    def rng_state(self) -> dict[str, torch.Tensor]:
        """Return the state of every random generator of this process, as tensors by name."""
        return rng_state()

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore a state returned by `rng_state`; a generator that is absent from it keeps its seed."""
        set_rng_state(state)


class Accelerator(Runtime):
    """A device with a torch module of its own (`torch.cuda`, `torch.tpu`)."""

    name: ClassVar[str]
    async_dispatch = True

    def _module(self) -> Any:
        import torch

        return torch.get_device_module(self.name)

    def seed(self, seed: int) -> None:
        """Seed the generators of the host and of the device."""
        super().seed(seed)
        self._module().manual_seed_all(seed)

    def rng_state(self) -> dict[str, torch.Tensor]:
        """Return the state of the generators of the host and of the device."""
        return {**super().rng_state(), self.name: self._module().get_rng_state()}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the generators of the host and, if saved, of the device."""
        super().set_rng_state(state)
        if self.name in state:
            self._module().set_rng_state(state[self.name])


class Cuda(Accelerator):
    """NVIDIA GPUs. The local rank indexes the visible GPUs, or the rank uses the only GPU that it sees."""

    name = "cuda"
    backend = "cpu:gloo,cuda:nccl"
    pin_memory_by_default = True

    def connect(self) -> None:
        """Make NCCL's communicator, by a collective: NCCL has no time limit for it, and the launcher has one."""
        import torch
        import torch.distributed as dist

        one = torch.ones(1, device=torch.device(self.name, self._module().current_device()))
        dist.all_reduce(one)
        one.item()

    def device(self, world: World) -> torch.device:
        """Return the device of the rank. Raises DeviceError if it is missing or cannot be used."""
        import torch

        visible = torch.cuda.device_count()
        # With the variable, one visible GPU belongs to this rank; without it, all ranks see the same GPU.
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
    """TPUs through torch_tpu: one process for each chip, selected by environment variables."""

    name = "tpu"
    backend = "tpu_dist"
    fused = False
    dynamic_shapes = False
    precisions = ("fp32", "bf16")

    def device(self, world: World) -> torch.device:
        """Return the device of the rank. Raises DeviceError if it is missing or cannot be used."""
        import torch

        _need("torch_tpu")
        return torch.device("tpu")


class TorchXla(Runtime):
    """TPUs through torch_xla. Recorded operations are compiled and run at `submit`, or when a value is read."""

    backend = "xla"
    fused = False
    dynamic_shapes = False
    async_dispatch = True
    group_first = True
    ddp = False
    shards = False
    precisions = ("fp32", "bf16")

    def device(self, world: World) -> torch.device:
        """Return the device of the rank. Raises DeviceError if it is missing or cannot be used."""
        device: torch.device = _need("torch_xla").device()
        return device

    def init_method(self, world: World) -> str:
        """Return the rendezvous address of the process group."""
        _need("torch_xla.distributed.xla_backend")
        return "xla://"  # at MASTER_ADDR, with the topology of the TPU runtime

    def submit(self) -> None:
        _need("torch_xla").sync()

    def average(self, gradients: list[torch.Tensor]) -> None:
        """Average `gradients` over the ranks in place; the graph of the step then holds it."""
        scale = 1.0 / _need("torch_xla.runtime").world_size()
        _need("torch_xla.core.xla_model").all_reduce("sum", gradients, scale=scale)

    def seed(self, seed: int) -> None:
        """Seed the generators of the host and of the device."""
        super().seed(seed)
        _need("torch_xla").manual_seed(seed)

    def rng_state(self) -> dict[str, torch.Tensor]:
        """Return the state of the generators of the host and of the device."""
        import torch

        state = _need("torch_xla.core.xla_model").get_rng_state()
        return {**super().rng_state(), "xla": torch.tensor([state], dtype=torch.uint64)}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore the generators of the host and, if saved, of the device."""
        super().set_rng_state(state)
        if "xla" in state:
            _need("torch_xla.core.xla_model").set_rng_state(int(state["xla"].item()))


RUNTIMES: dict[str, Runtime] = {"cpu": Runtime(), "cuda": Cuda(), "tpu": TorchTpu(), "xla": TorchXla()}
"""Runtimes by `World.device`."""


def _need(module: str) -> Any:
    """Import a TPU runtime.

    Raises:
        ConfigError: it is not installed in this environment.
        DeviceError: it is installed and cannot be loaded on this machine.
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
