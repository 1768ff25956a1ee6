"""A real notebook without a browser: a cell's function runs on each engine and returns its value."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.launcher.engines import Project, until

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


def notebook_of(project: Project, *sources: str) -> tuple[NotebookClient, Any]:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    folder = {"metadata": {"path": str(project.folder)}}
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources=folder, allow_errors=True)
    return client, notebook.cells[-1]


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jupyter's own, about its event loop
        yield
        gc.collect()  # and about sockets that it leaves


def printed(cell: Any, name: str = "stdout") -> str:
    return "".join(o["text"] for o in cell.outputs if o.get("name") == name)


def execute(project: Project, *sources: str) -> str:
    """Run the cells; return what the last one prints."""
    client, cell = notebook_of(project, *sources)
    with quiet():
        asyncio.run(client.async_execute())
    assert not [o for o in cell.outputs if o.output_type == "error"]
    return printed(cell)


@contextmanager
def running(project: Project, *sources: str) -> Iterator[tuple[NotebookClient, Any]]:
    """Run the cells in a thread; yield the client and the last cell, whose outputs grow."""
    client, cell = notebook_of(project, *sources)
    thread = threading.Thread(target=lambda: asyncio.run(client.async_execute()))
    with quiet():
        thread.start()
        try:
            yield client, cell
        finally:
            thread.join(120)
    assert not thread.is_alive()


SHOWS_A_BAR = """
def shows():
    import pathlib, time
    for done in (1, 2):
        print(f"\\r{done}/2 done", end="", flush=True)
        while not pathlib.Path(f"go-{done}").exists():
            time.sleep(0.01)
    print("\\nthe end \\x1b]0;title\\x07", end="")
"""


def test_a_bar_is_shown_while_the_cell_runs(local_project: Project) -> None:
    call = "import launcher\nlauncher.launch(shows, cpus=1, name='cell')"
    with running(local_project, SHOWS_A_BAR, call) as (_, cell):
        for done in (1, 2):
            until(lambda done=done: f"{done}/2 done" in printed(cell), "the bar is shown")  # type: ignore[misc]
            assert f"{done + 1}/2" not in printed(cell)
            (local_project.folder / f"go-{done}").touch()
    assert "the end" in printed(cell)
    assert "title" not in printed(cell)
    assert local_project.status("cell")["state"] == "succeeded"


def test_the_interrupt_of_the_cell_stops_the_run(local_project: Project) -> None:
    waits = "def waits():\n    import time\n    print('waiting', flush=True)\n    while True:\n        time.sleep(0.01)"
    with running(local_project, waits, "import launcher\nlauncher.launch(waits, cpus=1, name='cell')") as (
        client,
        cell,
    ):
        until(lambda: "waiting" in printed(cell), "the function runs")
        asyncio.run(client.km.interrupt_kernel())
    assert local_project.status("cell")["state"] == "stopped"
    assert "RunStopped" in [o.get("ename") for o in cell.outputs]


def test_a_traceback_has_the_lines_of_the_cell(local_project: Project) -> None:
    helper = "def helper(value):\n    raise ValueError(value)  # of the first cell"
    fails = "def fails():\n    helper(41)  # of the second cell"
    client, cell = notebook_of(
        local_project, helper, fails, "import launcher\nlauncher.launch(fails, cpus=1, name='cell')"
    )
    with quiet():
        asyncio.run(client.async_execute())
    log = "\n".join(local_project.logs("cell"))
    assert "raise ValueError(value)  # of the first cell" in log
    assert "helper(41)  # of the second cell" in log
    [error] = [o for o in cell.outputs if o.output_type == "error"]
    assert "# of the first cell" in error["evalue"]


def test_a_config_of_a_cell_travels_by_value_and_its_fields_are_flags(local_project: Project) -> None:
    shown = execute(local_project, CONFIG, ARGUMENTS)
    assert "{'product': 30.0}" in shown
    assert "{'product': 2.0}" in shown


def test_a_function_of_a_cell_runs_and_returns(project: Project) -> None:
    shown = execute(project, DEFINE, CALL.format(engine=project.engine))
    assert "{'sum': 30.0, 'ranks': 2}" in shown
    assert project.status("cell")["metrics"] == {"sum": 30.0, "ranks": 2}
