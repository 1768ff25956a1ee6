"""Batch scripts in the ways in which people write them, for a cluster of 4 nodes with 8 GPUs and 16 cores each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """A batch script, and what its translation asks for: nodes, ranks of a node, and GPUs of a node."""

    text: str
    nodes: int
    ranks: int
    gpus: int


def script(header: str, body: str, shell: str = "#!/bin/bash") -> str:
    """Put together a script; options of `header` are separated by `` | ``."""
    lines = [f"#SBATCH {option}" for option in header.split(" | ")] if header else []
    return "\n".join([shell, *lines, "", body, ""])


MEET = """\
nodes=( $( scontrol show hostnames $SLURM_JOB_NODELIST ) )
nodes_array=($nodes)
head_node=${nodes_array[0]}
head_node_ip=$(srun --nodes=1 --ntasks=1 -w "$head_node" hostname --ip-address)
"""

JOBS: tuple[Job, ...] = (
    # one process
    Job(script("", "python train.py"), 1, 1, 0),
    Job(script("--cpus-per-task=4", "python train.py"), 1, 1, 0),
    Job(script("-c 2 | -t 30", "python3 -u train.py --lr 0.1"), 1, 1, 0),
    Job(script("--gres=gpu:1 | --time=1:00:00", "python train.py"), 1, 1, 1),
    Job(script("--gpus=1 | --mem=4G", "srun python train.py"), 1, 1, 1),
    Job(script("-G 1 -p debug", "exec python train.py"), 1, 1, 1),
    Job(script("--gpus-per-node=1 | --partition=urgent", "time python train.py"), 1, 1, 1),
    Job(script("--nodes=1 | --ntasks=1 | --cpus-per-task=8 | --gres=gpu:1", "srun python train.py"), 1, 1, 1),
    Job(script("-N 1 -n 1 -t 0-01:00", "srun python train.py 2>&1 | tee log.txt"), 1, 1, 0),
    Job(script("-J test -o test.%j.out -e test.%j.err", "python train.py &> all.log"), 1, 1, 0),
    # several processes of one node
    Job(script("--gres=gpu:4", "torchrun --standalone --nproc_per_node=4 train.py"), 1, 4, 4),
    Job(script("--gres=gpu:4", "torchrun --nproc-per-node 4 train.py --epochs 3"), 1, 4, 4),
    Job(script("--gpus-per-node=8 | --exclusive", "torchrun --nnodes 1 --nproc_per_node gpu train.py"), 1, 8, 8),
    Job(script("--gpus-per-node=8 -t 12:00:00", "torchrun --nproc_per_node=$SLURM_GPUS_ON_NODE train.py"), 1, 8, 8),
    Job(script("--gres=gpu:2", "python -m torch.distributed.run --nproc_per_node=2 train.py"), 1, 2, 2),
    Job(script("--gres=gpu:2", "python -m torch.distributed.launch --nproc_per_node=2 train.py"), 1, 2, 2),
    Job(script("--gres=gpu:2", "accelerate launch --num_processes 2 train.py"), 1, 2, 2),
    Job(script("--gres=gpu:4", "accelerate launch --multi_gpu --num_processes=4 --mixed_precision=bf16 train.py"), 1, 4, 4),
    Job(script("--gpus-per-node=4", "accelerate launch --num_processes 4 --main_process_port 29501 -m pkg.train"), 1, 4, 4),
    Job(script("--ntasks-per-node=8 | --gres=gpu:8 | -c 2", "srun python train.py"), 1, 8, 8),
    Job(script("--ntasks=4 | --cpus-per-task=2", "srun python train.py"), 1, 4, 0),
    Job(script("--ntasks-per-node=2 | --nodes=1 | --mem=8000M", "srun --cpu-bind=none python train.py"), 1, 2, 0),
    # several nodes
    Job(
        script(
            "-N 2 | --ntasks-per-node=1 | --gres=gpu:8 | --cpus-per-task=16",
            MEET + "srun torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id $RANDOM --rdzv_backend c10d"
            " --rdzv_endpoint $head_node_ip:29500 train.py",
        ),
        2, 8, 8,
    ),
    Job(
        script(
            "--nodes=4 | --ntasks-per-node=1 | --gpus-per-node=8 | --time=2-00:00:00 | --exclusive",
            "export MASTER_ADDR=$(scontrol show hostname $SLURM_NODELIST | head -n1)\nexport MASTER_PORT=12345\n"
            "srun torchrun --nnodes=$SLURM_NNODES --nproc-per-node=8 --rdzv-backend=c10d"
            ' --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" train.py --out /data',
        ),
        4, 8, 8,
    ),
    Job(
        script(
            "--nodes=2 | --ntasks-per-node=8 | --gres=gpu:8",
            "export MASTER_PORT=$(expr 10000 + $(echo -n $SLURM_JOBID | tail -c 4))\nexport WORLD_SIZE=16\n"
            "master_addr=$(scontrol show hostnames | head -n 1)\nexport MASTER_ADDR=$master_addr\nsrun python train.py",
        ),
        2, 8, 8,
    ),
    Job(
        script(
            "-N2 -n4 -c4",
            "srun python train.py",
        ),
        2, 2, 0,
    ),
    Job(
        script(
            "--nodes=2 | --gpus-per-node=4 | --ntasks-per-node=1",
            "GPUS_PER_NODE=4\nNNODES=$SLURM_NNODES\n"
            "srun --wait=60 --kill-on-bad-exit=1 torchrun --nproc_per_node $GPUS_PER_NODE --nnodes $NNODES"
            " --node_rank $SLURM_PROCID --master_addr $MASTER_ADDR --master_port 6000 --max_restarts 0 --tee 3 train.py",
        ),
        2, 4, 4,
    ),
    Job(
        script(
            "--nodes=2 | --gres=gpu:4 | --ntasks-per-node=1",
            "export GPUS=4\nsrun accelerate launch --multi_gpu --num_machines 2 --num_processes 8"
            " --machine_rank $SLURM_NODEID --main_process_ip $MASTER_ADDR --main_process_port 29500 train.py",
        ),
        2, 4, 4,
    ),
    # environments
    Job(script("--gres=gpu:1", "module purge\nmodule load python/3.11 cuda/12.4\npython train.py"), 1, 1, 1),
    Job(script("--gres=gpu:1", "ml cuda\nsource venv/bin/activate\npython train.py"), 1, 1, 1),
    Job(script("--gres=gpu:1", 'eval "$(conda shell.bash hook)"\nconda activate ml\npython train.py'), 1, 1, 1),
    Job(script("--gres=gpu:1", ". ~/env/bin/activate\nexport HF_HOME=/data/hf\nexport HF_HUB_OFFLINE=1\npython train.py"), 1, 1, 1),
    Job(script("", "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK\npython train.py"), 1, 1, 0),
    Job(script("", "OMP_NUM_THREADS=2 python train.py --seed 1"), 1, 1, 0),
    Job(script("", "set -euxo pipefail\nulimit -n 4096\nnvidia-smi\nhostname\ndate\npython train.py\ndate"), 1, 1, 0),
    # options that are rarer
    Job(script("--comment=mine | --nice=100 | --begin=now+1hour", "python train.py"), 1, 1, 0),
    Job(script("--mail-type=END,FAIL | --mail-user=me@example.org | --requeue", "python train.py"), 1, 1, 0),
    Job(script("--nodelist=node1 | --no-requeue | --open-mode=append", "python train.py"), 1, 1, 0),
    Job(script("--exclude=node1,node2 | -N 2 | --ntasks-per-node=1", "srun python train.py"), 2, 1, 0),
    Job(script("--job-name=a.b-c", "python train.py"), 1, 1, 0),
    Job(script("-t 90 --mem 2G  # both", "# the program\npython train.py \\\n  --a 1 \\\n  --b 2"), 1, 1, 0),
    Job(script("--time=00:45:00", "python train.py --job '$SLURM_JOB_ID'", "#!/usr/bin/env bash"), 1, 1, 0),
)  # fmt: skip
