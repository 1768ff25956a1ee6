"""The record of a run's environment."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from launcher.agent.health import environment_record


def test_the_record_can_be_kept_and_names_what_counts() -> None:
    found = json.loads(json.dumps(environment_record.record()))
    assert found["packages"]["submitit"] == metadata.version("submitit")
    assert found["executable"] == sys.executable
    assert found["cores"]
    assert set(environment_record.PACKAGES) <= set(found["packages"])


def test_what_is_recorded() -> None:
    variables = {
        "SLURM_JOB_ID": "7",
        "RAY_ADDRESS": "10.0.0.1:6379",
        "HF_HOME": "/hub",
        "NCCL_IB_HCA": "^mlx5_0:1",
        "OMP_PLACES": "{0}",
    }
    assert environment_record.chosen(variables) == variables


@pytest.mark.parametrize(
    "name",
    [
        *(
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "WANDB_API_KEY",
            "SLURM_JWT",
            "SLURM_SACK_KEY",
            "MY_PASSWORD",
            "DB_PW",
            "SSH_KEY",
        ),
        *(
            "RAY_RUNTIME_ENV_CREATE",
            "RAY_JOB_CONFIG_JSON_ENV_VAR",
            "RAY_AUTH_TOKEN",
            "RAY_REDIS_PASSWORD",
            "NCCL_API_KEY",
        ),
        *(
            "TORCH_CREDENTIALS",
            "TPU_X",
            "HF_ANYTHING_NEW",
            "SLURM_ANYTHING_NEW",
            "CUDA_ANYTHING_NEW",
            "RAY_ANYTHING_NEW",
        ),
        *(
            "UCX_TLS_PASSPHRASE",
            "FI_AUTH",
            "MKL_LOGIN",
            "GLOO_SECRET",
            "HOME",
            "PATH",
            "AWS_SECRET_ACCESS_KEY",
            "nccl_x",
        ),
    ],
)
def test_what_is_not_on_the_list_is_not_recorded(name: str) -> None:
    assert environment_record.chosen({name: "swordfish"}) == {}


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("http://me:swordfish@proxy:3128", "http://proxy:3128"),
        ("http://me:sword/fish@proxy:3128/", "http://proxy:3128"),
        ("http://me:sword@fish@proxy:3128", "http://proxy:3128"),
        ("me:swordfish@proxy:3128", "proxy:3128"),
        ("socks5h://proxy:1080/?key=swordfish", "socks5h://proxy:1080"),
        ("http://me:://swordfish@proxy:3128", "proxy:3128"),
        ("proxy", "proxy"),
    ],
)
def test_a_proxy_is_recorded_without_its_password(value: str, kept: str) -> None:
    for name in environment_record.PROXIES:
        assert environment_record.chosen({name: value}) == {name: kept}
    assert "swordfish" not in environment_record.chosen({"HF_ENDPOINT": f"https://{value}"})["HF_ENDPOINT"]


def test_it_lies_in_the_run_directory(tmp_path: Path) -> None:
    environment_record.leave(tmp_path)
    file = tmp_path / "environment.json"
    assert json.loads(file.read_text())["python"] == sys.version
    assert file.stat().st_mode & 0o777 == 0o600


def test_it_costs_no_import() -> None:
    code = "import sys; from launcher.agent.health import environment_record; environment_record.record(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
