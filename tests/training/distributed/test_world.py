from __future__ import annotations

import subprocess
import sys

import pytest

from training.distributed.world import World
from training.errors import ConfigError


def test_the_environment_and_back() -> None:
    world = World(5, 1, 1, 8, 4, 2, "10.0.0.1", 1234, "cpu", 3, 2, "run")
    assert World.from_environment(world.environment()) == world
    env = world.environment()
    assert env["TORCHELASTIC_RESTART_COUNT"] == "1"
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["ACCELERATE_USE_CPU"] == "true"
    assert "ACCELERATE_USE_CPU" not in World(device="cuda").environment()
    assert "OMP_NUM_THREADS" not in World().environment()


def test_an_empty_environment_is_one_cpu_process() -> None:
    assert World.from_environment({}) == World()
    assert World.from_environment({"CUDA_VISIBLE_DEVICES": "0"}).device == "cuda"


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"rank": 1}, "rank=1 does not lie below world_size=1"),
        ({"local_rank": -1}, "local_rank=-1"),
        ({"node_rank": 3}, "node_rank=3"),
        ({"local_world_size": 2}, "world_size=1 is smaller"),
        ({"world_size": 2, "master_port": 0}, "need a master_port"),
        ({"device": "gpu"}, "none of cpu, cuda, tpu"),
        ({"attempt": 0}, "attempt=0"),
    ],
)
def test_facts_that_contradict(facts: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        World(**facts)  # type: ignore[arg-type]


def test_a_variable_that_is_no_number() -> None:
    with pytest.raises(ConfigError, match="RANK='one'"):
        World.from_environment({"RANK": "one"})


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, training, training.distributed.world, training.errors, training.files, training.flags, training.context, "
        "training.train; from training.train import TrainConfig, check; check(TrainConfig()); "
        "print([m for m in ('torch', 'numpy', 'transformers', 'datasets', 'accelerate', 'evaluate', 'pyarrow', "
        "'fsspec', 'tqdm', 'sklearn') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
