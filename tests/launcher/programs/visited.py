"""Ranks that wait in two places, for commands that look inside: the last one in `load`, the others in `compute`."""

import os
import time


def load() -> None:
    time.sleep(600)


def compute() -> None:
    time.sleep(600)


if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
    load()
compute()
