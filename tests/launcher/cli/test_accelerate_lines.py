"""Configuration files of accelerate: a program observes what it does under ``accelerate launch``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli.foreign.accelerate import ask
from launcher.cli.launch import parse_request
from launcher.errors import BadRequest

SHOW = (
    "import json, os, sys\nopen(sys.argv[1] + os.environ.get('RANK', '0'), 'w').write(json.dumps(dict(os.environ)))\n"
)

FILES = {
    "one process": (
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\nuse_cpu: true\ndebug: true\n"
        "num_processes: 1\nnum_machines: 1\ndynamo_config:\n  dynamo_backend: EAGER\n  dynamo_mode: default\n"
    ),
    "sharded": (
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 2\n"
        "num_machines: 1\nmain_process_ip: 127.0.0.1\nuse_cpu: false\nfsdp_config:\n  fsdp_version: 2\n"
        "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n  fsdp_reshard_after_forward: true\n  fsdp_state_dict_type: SHARDED_STATE_DICT\n"
    ),
}
PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_", "DEEPSPEED_", "MEGATRON_", "KMP_", "OMP_")


def observed(file: Path) -> dict[str, str]:
    return {k: v for k, v in json.loads(file.read_text()).items() if k.startswith(PREFIXES)}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_environment_is_that_of_accelerate(name: str, tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "acc.yaml").write_text(FILES[name])
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "XDG_STATE_HOME": str(tmp_path / "state")}
    scripts = Path(sys.executable).parent
    theirs = [str(scripts / "accelerate"), "launch", "--config_file", "acc.yaml", "show.py", "theirs"]
    ours = [str(scripts / "launch"), "--config_file", "acc.yaml", "show.py", str(tmp_path / "ours")]
    for command in (theirs, ours):
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    expected, found = observed(tmp_path / "theirs0"), observed(tmp_path / "ours0")
    cpu, ours_cpu = expected.pop("ACCELERATE_USE_CPU", "False"), found.pop("ACCELERATE_USE_CPU")
    assert (ours_cpu, cpu == "True") == ("true", name == "one process"), "our ranks are on the CPU here in any case"
    assert expected.items() <= found.items()
    added = found.keys() - expected.keys()
    assert added <= {"OMP_WAIT_POLICY"}
    assert (tmp_path / "ours1").exists() == (tmp_path / "theirs1").exists() == (name == "sharded")


@pytest.mark.slow
def test_any_option_of_accelerate_has_its_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = [
        "accelerate",
        "launch",
        "--use_fsdp",
        "--fsdp_version",
        "2",
        "--num_processes",
        "4",
        "-m",
        "pkg.train",
        "--lr",
        "1",
    ]
    spec, _ = parse_request(["--nodes", "2", *line])
    assert (spec.ranks, spec.nodes, spec.target, spec.args) == (4, 2, "-m pkg.train", ("--lr", "1"))
    assert {"environment.ACCELERATE_USE_FSDP=true", "environment.FSDP_VERSION=2"} <= set(spec.settings)
    (tmp_path / "acc.yaml").write_text(FILES["sharded"].replace("num_machines: 1", "num_machines: 2"))
    line_read = ask(["--config_file", "acc.yaml", "train.py"])
    assert (line_read.processes, line_read.machines, line_read.program) == (2, 2, ["train.py"])
    with pytest.raises(BadRequest, match=r"accelerate launch: .*--frobnicate"):
        ask(["--frobnicate", "train.py"])
    with pytest.raises(BadRequest, match=r"accelerate launch: .*nosuch.yaml"):
        ask(["--config_file", "nosuch.yaml", "train.py"])
