"""The record of a run's environment."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from launcher.agent.health import environment_record


def test_the_record_can_be_kept_and_names_what_counts() -> None:
    found = json.loads(json.dumps(environment_record.record()))
    assert found["packages"]["submitit"] == metadata.version("submitit")
    assert found["executable"] == sys.executable
    assert found["cores"]
    assert set(environment_record.PACKAGES) <= set(found["packages"])


def test_secrets_stay_where_they_are() -> None:
    variables = {
        "SLURM_JOB_ID": "7",
        "RAY_ADDRESS": "10.0.0.1:6379",
        "HF_HOME": "/hub",
        "HF_TOKEN": "hf_abc",
        "NCCL_API_KEY": "k",
        "https_proxy": "http://me:secret@proxy:3128",
        "MY_PASSWORD": "x",
        "HOME": "/home/me",
    }
    assert environment_record.chosen(variables) == {
        "HF_HOME": "/hub",
        "HF_TOKEN": "<not recorded>",
        "NCCL_API_KEY": "<not recorded>",
        "RAY_ADDRESS": "10.0.0.1:6379",
        "SLURM_JOB_ID": "7",
        "https_proxy": "http://proxy:3128",
    }


def test_it_lies_in_the_run_directory(tmp_path: Path) -> None:
    environment_record.leave(tmp_path)
    assert json.loads((tmp_path / "environment.json").read_text())["python"] == sys.version


def test_it_costs_no_import() -> None:
    code = "import sys; from launcher.agent.health import environment_record; environment_record.record(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
