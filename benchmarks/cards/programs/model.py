"""Save a BERT with fresh weights: model.py FOLDER LAYERS WIDTH HEADS INTERMEDIATE."""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification
from transformers.utils import logging

from training.bert.model import load_tokenizer

folder, *numbers = sys.argv[1:]
layers, width, heads, intermediate = map(int, numbers)
logging.disable_progress_bar()
torch.manual_seed(0)
tokenizer = load_tokenizer("tiny")
tokenizer.save_pretrained(folder)
config = BertConfig(
    vocab_size=len(tokenizer),
    hidden_size=width,
    num_hidden_layers=layers,
    num_attention_heads=heads,
    intermediate_size=intermediate,
)
BertForSequenceClassification(config).save_pretrained(folder)
