"""Imports of the server from which the ranks of the kill schedules are forked."""

from __future__ import annotations

from transformers import PrinterCallback, Trainer, TrainingArguments  # noqa: F401

import tests.chaos.programs.kill_targets  # noqa: F401
import training.integrations.transformers
import training.loop.agreed
import training.loop.evaluation
import training.loop.saved  # noqa: F401
