"""A script for torchrun, without code for the launcher."""

import argparse
import os
import signal

import torch
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("--value", type=float, required=True)
parser.add_argument("--note", default="")
args = parser.parse_args()

signal.signal(signal.SIGUSR1, lambda *_: None)  # many scripts install handlers
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
total = torch.tensor([args.value * (dist.get_rank() + 1)])
dist.all_reduce(total)
print(
    f"rank={dist.get_rank()} local={os.environ['LOCAL_RANK']} world={dist.get_world_size()} sum={total.item():g}"
    f" master={os.environ['MASTER_ADDR']} note={args.note!r}",
    flush=True,
)
dist.destroy_process_group()
