"""The parts of the reference job: fine-tuning BERT on sentence pairs."""
