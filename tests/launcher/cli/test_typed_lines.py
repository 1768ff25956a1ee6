"""Lines as people type them who know torchrun, accelerate, sbatch, srun or ray: what each asks for, or the right word."""

from __future__ import annotations

import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.launch import parse_request
from launcher.cli.main import SYNONYMS, main
from launcher.cli.parser import COMMANDS
from launcher.errors import BadRequest
from launcher.request.spec import RunSpec

OPEN = ("target", "args")


def asked(line: str) -> dict[str, Any]:
    """The fields of the request that differ from a bare ``launch train.py``; notes on what is dropped as their number."""
    spec, options = parse_request(shlex.split(line)[1:])
    found = {f.name: getattr(spec, f.name) for f in fields(RunSpec) if getattr(spec, f.name) != f.default}
    if found.get("target") == "train.py":
        del found["target"]
    shown = {"detach": options.detach, "dry_run": options.dry_run, "notes": len(options.notes)}
    return found | {name: value for name, value in shown.items() if value}


def key(*settings: str) -> dict[str, tuple[str, ...]]:
    return {"settings": settings}


LINES: dict[str, dict[str, Any]] = {
    # torchrun
    "launch --nproc-per-node 4 train.py": {"ranks_per_node": "4"},
    "launch --nproc_per_node=4 train.py": {"ranks_per_node": "4"},
    "launch --nproc-per-node gpu train.py": {"ranks_per_node": "gpu"},
    "launch --nproc-per-node auto train.py": {"ranks_per_node": "auto"},
    "launch --nnodes 2 --nproc-per-node 8 train.py": {"nodes": 2, "ranks_per_node": "8"},
    "launch --nnodes=2:2 train.py": {"nodes": 2},
    "launch --standalone --nproc-per-node 2 train.py": {"ranks_per_node": "2", "notes": 1},
    "launch --rdzv-backend c10d --rdzv-endpoint n1:29500 --rdzv-id 7 train.py": {"notes": 3},
    "launch --rdzv_backend=c10d --rdzv_endpoint=n1:29500 train.py": {"notes": 2},
    "launch --master_addr n1 --master_port 29500 --node_rank 0 train.py": {"notes": 3},
    "launch --max_restarts 5 train.py": {"max_restarts": 5},
    "launch --log-dir logs --tee 3 train.py": {"notes": 2},
    "launch torchrun train.py": {},
    "launch torchrun --nproc-per-node 4 train.py --lr 1": {"ranks_per_node": "4", "args": ("--lr", "1")},
    "launch torchrun --standalone --nproc_per_node=gpu -m pkg.train --lr 1": {
        "ranks_per_node": "gpu", "target": "-m pkg.train", "args": ("--lr", "1"), "notes": 1,
    },
    "launch torchrun -t 3 --nnodes 2 train.py": {"nodes": 2, "notes": 1},
    "launch --backend slurm torchrun --nnodes 4 --nproc-per-node 8 train.py": {
        "backend": "slurm", "nodes": 4, "ranks_per_node": "8",
    },
    "launch python -m torch.distributed.run --nproc-per-node 2 train.py": {"ranks_per_node": "2"},
    "launch python3 -m torch.distributed.launch --nproc_per_node=2 train.py": {"ranks_per_node": "2"},
    # python
    "launch python train.py --lr 1": {"args": ("--lr", "1")},
    "launch python3.11 -u train.py": {},
    "launch python -m pkg.train --lr 1": {"target": "-m pkg.train", "args": ("--lr", "1")},
    "launch /usr/bin/python3 train.py": {},
    "launch --gpus 2 python train.py": {"gpus": 2},
    # accelerate
    "launch --num_processes 8 train.py": {"ranks": 8},
    "launch --num_machines 2 --num_processes 16 train.py": {"nodes": 2, "ranks": 16},
    "launch --mixed_precision bf16 train.py": key("environment.ACCELERATE_MIXED_PRECISION=bf16"),
    "launch --mixed-precision=fp16 train.py": key("environment.ACCELERATE_MIXED_PRECISION=fp16"),
    "launch --multi_gpu --num_processes 2 train.py": {"ranks": 2, "notes": 1},
    "launch --gradient_accumulation_steps 4 train.py": key("environment.ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4"),
    "launch --num_cpu_threads_per_process 4 train.py": key("environment.OMP_NUM_THREADS=4"),
    "launch accelerate launch --debug train.py": key("environment.ACCELERATE_DEBUG_MODE=true"),
    "launch --gpu_ids 0,1 train.py": key("environment.CUDA_VISIBLE_DEVICES=0,1"),
    "launch --main_process_port 29501 --machine_rank 0 train.py": {"notes": 2},
    "launch accelerate launch train.py --lr 1": {"args": ("--lr", "1")},
    "launch accelerate launch --num_processes 4 --mixed_precision bf16 train.py": {
        "ranks": 4, **key("environment.ACCELERATE_MIXED_PRECISION=bf16"),
    },
    "launch accelerate launch -m pkg.train": {"target": "-m pkg.train"},
    "launch accelerate launch --module pkg.train": {"target": "-m pkg.train"},
    "launch python -m accelerate.commands.launch --num_processes 2 train.py": {"ranks": 2},
    # sbatch and srun
    "launch -N 2 train.py": {"nodes": 2},
    "launch -N2 -n16 train.py": {"nodes": 2, "ranks": 16},
    "launch -N 2-2 train.py": {"nodes": 2},
    "launch --ntasks 8 train.py": {"ranks": 8},
    "launch --ntasks=8 --ntasks-per-node=4 train.py": {"ranks": 8, "ranks_per_node": "4"},
    "launch -c 8 train.py": {"cpus_per_rank": 8},
    "launch --cpus-per-task=8 train.py": {"cpus_per_rank": 8},
    "launch -p gpu train.py": key("slurm.partition=gpu"),
    "launch -pgpu train.py": key("slurm.partition=gpu"),
    "launch --partition gpu,long -A ml -q high train.py": key(
        "slurm.partition=gpu,long", "slurm.account=ml", "slurm.qos=high"
    ),
    "launch --account=ml --qos=high train.py": key("slurm.account=ml", "slurm.qos=high"),
    "launch -t 60 train.py": {"time": "60"},
    "launch -t 1-12 train.py": {"time": "1-12"},
    "launch --time=2:00:00 train.py": {"time": "2:00:00"},
    "launch -J mine train.py": {"name": "mine"},
    "launch --job-name=mine train.py": {"name": "mine"},
    "launch -w n[1-4] -x n3 train.py": key("slurm.nodelist=n[1-4]", "slurm.exclude=n3"),
    "launch --nodelist n1 --exclude n2 train.py": key("slurm.nodelist=n1", "slurm.exclude=n2"),
    "launch -C h100 train.py": key("slurm.constraint=h100"),
    "launch --constraint='a&b' train.py": key("slurm.constraint=a&b"),
    "launch --gres gpu:8 train.py": {"gpus_per_node": 8},
    "launch --gres=gpu:h100:8 -N 2 train.py": {"gpus_per_node": 8, "accelerator": "h100", "nodes": 2},
    "launch --gres=gpu train.py": {"gpus_per_node": 1},
    "launch --gpus-per-node 8 --nodes 2 train.py": {"gpus_per_node": 8, "nodes": 2},
    "launch --gpus-per-node=a100:4 train.py": {"gpus_per_node": 4, "accelerator": "a100"},
    "launch --gres=gpu:a100 train.py": {"gpus_per_node": 1, "accelerator": "a100"},
    "launch -G 4 train.py": {"gpus": 4},
    "launch -G h100:4 train.py": {"gpus": 4, "accelerator": "h100"},
    "launch --mem 64G train.py": key("slurm.mem=64G"),
    "launch --mem=0 train.py": key("slurm.mem=0"),
    "launch --exclusive train.py": key("slurm.exclusive=true"),
    "launch --reservation big train.py": key("slurm.reservation=big"),
    "launch --dependency afterok:12 train.py": key("slurm.sbatch.dependency=afterok:12"),
    "launch -d afterany:12 train.py": key("slurm.sbatch.dependency=afterany:12"),
    "launch --mail-type=END --mail-user=me@x.org train.py": key(
        "slurm.sbatch.mail-type=END", "slurm.sbatch.mail-user=me@x.org"
    ),
    "launch --begin=now+1hour --nice=100 train.py": key("slurm.sbatch.begin=now+1hour", "slurm.sbatch.nice=100"),
    "launch -o out.txt -e err.txt train.py": {"notes": 2},
    "launch --export=ALL train.py": {},
    "launch --export ALL,SEED=3,HOME train.py": {"env": ("SEED=3", "HOME")},
    "launch --no-requeue train.py": key("slurm.sbatch.requeue=false"),
    "launch srun train.py": {},
    "launch srun -N 2 --gpus-per-node 8 python train.py --lr 1": {
        "nodes": 2, "gpus_per_node": 8, "args": ("--lr", "1"),
    },
    "launch srun --label torchrun --nproc-per-node 8 train.py": {"ranks_per_node": "8", "notes": 1},
    # numbers and kinds of GPUs
    "launch --gpus all train.py": {"ranks_per_node": "gpu"},
    "launch --gpus all --nodes 2 train.py": {"ranks_per_node": "gpu", "nodes": 2},
    "launch --gpus h100:8 train.py": {"gpus": 8, "accelerator": "h100"},
    "launch --gpus 8xh100 train.py": {"gpus": 8, "accelerator": "h100"},
    "launch --gpus=4 train.py": {"gpus": 4},
    # keys of a profile
    "launch --set slurm.partition=gpu train.py": key("slurm.partition=gpu"),
    "launch --set grace=120 --set=hang_after=0 train.py": key("grace=120", "hang_after=0"),
    "launch --set environment.NCCL_DEBUG=INFO train.py": key("environment.NCCL_DEBUG=INFO"),
    # names of commands
    "launch run train.py": {"target": "run", "args": ("train.py",)},  # `main` translates it
    "launch --ranks 4 train.py --ranks 2": {"ranks": 4, "args": ("--ranks", "2")},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a script that has an option ``--ranks`` of its own, and a package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(
        "import argparse\nargparse.ArgumentParser().add_argument('--ranks')\nprint('ran')\n"
    )
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/__init__.py").write_text("")
    (tmp_path / "pkg/train.py").write_text("print('ran')\n")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("line", LINES)
def test_a_line_asks_for_what_it_says(line: str) -> None:
    assert asked(line) == LINES[line]


REFUSED: dict[str, str] = {
    "launch --nnodes 1:4 train.py": "--nnodes 1:4: a run has a fixed number of nodes. Write --nodes 4.",
    "launch -N 1-4 train.py": "-N 1-4: a run has a fixed number of nodes. Write --nodes 4.",
    "launch --nproc-per-node many train.py": "--ranks-per-node 'many': write a number, or gpu, cpu or auto",
    "launch --nproc-per-node 0 train.py": "--ranks-per-node '0': write a number",
    "launch --no-python ./run.sh": "--no-python: `launch` does not take it; launch starts Python programs.",
    "launch --use_fsdp train.py": "--use_fsdp: `launch` does not take it; write launch accelerate launch in front of it",
    "launch --cpu --num_processes 2 train.py": "--cpu: `launch` does not take it; write --cpus N",
    "launch --tpu train.py": "--tpu: `launch` does not take it; write --tpus N",
    "launch --array 1-10 train.py": "--array 1-10: `launch` does not take it; write one command for each run.",
    "launch -a 1-10 train.py": "-a 1-10: `launch` does not take it; write one command for each run.",
    "launch --signal=USR1@60 train.py": "--signal USR1@60: `launch` does not take it; launch sends the ranks SIGTERM",
    "launch --mem-per-gpu 8G train.py": "write --mem, the memory of each node",
    "launch --gpus-per-task 1 train.py": "each rank has one GPU; write --gpus and --cpus-per-rank",
    "launch -D /data train.py": "-D /data: `launch` does not take it; a run starts in the folder of the command",
    "launch --wrap 'python train.py'": "write the program after the options",
    "launch --export=NONE train.py": "--export NONE: the ranks get the variables of this shell. Write env -i",
    "launch --gres=craynetwork:1 train.py": "--gres craynetwork:1: only GPUs can be asked for",
    "launch -M other train.py": "SLURM_CONF chooses the cluster that sbatch uses",
    "launch accelerate config": "accelerate config: only `accelerate launch` starts a program.",
    "launch torchrun": "torchrun: no program follows. Write: launch [OPTIONS] train.py [ARGS]...",
    "launch torchrun --nproc-per-node": "--nproc-per-node: a value is needed.",
    "launch torchrun --frobnicate train.py": "--frobnicate: this option of torchrun has no counterpart.",
    "launch mpirun -n 4 train.py": "mpirun: its options are not known here. Write: launch --ranks N train.py",
    "launch python -c 'print(1)'": "-c: this option of python has no counterpart.",
    "launch train.py --gpus 8 --backend slurm": "Options of launch come first: launch --gpus 8 --backend slurm train.py.",
    "launch --cpus 1 train.py --dry-run": "--dry-run stands after train.py, so it would go to the program",
    "launch train.py --lr 1 --nodes=2": "come first: launch --nodes=2 train.py --lr 1. If the program knows it: launch train.py --",
    "launch -m pkg.train --json": "--json stands after -m pkg.train",
    "launch -x": "-x: a value is needed.",
    "launch -m": "-m: the name of a module is needed.",
    "launch --frobnicate train.py": "unknown option --frobnicate",
}


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("line", REFUSED)
def test_a_line_without_a_meaning_gets_the_right_word(line: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse_request(shlex.split(line)[1:])
    assert REFUSED[line] in str(refused.value)


@pytest.mark.parametrize(
    "text", ["--gpus", "'gpus'", "gpus: int = 1", "def main(gpus=1): ...", "from transformers import HfArgumentParser"]
)
def test_an_option_that_the_program_may_know_goes_to_it(folder: Path, text: str) -> None:
    (folder / "options.py").write_text(f"{text}  # beside the script\n")
    spec, _ = parse_request(["train.py", "--gpus", "8"])
    assert (spec.gpus, spec.args) == (None, ("--gpus", "8"))


def test_a_script_in_a_folder_may_have_its_options_from_the_project_above(folder: Path) -> None:
    (folder / "scripts").mkdir()
    (folder / "scripts/run.py").write_text("from library.options import parser\n")
    with pytest.raises(BadRequest, match=r"--gpus stands after scripts/run\.py"):
        parse_request(["scripts/run.py", "--gpus", "8"])
    (folder / "library").mkdir()
    (folder / "library/options.py").write_text("parser.add_argument('--gpus')\n")
    assert parse_request(["scripts/run.py", "--gpus", "8"])[0].args == ("--gpus", "8")


def test_a_pipe_beside_the_script_is_not_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.py")
    with pytest.raises(BadRequest, match=r"--gpus stands after train\.py"):
        parse_request(["train.py", "--gpus", "8"])


@pytest.mark.usefixtures("folder")
def test_after_two_dashes_everything_goes_to_the_program() -> None:
    spec, _ = parse_request(["train.py", "--", "--gpus", "8"])
    assert (spec.gpus, spec.args) == (None, ("--gpus", "8"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lst", "there is no command 'lst' (did you mean 'list'?), and no file of that name."),
        ("statsu r", "there is no command 'statsu' (did you mean 'status'?)"),
        ("cancle r", "there is no command 'cancle' (did you mean 'cancel'?)"),
        ("kill", "cancel: no run is queued or running."),
        ("remove nosuch --yes", "there is no run 'nosuch'"),
        (f"{'x' * 5000}.py --gpus 1", "no such script"),
        ("stop nosuch", "there is no run 'nosuch'"),
        ("submit nosuch.py", "no such script: nosuch.py"),
        ("run nosuch.py", "no such script: nosuch.py"),
        (
            "-p gpu train.py",
            "slurm.partition is a setting of the backend slurm, and this run goes to local. Add --backend slurm",
        ),
        ("--set slurm.partitoin=gpu --backend slurm train.py", "partitoin"),
        ("--set grace train.py", "--set 'grace': write KEY=VALUE with a key of the profile"),
        ("--set grace=soon train.py", "grace"),
        ("--set backend=slurm train.py", "use --backend or --cluster"),
        ("--set environment.RANK=1 train.py", "RANK is set by launch for each rank"),
        ("--ranks 2 --cpus 3 train.py", "--ranks 2 --cpus 3: each device has one rank. Give one of the two."),
        (
            "--nproc-per-node 2 --cpus 3 train.py",
            "--ranks-per-node 2: 2 ranks on each of 1 node are 2, and 3 were asked for.",
        ),
        ("--gpus 1 --gpus-per-node 1 train.py", "--gpus and --gpus-per-node together: a run uses one kind of device"),
        (
            "--cpus-per-rank 100000 --ranks 1 train.py",
            "--cpus-per-rank 100000: the ranks of a node would take 100000 cores, and it has",
        ),
        ("--gpus all train.py", "--ranks-per-node gpu: cluster 'local' has no GPUs. Write a number."),
    ],
)
def test_a_wrong_line_is_refused_before_anything_is_sent(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line))
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (folder / "runs").exists()


def planned(capsys: pytest.CaptureFixture[str], line: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["--dry-run", *shlex.split(line)])
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    return captured.out


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--ranks 2 train.py", "2 CPU ranks of one core each on 1 node"),
        ("--nproc-per-node 2 train.py", "2 CPU ranks of one core each on 1 node"),
        ("--nproc-per-node cpu train.py", "of one core"),
        ("--cpus 1 --cpus-per-rank 2 train.py", "1 CPU rank of one core on 1 node, 2 cores for each rank"),
        ("--set environment.A=b train.py", "env    A=b"),
        ("--mixed_precision bf16 train.py", "env    ACCELERATE_MIXED_PRECISION=bf16"),
    ],
)
def test_the_plan_has_what_was_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert words in planned(capsys, line)


def test_a_note_names_what_is_dropped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--dry-run", "--standalone", "--rdzv-id", "7", "train.py"])
    err = capsys.readouterr().err
    assert err == (
        "launch: --standalone is not used: the ranks meet at an address that launch chooses\n"
        "launch: --rdzv-id 7 is not used: the ranks meet at an address that launch chooses\n"
    )
    assert folder.exists()


def test_a_file_of_the_name_of_a_command_is_a_target(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not SYNONYMS.keys() & COMMANDS.keys()
    (folder / "ls").mkdir()
    with pytest.raises(SystemExit) as ended:
        main(["ls"])
    assert ended.value.code == 2
    assert "target 'ls'" in capsys.readouterr().err
