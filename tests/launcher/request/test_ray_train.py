"""Functions that are written for Ray Train are recognised from their source, before anything is sent."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import BadRequest
from launcher.request.ray_train import refuse_train_function, refuse_train_object
from tests.launcher.engines import COMMAND

LOOP = """
import ray.train
def train_loop_per_worker(config):
    for epoch in range(config["epochs"]):
        ray.train.report({"loss": 1.0})
"""


@pytest.mark.parametrize(
    "source",
    [
        "import ray.train\ndef f(config): ray.train.report({})",
        "import ray\ndef f(config):\n    rank = ray.train.get_context().get_world_rank()",
        "from ray import train\ndef f(config): train.report({})",
        "from ray import train as t\ndef f(): t.get_checkpoint()",
        "import ray.train as rt\ndef f(config): rt.get_dataset_shard('train')",
        "from ray.train import report\ndef f(config):\n    if config:\n        with open('x') as y: report({})",
        "from ray.train.torch import prepare_model as prepared\ndef f(config): model = prepared(config['model'])",
        "import ray.train.torch\ndef f(config): return [ray.train.torch.prepare_data_loader(x) for x in config]",
        "def f(config):\n    from ray import train\n    train.report({})",
        "from ray.train.lightning import RayDDPStrategy\ndef f(config): trainer(strategy=RayDDPStrategy())",
        "import ray.train\ndef step(loss): ray.train.report(loss)\ndef f(config): step(1)",
        "from ray.air import session\ndef f(config): session.report({})",
    ],
)
def test_a_train_function_is_refused(source: str) -> None:
    with pytest.raises(BadRequest, match=r"f is written for Ray Train: line \d+ calls .*num_workers=0"):
        refuse_train_function(ast.parse(source), "f")


@pytest.mark.parametrize(
    "source",
    [
        "import ray.train\ndef f(ctx, config): ray.train.report({})",
        "import ray.train\ndef f(run: 'training.context.Context'): ray.train.report({})",
        "import ray.train\ndef f():\n    try: ray.train.report({})\n    except RuntimeError: pass",
        "import ray.train\ndef loop(config): ray.train.report({})\ndef f(): TorchTrainer(loop, num_workers=0).fit()",
        "import ray.train\ndef f():\n    def loop(config): ray.train.report({})\n    TorchTrainer(loop).fit()",
        "import ray.train\ndef f(): return ray.train.ScalingConfig(num_workers=0)",
        "from mine import train\ndef f(config): train.report({})",
        "from . import train\ndef f(config): train.report({})",
        "def report(x): ...\ndef f(config): report({})",
        "import ray.train\ndef other(config): ray.train.report({})\ndef f(config): ...",
        "import ray.train\nf = make()",
        "def f(config): f(config)",
    ],
)
def test_other_functions_are_left_alone(source: str) -> None:
    refuse_train_function(ast.parse(source), "f")


def test_the_command_refuses_it_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "fit.py").write_text(LOOP)
    done = subprocess.run(
        [*COMMAND, "--backend", "local", "fit:train_loop_per_worker"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "train_loop_per_worker is written for Ray Train: line 5 calls ray.train.report()" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_function_from_python_is_refused_too(tmp_path: Path) -> None:
    program = tmp_path / "notebook.py"
    program.write_text(f"{LOOP}\nimport launcher\nlauncher.launch(train_loop_per_worker, cpus=1, backend='local')\n")
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert "BadRequest: train_loop_per_worker is written for Ray Train" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_function_without_source_passes() -> None:
    refuse_train_object(print)
    refuse_train_object(eval("lambda config: 1"))
