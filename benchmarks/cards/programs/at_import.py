"""Uses a GPU when it is imported, and shows which processes hold memory there."""

import subprocess
from typing import Any

import torch

ONE = torch.ones(1).cuda() if torch.cuda.is_available() else torch.ones(1)


def main(ctx: Any) -> None:
    if ONE.is_cuda:
        words = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv"]
        print(subprocess.run(words, capture_output=True, text=True, check=False).stdout)
    print("works:", ONE + 1, ctx.device)
