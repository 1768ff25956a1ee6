"""The bundled job beside the plain loop of its recipe on a GPU: samples/s, MFU and seconds.

``python -m benchmarks.cards.throughput --model FOLDER [FLAGS] [-- JOB FLAGS]``; what follows ``--`` goes to the bundled job,
which also runs with ``--length-buckets``. Each run is a process of its own, see `benchmarks.reference_job`.

MFU (model FLOPs utilisation; Chowdhery et al. 2022, PaLM, appendix B): FLOPs of forward and backward pass by the formula,
without padding, over those that the card can do in dense bf16, for fp32 as well. A token costs 6 x parameters (without
embeddings) + 12 x layers x width x tokens of its pair.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.reference_job import BUCKETS, MAX_LENGTH, OURS, PLAIN, Result, Setup, run
from training.bert.sources import CORPUS

PEAK = {"H200": 989.5, "H100": 989.5, "A100": 312.0, "L40S": 362.0, "L4": 121.0}
"""TFLOP/s of a card in dense bf16, by a part of its name. Source: NVIDIA's data sheets (SXM)."""


def flops_of(model: Path, data: Path) -> float:
    """FLOPs of forward and backward pass for one pair of the training data, on average."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from training.bert.sources import find_source, read

    bert: Any = AutoModelForSequenceClassification.from_pretrained(model)
    embeddings = {id(parameter) for parameter in bert.bert.embeddings.parameters()}
    parameters = sum(each.numel() for each in bert.parameters() if id(each) not in embeddings)
    rows = read(find_source("train", str(data), ""))
    pairs = AutoTokenizer.from_pretrained(model)(
        list(rows["sentence1"]), list(rows["sentence2"]), truncation=True, max_length=MAX_LENGTH
    )
    attention = 12 * bert.config.num_hidden_layers * bert.config.hidden_size
    lengths = [len(ids) for ids in pairs["input_ids"]]
    return float(sum(length * (6 * parameters + attention * length) for length in lengths) / len(lengths))


def peak(given: float) -> tuple[str, float]:
    """The name of the device and its TFLOP/s; 0 if they are not known."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return name, given or next((flops for part, flops in PEAK.items() if part in name), 0.0)


def line(way: str, result: Result, plain: Result, flops: float, tflops: float) -> str:
    mfu = f"{result.rate * flops / tflops / 1e12:8.2%}" if tflops else f"{'-':>8}"
    return (
        f"{way:<24} {result.rate:>10.1f} {result.rate / plain.rate:>8.2f} {mfu} {result.seconds:>9.1f} {result.whole:>9.1f}"
        f" {result.accuracy:>9.4f}"
    )


def main() -> None:
    words = sys.argv[1:]
    extra = words[words.index("--") + 1 :] if "--" in words else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder saved by save_pretrained")
    parser.add_argument("--data", type=Path, default=CORPUS, help="a folder with train.csv and validation.csv")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=0, help="optimizer steps; 0: all of the epochs")
    parser.add_argument(
        "--peak-tflops", type=float, default=0.0, help="of the card in dense bf16, if its name is not known"
    )
    args = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    model, data = args.model.resolve(), args.data.resolve()
    name, tflops = peak(args.peak_tflops)
    flops = flops_of(model, data)
    config = json.loads((model / "config.json").read_text())
    print(
        f"{config['num_hidden_layers']} layers x {config['hidden_size']} on {name} ({tflops:g} TFLOP/s);"
        f" {flops / 1e9:.1f} GFLOP a pair; ours with {' '.join(extra) or 'no options'}\n"
        f"{'':<24} {'samples/s':>10} {'x plain':>8} {'MFU':>8} {'loop s':>9} {'whole s':>9} {'accuracy':>9}"
    )
    found: dict[str, Result] = {}
    for way in (PLAIN, OURS, BUCKETS):
        setup = Setup(way, str(model), str(data), 42, args.epochs, args.max_steps, os.cpu_count() or 1, extra)
        found[way] = run(setup)
        print(line(way, found[way], found[PLAIN], flops, tflops), flush=True)


if __name__ == "__main__":
    main()
