"""A real notebook without a browser: a cell's function runs on each engine and returns its value."""

from __future__ import annotations

import warnings

import nbformat
import pytest
from nbclient import NotebookClient

from tests.launcher.engines import Project

pytestmark = pytest.mark.slow

DEFINE = """
scale = 10

def training_function():
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    total = accelerator.reduce(torch.tensor(float(scale * (accelerator.process_index + 1))))
    return {"sum": total.item(), "ranks": accelerator.num_processes}
"""

# Replaces: from accelerate import notebook_launcher; notebook_launcher(training_function, num_processes=2)
CALL = """
import launcher

value = launcher.launch(training_function, backend="{engine}", cpus=2, name="cell").result()
print(value)
"""


CONFIG = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Optimizer:
    lr: float = 1e-3

@dataclass
class Config:
    steps: int = 3
    optimizer: Optimizer | None = None

def train(ctx, config: Config, factor: int = 1):
    return {"product": config.steps * config.optimizer.lr * factor}
"""

ARGUMENTS = """
import launcher

print(launcher.launch(train, cpus=1, name="values", args=(Config(3, Optimizer(2.0)),), kwargs={"factor": 5}).result())
print(launcher.launch(train, "--steps", "4", "--optimizer.lr", "0.5", cpus=1, name="flags").result())
"""


def execute(project: Project, *sources: str) -> str:
    """Run the cells; return what the last one prints."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(project.folder)}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jupyter's own, about its event loop
        client.execute()
    return "".join(o["text"] for o in notebook.cells[-1].outputs if o.get("name") == "stdout")


def test_a_config_of_a_cell_travels_by_value_and_its_fields_are_flags(local_project: Project) -> None:
    printed = execute(local_project, CONFIG, ARGUMENTS)
    assert "{'product': 30.0}" in printed
    assert "{'product': 2.0}" in printed


def test_a_function_of_a_cell_runs_and_returns(project: Project) -> None:
    printed = execute(project, DEFINE, CALL.format(engine=project.engine))
    assert "{'sum': 30.0, 'ranks': 2}" in printed
    assert project.status("cell")["metrics"] == {"sum": 30.0, "ranks": 2}
