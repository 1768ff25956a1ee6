"""A script for accelerate, without code for the launcher."""

import argparse

import torch
from accelerate import Accelerator


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--value", type=float, required=True)
    args = parser.parse_args()
    accelerator = Accelerator()
    total = accelerator.reduce(torch.tensor(args.value * (accelerator.process_index + 1), device=accelerator.device))
    print(
        f"rank={accelerator.process_index} world={accelerator.num_processes} device={accelerator.device.type}"
        f" sum={total.item():g}",
        flush=True,
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
