"""The state of a rank at the first line of its program: environment, imports and `__main__`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.engines import Project

pytestmark = pytest.mark.slow

HELPER = """
import os, queue, tempfile, threading, uuid
RANK = int(os.environ.get("RANK", 0))
FOLDER, ID = tempfile.mkdtemp(), uuid.uuid4().hex
jobs = queue.Queue()
def drain():
    while True:
        jobs.get()
        jobs.task_done()
threading.Thread(target=drain, daemon=True).start()
"""

PROGRAM = """
import os, sys
early = sorted({"torch", "numpy", "multiprocessing", "huggingface_hub"} & set(sys.modules))
os.environ["HF_HOME"] = "/nowhere/of-the-script"
import json, multiprocessing, helper
from huggingface_hub import constants
if len(sys.argv) > 5:
    import breaks
def never():
    import breaks

class Item:
    def __init__(self, n): self.n = n

def make(n):
    return Item(n)

if __name__ == "__main__":
    import numpy, torch, threadpoolctl
    helper.jobs.put(1)
    helper.jobs.join()
    pooled = {}
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            pooled[method] = [type(i) is Item and i.n for i in pool.map(make, [1, 2])]
    loader = torch.utils.data.DataLoader([1.0, 2.0], num_workers=1, multiprocessing_context="spawn")
    main = sys.modules["__main__"]
    found = {
        "rank": helper.RANK, "early": early, "hub": constants.HF_HOME, "pooled": pooled,
        "loaded": [batch.item() for batch in loader],
        "main": [main.Item is Item, sys.modules["__mp_main__"] is main, __spec__ is None,
                 os.path.basename(__file__), os.path.basename(sys.argv[0]),
                 sys.path[0] == os.path.dirname(__file__), sys.argv[1:]],
        "blas": sorted({p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"}),
        "torch": torch.get_num_threads(),
        "omp": os.environ["OMP_NUM_THREADS"], "world": os.environ["WORLD_SIZE"],
        "agent store": os.environ["TORCHELASTIC_USE_AGENT_STORE"],
        "gpus": torch.cuda.is_available(),
    }
    own = {"folder": helper.FOLDER, "id": helper.ID,
           "slurm": {k: v for k, v in os.environ.items() if k in
                     ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")}}
    with open(os.path.join(os.environ["OBSERVED"], f"{helper.RANK}.json"), "w") as file:
        json.dump([found, own], file)
"""


def observe(folder: Path) -> list[Any]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def write(project: Project) -> None:
    (project.folder / "helper.py").write_text(HELPER)
    (project.folder / "breaks.py").write_text("raise RuntimeError('imported')")
    (project.folder / "observes.py").write_text(PROGRAM)
    (project.folder / "observed.toml").write_text(
        f'extends = "{project.engine}"\n[environment]\nOBSERVED = "{project.folder}"\n'
    )


def test_a_script_observes_its_own_environment_and_main(project: Project) -> None:
    write(project)
    project.call("--cluster", "./observed.toml", "--cpus", "2", "--name", "o", "observes.py", "a", "--b")
    ranks = observe(project.folder)
    for rank, (found, own) in enumerate(ranks):
        assert found == {
            "rank": rank, "early": [], "hub": "/nowhere/of-the-script", "loaded": [1.0, 2.0],
            "pooled": {method: [1, 2] for method in ("fork", "spawn", "forkserver")},
            "main": [True, True, True, "observes.py", "observes.py", True, ["a", "--b"]],
            "blas": [1], "torch": 1, "omp": "1", "world": "2", "agent store": "True", "gpus": False,
        }  # fmt: skip
        if project.engine == "slurm":
            assert own["slurm"]["SLURM_PROCID"] == str(rank)
            assert own["slurm"]["SLURM_NTASKS"] == own["slurm"]["SLURM_STEP_NUM_TASKS"] == "2"
    assert ranks[0][1]["folder"] != ranks[1][1]["folder"]
    assert ranks[0][1]["id"] != ranks[1][1]["id"]


def test_as_under_torchrun_in_a_shell_with_variables_of_its_own(
    local_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(local_project)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    arguments = ["observes.py", "a"]
    theirs = local_project.folder / "theirs"
    theirs.mkdir()
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", *arguments],
        cwd=local_project.folder, env=os.environ | {"OBSERVED": str(theirs), "CUDA_VISIBLE_DEVICES": ""}, check=True,
        timeout=240,
    )  # fmt: skip
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "no"), ("RANK", "7"), ("WORLD_SIZE", "9")):
        monkeypatch.setenv(name, value)
    local_project.call("--cluster", "./observed.toml", "--cpus", "2", "--name", "o", *arguments)
    ours = observe(local_project.folder)
    assert [found for found, _ in ours] == [found for found, _ in observe(theirs)]
