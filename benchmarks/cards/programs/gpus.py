"""What each part of the toolkit finds of the GPUs of this machine."""

import os

import torch

from launcher.agent.health import gpus
from launcher.backends.local import try_gpus
from launcher.rank import affinity

visible = os.environ.get("CUDA_VISIBLE_DEVICES")
print("torch", torch.__version__, "sees", torch.cuda.device_count(), "and can use one:", *try_gpus())
print("counted:", gpus.count(visible), "| health:", gpus.report(visible), "| most free memory:", gpus.freest())
print("NUMA node of each:", dict(affinity.this_machine().gpus))
