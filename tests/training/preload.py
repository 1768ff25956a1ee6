"""Imports of the server of forked ranks: all modules of the reference job."""

from __future__ import annotations

import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401
from accelerate import Accelerator  # noqa: F401
from datasets import load_from_disk  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertTokenizer,
    DataCollatorWithPadding,
    get_scheduler,
)
