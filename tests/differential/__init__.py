"""Small programs that observe their own process, run under torchrun and under `launch`, and compared value by value."""
