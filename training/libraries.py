"""Import the libraries of the reference job, ahead of a process that forks its ranks."""

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

import training.data
import training.engine
import training.store
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
