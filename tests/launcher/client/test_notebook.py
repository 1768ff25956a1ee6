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


def test_a_function_of_a_cell_runs_and_returns(project: Project) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (DEFINE, CALL.format(engine=project.engine))]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(project.folder)}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jupyter's own, about its event loop
        client.execute()
    printed = "".join(o["text"] for o in notebook.cells[1].outputs if o.get("name") == "stdout")
    assert "{'sum': 30.0, 'ranks': 2}" in printed
    assert project.status("cell")["metrics"] == {"sum": 30.0, "ranks": 2}
