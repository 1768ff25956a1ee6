"""accelerate's configuration file, as its own command writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.cli.foreign.accelerate_config import settings_without_effect
from tests.launcher.engines import Project


def test_a_file_that_accelerate_writes_by_default_says_nothing(tmp_path: Path) -> None:
    from accelerate.utils import write_basic_config

    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    write_basic_config(mixed_precision="no", save_location=str(file.with_suffix(".json")))
    file.write_text(file.with_suffix(".json").read_text())  # JSON is YAML
    assert settings_without_effect({"HF_HOME": str(tmp_path)}) == (file, {})
    write_basic_config(mixed_precision="bf16", save_location=str(tmp_path / "other.json"))
    file.write_text((tmp_path / "other.json").read_text())
    assert settings_without_effect({"HF_HOME": str(tmp_path)}) == (file, {"mixed_precision": "bf16"})


FSDP = """
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: false
fsdp_config:
  fsdp_version: 2
machine_rank: 0
mixed_precision: 'no'
num_processes: 8
use_cpu: false
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (FSDP, {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}),
        ("distributed_type: MULTI_GPU\nmixed_precision: fp16\n", {"mixed_precision": "fp16"}),
        ("dynamo_config: {}\nmixed_precision: null\n", {}),
        ("dynamo_config:\n  dynamo_backend: INDUCTOR\n", {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}),
        ("", {}),
        ("- a list\n", {}),
        ("a: [unclosed", {}),
        ("&a [*a, *a]: 3", {}),
        ("\x00", {}),
    ],
)
def test_settings_of_a_file(tmp_path: Path, text: str, found: dict[str, Any]) -> None:
    file = tmp_path / "huggingface" / "accelerate" / "default_config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert settings_without_effect({"XDG_CACHE_HOME": str(tmp_path)}) == (file, found)


def test_the_plan_names_the_file_and_the_setting(
    local_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text("mixed_precision: 'no'\n")
    (local_project.folder / "program.py").write_text("import accelerate\n")
    assert "note" not in local_project.launch("--dry-run", "program.py").stdout
    file.write_text("mixed_precision: bf16\n")
    [line] = [each for each in local_project.launch("--dry-run", "program.py").stdout.splitlines() if "note" in each]
    assert f"{file} has no effect here (mixed_precision bf16)" in line
    assert "note" not in local_project.launch("--dry-run").stdout  # the bundled job has an option of its own
