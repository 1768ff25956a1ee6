"""Asks at its top whether there is a GPU."""

from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(ctx: Any) -> None:
    print("works:", torch.ones(1, device=DEVICE))
