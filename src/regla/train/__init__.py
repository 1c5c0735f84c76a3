"""Training: text to tokens (`data`, `embedded`, `tokenizer`), the `model`, the steps (`loop`), a whole `run`."""
