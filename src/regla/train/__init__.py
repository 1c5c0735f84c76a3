"""Training: text to tokens (`data`, `embedded`, `tokenizer`), the `model`, the steps (`loop`), a whole `run`.

What a run keeps on the way: `checkpoint` and `log`; what ends it early: `signals`.
"""
