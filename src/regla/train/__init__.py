"""Training from scratch: the `model`, the steps (`loop`), a whole `run`."""
