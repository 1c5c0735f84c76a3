"""The arguments of a training run, checked where they are made.

No heavy imports: `regla train --help` takes its defaults from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MIXERS = ("regla", "hybrid", "softmax", "window")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16")
DEFAULT_VOCAB_SIZE = 2048
DEFAULT_STEPS = 300
DEFAULT_WINDOW = 64
RESUME = ("latest", "previous")
SHORTEST_SAVE = 50


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run of `regla.train.run.train`.

    The defaults make a small model that two CPU cores train on the embedded text in about a minute.
    """

    out: str
    """Folder for the model; must be new or empty, unless `resume` goes on in it."""
    data: tuple[str, ...] = ()
    """Text (.txt), records (.jsonl, .parquet) or tokens (.bin); where `dataset` is None, too: the embedded text."""
    dataset: str | None = None
    """NAME or NAME:CONFIG of a Hugging Face data set, or a folder of one: as much of it as the run needs."""
    text_field: str = "text"
    """Where a record has its text."""
    valid: tuple[str, ...] = ()
    """Files to validate on; none: the last tenth of every data file, which is then not trained on."""
    tokenizer: str | None = None
    """Folder of a tokenizer; None: train one on the training text."""
    vocab_size: int | None = None
    """Tokens of the tokenizer to train; None: DEFAULT_VOCAB_SIZE."""

    mixer: str = "regla"
    """regla: every layer ReGLA; softmax: every layer softmax attention; hybrid: ReGLA and softmax in turn; window:
    softmax attention over a sliding window in every layer."""
    window: int | None = None
    """Tokens that a layer of the mixer `window` attends to, its own included; None: DEFAULT_WINDOW."""
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    """None: as many as heads."""
    head_dim: int | None = None
    """None: hidden_size / heads."""
    intermediate_size: int | None = None
    """MLP width of the softmax model; None: 8/3 of hidden_size. Layers of ReGLA narrow it, see `regla.train.model`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of ReGLAConfig that win over all of the above."""

    steps: int | None = None
    tokens: int | None = None
    """Length of the run, in optimiser steps or in tokens (rounded up to whole steps); neither: DEFAULT_STEPS."""
    seq_len: int = 256
    batch_size: int = 4
    """Sequences per forward pass."""
    accumulate: int = 1
    """Forward passes per optimiser step."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: int | None = None
    """Steps of linear warm-up; None: a tenth of the run."""
    weight_decay: float = 0.1
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    """Of matrix products; weights, states and the loss stay float32."""
    compile: bool = False
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass: less memory, more time, the same numbers."""

    save_every: int | None = None
    """Steps between checkpoints; None: a tenth of the run, but at least SHORTEST_SAVE."""
    resume: str | None = None
    """Go on in `out`, from its newest checkpoint (`latest`) or the one before that (`previous`)."""
    eval_every: int | None = None
    """Steps between validations in the log; None: only one, at the end."""
    eval_context: int | None = None
    """Tokens of the windows in which the trained model is scored by position, too; None: not done."""
    tensorboard: bool = False
    """Write the log for TensorBoard, too."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "seq_len", "batch_size", "accumulate", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected a number above 0.")
        for name in (
            "kv_heads",
            "head_dim",
            "intermediate_size",
            "window",
            "vocab_size",
            "steps",
            "tokens",
            "save_every",
            "eval_every",
            "eval_context",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{_flag(name)} is {value}, expected a number above 0.")
        for name in ("warmup", "weight_decay", "seed"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{_flag(name)} is {value}, expected 0 or more.")
        for name, allowed in (("mixer", MIXERS), ("device", DEVICES), ("dtype", DTYPES), ("resume", (None, *RESUME))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{_flag(name)} is {getattr(self, name)!r}, expected one of {', '.join(map(str, allowed))}."
                )
        if self.window is not None and self.mixer != "window":
            raise ValueError(
                f"--window {self.window} is given with --mixer {self.mixer}; it is of --mixer window: leave one out."
            )
        if self.steps is not None and self.tokens is not None:
            raise ValueError("Both --steps and --tokens are given; give one of them.")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError("Both --tokenizer and --vocab-size are given; the size is that of a tokenizer to train.")
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(
                f"--hidden-size {self.hidden_size} is no multiple of --heads {self.heads}; "
                "change one or give --head-dim."
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"--heads {self.heads} is no multiple of --kv-heads {self.kv_heads}; change one of them.")

    @property
    def tokens_per_step(self) -> int:
        return self.accumulate * self.batch_size * self.seq_len

    @property
    def total_steps(self) -> int:
        if self.tokens is not None:
            return -(-self.tokens // self.tokens_per_step)
        return DEFAULT_STEPS if self.steps is None else self.steps

    @property
    def save_steps(self) -> int:
        return max(SHORTEST_SAVE, self.total_steps // 10) if self.save_every is None else self.save_every

    @property
    def warmup_steps(self) -> int:
        return self.total_steps // 10 if self.warmup is None else self.warmup


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
