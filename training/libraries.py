"""Import the libraries of the reference job once, in the server process that ranks are forked from."""

import accelerate.tracking
import datasets
import safetensors.torch
import torch.distributed.fsdp
import torch.utils.tensorboard
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertTokenizer,
    DataCollatorWithPadding,
    get_scheduler,
)

import training.bert.record
import training.bert.tokens
import training.checkpoints.mirror
import training.loop.evaluation
import training.loop.saved
import training.reporting.report
import training.train

__all__ = [
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "BertForSequenceClassification",
    "BertTokenizer",
    "DataCollatorWithPadding",
    "accelerate",
    "datasets",
    "get_scheduler",
    "safetensors",
    "torch",
    "training",
]
