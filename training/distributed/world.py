"""World: the rank, sizes, address and device of one process, given to it by its launcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from training.distributed.visible import visible_devices
from training.errors import ConfigError

DeviceType = Literal["cpu", "cuda", "tpu", "xla"]
"""A device type of torch. TPUs have two: that of torch_tpu (tpu) and that of torch_xla (xla)."""


@dataclass(frozen=True)
class World:
    """The position of one process among all processes of a run. Raises ConfigError for contradictory numbers."""

    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    num_nodes: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # 0 for a single process, which opens no socket
    device: DeviceType = "cpu"
    threads: int = 0  # CPU threads of a rank in one operation; 0 means the default of torch
    attempt: int = 1  # number of the attempt, from 1
    run_id: str = ""

    def __post_init__(self) -> None:
        for index, size in (("rank", "world_size"), ("local_rank", "local_world_size"), ("node_rank", "num_nodes")):
            if not 0 <= getattr(self, index) < getattr(self, size):
                raise ConfigError(
                    f"World: {index}={getattr(self, index)} does not lie below {size}={getattr(self, size)}"
                )
        if self.local_world_size > self.world_size or self.num_nodes > self.world_size:
            raise ConfigError(
                f"World: world_size={self.world_size} is smaller than local_world_size={self.local_world_size} "
                f"or num_nodes={self.num_nodes}"
            )
        if self.world_size > 1 and not 0 < self.master_port < 65536:
            raise ConfigError(
                f"World: {self.world_size} ranks need a master_port from 1 to 65535, not {self.master_port}"
            )
        if self.device not in get_args(DeviceType):
            raise ConfigError(f"World: device={self.device!r} is none of {', '.join(get_args(DeviceType))}")
        if self.threads < 0 or self.attempt < 1:
            raise ConfigError(f"World: threads={self.threads} must be 0 or more and attempt={self.attempt} 1 or more")

    def environment(self) -> dict[str, str]:
        """Return the variables that torchrun sets for a rank, and those by which accelerate selects the device."""
        variables: dict[str, object] = {
            "RANK": self.rank,
            "LOCAL_RANK": self.local_rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "GROUP_RANK": self.node_rank,
            "GROUP_WORLD_SIZE": self.num_nodes,
            "NODE_RANK": self.node_rank,
            "ROLE_NAME": "default",
            "ROLE_RANK": self.rank,
            "ROLE_WORLD_SIZE": self.world_size,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
            "TORCHELASTIC_RESTART_COUNT": self.attempt - 1,
            "TORCHELASTIC_MAX_RESTARTS": self.attempt - 1,
            "TORCHELASTIC_RUN_ID": self.run_id or "none",
        }
        if self.threads:
            variables["OMP_NUM_THREADS"] = self.threads
        if self.device == "cpu":
            variables["ACCELERATE_USE_CPU"] = "true"
        return {name: str(value) for name, value in variables.items()}

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> World:
        """Return the World that torchrun (or `environment`) describes in `env`; a single CPU process by default.

        Raises ConfigError for a variable that is not a whole number.
        """

        def number(default: int, *names: str) -> int:
            for name in names:
                if name in env:
                    try:
                        return int(env[name])
                    except ValueError:
                        raise ConfigError(
                            f"the environment has {name}={env[name]!r}, which is not a whole number"
                        ) from None
            return default

        world_size = number(1, "WORLD_SIZE")
        if world_size > 1 and "RANK" not in env:
            raise ConfigError(
                f"the environment has WORLD_SIZE={world_size} and no RANK, as processes have that Lightning started itself;"
                f" start all of them with launch, or with torchrun --nproc-per-node {world_size}"
            )
        local_world_size = number(1 if world_size == 1 else world_size, "LOCAL_WORLD_SIZE")
        on_cpu = env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        return cls(
            rank=number(0, "RANK"),
            local_rank=number(0, "LOCAL_RANK"),
            node_rank=number(0, "GROUP_RANK", "NODE_RANK"),
            world_size=world_size,
            local_world_size=local_world_size,
            num_nodes=number(max(1, world_size // max(1, local_world_size)), "GROUP_WORLD_SIZE"),
            master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
            master_port=number(0, "MASTER_PORT"),
            device="cpu" if on_cpu or not visible_devices(env.get("CUDA_VISIBLE_DEVICES")) else "cuda",
            threads=number(0, "OMP_NUM_THREADS"),
            attempt=number(0, "TORCHELASTIC_RESTART_COUNT") + 1,
            run_id=env.get("TORCHELASTIC_RUN_ID", ""),
        )
