"""Batch scripts as people write them, and the command of `launch` that each means."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from launcher.cli.foreign.batch_script import read
from launcher.cli.launch import parse_request
from launcher.client.plan import _devices
from launcher.config import profiles
from launcher.config.cluster import Cluster, Node
from launcher.errors import BadRequest
from tests.launcher.cli.batch_scripts import JOBS
from tests.launcher.engines import Launch
from tests.testbed.slurm import SlurmCluster

HEAD = "#!/bin/bash\n#SBATCH --job-name=mine\n#SBATCH -p gpu -A ml\n#SBATCH --time=12:00:00\n"
OURS = "--name mine --set slurm.partition=gpu --set slurm.account=ml --time 12:00:00"

SCRIPTS: dict[str, tuple[str, str, int, int]] = {
    "one process": (f"{HEAD}#SBATCH --gres=gpu:1\npython train.py --lr 3e-5\n", f"{OURS} --gpus-per-node 1 python train.py --lr 3e-5", 0, 0),
    "torchrun on a node": (
        (f"{HEAD}#SBATCH --nodes=1\n#SBATCH --gpus-per-node=8\n#SBATCH --cpus-per-task=64\n"
        "module purge\nmodule load cuda/12.4 gcc\nsource ~/env/bin/activate\n"
        "torchrun --standalone --nproc_per_node=8 train.py \\\n    --batch-size 32 \\\n    --out runs/a\n"),
        (f"{OURS} --nodes 1 --gpus-per-node 8"
        """ --set 'slurm.modules=["cuda/12.4", "gcc"]' --set 'slurm.setup=["module purge", "source ~/env/bin/activate"]'"""
        " torchrun --standalone --nproc_per_node=8 train.py --batch-size 32 --out runs/a"),
        0, 0,
    ),
    "torchrun on nodes": (
        (f"{HEAD}#SBATCH -N 4\n#SBATCH --ntasks-per-node=1\n#SBATCH --gres=gpu:h100:8\n\nset -euo pipefail\n"
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\nexport MASTER_PORT=29500\n'
        'echo "Node IP: $MASTER_ADDR"\nexport NCCL_DEBUG=INFO\n'
        "srun torchrun --nnodes $SLURM_NNODES --nproc_per_node $SLURM_GPUS_ON_NODE --rdzv_id $RANDOM --rdzv_backend c10d \\\n"
        "  --rdzv_endpoint $MASTER_ADDR:$MASTER_PORT train.py --epochs 3\n"),
        (f"{OURS} --nodes 4 --gpus-per-node 8 --accelerator h100 --env NCCL_DEBUG=INFO srun torchrun --nnodes 4"
        " --nproc_per_node 8 --rdzv_id '$RANDOM' --rdzv_backend c10d --rdzv_endpoint '$MASTER_ADDR:29500' train.py --epochs 3"),
        0, 2,
    ),
    "a task for each GPU": (
        f"{HEAD}#SBATCH -N 2\n#SBATCH --ntasks-per-node=8\n#SBATCH --gres=gpu:8\n#SBATCH -c 8\nsrun python -u train.py\n",
        f"{OURS} --nodes 2 --ranks-per-node 8 --gpus-per-node 8 --cpus-per-rank 8 srun python -u train.py",
        0, 0,
    ),
    "a task with all GPUs": (
        f"{HEAD}#SBATCH --ntasks-per-node=1\n#SBATCH --gres=gpu:4\nsrun python train.py\n",
        f"{OURS} --gpus-per-node 4 srun python train.py",
        0, 1,
    ),
    "accelerate": (
        (f"{HEAD}#SBATCH -N 2 --gpus-per-node=4\nGPUS=4\nLR=${{LR:-3e-5}}\n"
        "srun accelerate launch --num_processes 8 --num_machines $SLURM_NNODES --machine_rank $SLURM_NODEID"
        " --main_process_ip $MASTER --mixed_precision bf16 train.py --lr $LR\n"),
        (f"{OURS} --nodes 2 --gpus-per-node 4 srun accelerate launch --num_processes 8 --num_machines 2 --machine_rank"
        " '$SLURM_NODEID' --main_process_ip '$MASTER' --mixed_precision bf16 train.py --lr 3e-5"),
        0, 0,
    ),
    "variables before the program": (
        f"{HEAD}OMP_NUM_THREADS=4 TOKENIZERS_PARALLELISM=false python -m pkg.train > out.log 2>&1\n",
        f"{OURS} --env OMP_NUM_THREADS=4 --env TOKENIZERS_PARALLELISM=false python -m pkg.train",
        0, 0,
    ),
    "variables of sbatch": (
        f"{HEAD}#SBATCH --export=ALL,SEED=3,HOME\nexport WANDB_API_KEY=0123\npython train.py\n",
        f"{OURS} --env SEED=3 --env HOME --env WANDB_API_KEY python train.py",
        0, 1,
    ),
    "arguments": (f'{HEAD}python train.py --seed $1 "$@"\n', f"{OURS} python train.py --seed 7 7 --fast", 0, 0),
    "what only a shell can do": (
        f"{HEAD}cd $HOME/project\nfor seed in 1 2 3; do\n  python train.py --seed $seed\ndone\npython eval.py\n",
        f"{OURS} python train.py --seed '$seed'",
        4, 0,
    ),
    "logs, mail and comments": (
        ("#!/bin/bash -l\n#SBATCH -J mine  # the name\n##SBATCH --nodes=9\n#SBATCH -o logs/%j.out -e logs/%j.err\n"
        "#SBATCH --mail-type=END,FAIL\n# a comment\npython3 train.py\n#SBATCH --nodes=8\n"),
        "--name mine --set slurm.sbatch.mail-type=END,FAIL python3 train.py",
        0, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_means_a_command(name: str) -> None:
    text, command, left, notes = SCRIPTS[name]
    script = read(text, ["7", "--fast"])
    assert [*script.options, *script.program] == shlex.split(command)
    assert (len(script.left), len(script.notes)) == (left, notes), (script.left, script.notes)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_command_is_one_that_launch_takes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = read(SCRIPTS[name][0], ["7", "--fast"])
    spec, _ = parse_request(["--backend", "slurm", *script.options, *script.program])
    assert spec.target in ("train.py", "-m pkg.train")


def test_it_is_shown_and_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.sh").write_text(f"{HEAD}cd /data\npython train.py --lr $1\n")
    status, out, _ = launch("--time", "1h", "job.sh", "3e-5")
    assert status == 0
    assert out == (
        "launch: job.sh means\n\n"
        f"  launch --time 1h --backend slurm {OURS} python train.py --lr 3e-5\n\n"
        "and, as it stands, with one process on each node\n\n"
        f"  launch --time 1h --backend slurm {OURS} --ranks-per-node 1 -- bash job.sh 3e-5\n\n"
        "not translated:\n  line 5: cd /data (start the command there)\n\nNothing was sent.\n"
    )
    status, out, _ = launch("--json", "job.sh", "3e-5")
    assert json.loads(out)["meaning"].startswith("launch: job.sh means")
    assert [path.name for path in tmp_path.iterdir()] == ["job.sh"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{HEAD}#SBATCH --array=1-9\npython train.py\n", "--array 1-9: `launch` does not take it"),
        (
            f"{HEAD}#SBATCH --frobnicate\npython train.py\n",
            "line 5: --frobnicate: this option of sbatch has no counterpart.",
        ),
        (f"{HEAD}./a.out\n", "no line of it starts a Python program"),
        ("", "no line of it starts a Python program"),
        ("\0\0", "no line of it starts a Python program"),
        (f"{HEAD}#SBATCH --comment='open\npython train.py\n", "line 5: No closing quotation"),
        (f"{HEAD}python 'open\n", "no line of it starts a Python program"),
        (f"{HEAD}X='open\npython train.py\n", ""),
    ],
)
def test_what_has_no_meaning_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch, text: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.sh").write_text(text)
    status, out, err = launch("job.sh")
    assert (status, out if words else "") == (2 if words else 0, "")
    assert words in err


def test_another_file_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("python train.py\n")
    status, _, err = launch("notes.txt")
    assert (status, "target 'notes.txt': write package.module:function" in err) == (2, True)


def test_an_option_is_named_with_its_line() -> None:
    with pytest.raises(BadRequest, match="line 5"):
        read(f"{HEAD}#SBATCH --nosuch=1\n")


@pytest.mark.parametrize("number", range(len(JOBS)))
def test_scripts_as_people_write_them(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = JOBS[number]
    script = read(job.text)
    assert not script.left
    spec, _ = parse_request(["--backend", "slurm", *script.options, *script.program])
    site = Cluster("slurm", "slurm", nodes=4, node=Node(gpus=8 if job.gpus else 0, cpus=16))
    devices = _devices(spec, profiles.choose("slurm", None, tmp_path, spec.settings) and site)
    assert (devices.nodes or 1, devices.count // (devices.nodes or 1)) == (job.nodes, job.ranks)
    assert devices.kind == ("gpu" if job.gpus else "cpu")


def test_sbatch_takes_each_script_and_its_translation(
    on_slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch
) -> None:
    """SLURM judges both with --test-only, which `launch --dry-run` asks for in its plan."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pkg").mkdir()
    for name in ("train.py", "pkg/__init__.py", "pkg/train.py"):
        (tmp_path / name).write_text("print('ran')\n")
    for job in JOBS:
        (tmp_path / "job.sh").write_text(job.text)
        on_slurm.run("sbatch", "--test-only", str(tmp_path / "job.sh"))
        status, out, _ = launch("job.sh")
        assert status == 0
        command = next(line for line in out.splitlines() if line.startswith("  launch "))
        status, out, err = launch("--dry-run", *shlex.split(command)[1:])
        assert status == 0, f"{command}\n{err}"
        assert f"#SBATCH --nodes={job.nodes}\n" in out, command
        assert (f"#SBATCH --gpus-per-node={job.gpus}\n" in out) == bool(job.gpus), command
