"""The arguments of a training run, checked where they are made.

No heavy imports: `regla train --help` takes its defaults from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from regla.data.bad import MAX_BAD_RECORDS
from regla.runtime.errors import OptionError, check_choice, check_count, check_number, check_seed
from regla.runtime.options import added_later, without_effect

MIXERS = ("regla", "hybrid", "softmax", "window", "paper")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16")
DEFAULT_VOCAB_SIZE = 2048
DEFAULT_STEPS = 300
DEFAULT_WINDOW = 64
DEFAULT_SOFTMAX_EVERY = 2
TASKS = ("mqar",)
DEFAULT_PAIRS = (4, 8, 16)
RESUME = ("latest", "previous")
SAMPLING = ("random", "epochs")
PARALLEL = ("ddp", "fsdp", "sequence")
SHORTEST_SAVE = 50
MOST_SKIPPED = 10
_MOST_TOKENS = 2**53


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the training loop needs to know, whatever model and loss it trains."""

    steps: int | None = None
    tokens: int | None = None
    """Length of the run, in optimiser steps or in tokens (rounded up to whole steps); neither: DEFAULT_STEPS."""
    seq_len: int = 256
    batch_size: int = 4
    """Sequences per forward pass, of all processes together."""
    accumulate: int = 1
    """Forward passes per optimiser step."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: int | None = None
    """Steps of linear warm-up; None: a tenth of the run."""
    weight_decay: float = 0.1
    """Of the weights of linear maps, embeddings and convolutions; nothing else decays."""
    seed: int = 0
    dtype: str = "float32"
    """Of matrix products; weights, states and the loss stay float32. float32 is IEEE float32 on a GPU, too; bfloat16
    leaves some products in float32, which a GPU computes in TF32 while it trains."""
    compile: bool = without_effect(False)
    activation_checkpointing: bool = without_effect(False)
    """Compute each layer's activations again in the backward pass: less memory, more time, the same numbers."""
    save_every: int | None = without_effect(None)
    """Steps between checkpoints; None: a tenth of the run, but at least SHORTEST_SAVE."""
    eval_every: int | None = without_effect(None)
    """Steps between validations in the log; None: only one, at the end."""
    inspect_every: int | None = without_effect(None)
    """Steps between looks at the gates and states of linear layers, for the log; None: those of `eval_every`."""
    max_skipped_steps: int | None = without_effect(None)
    """How many of the last 100 steps may be skipped because their loss or gradient is not finite; one more ends the
    run. None: a tenth of the run, but at most MOST_SKIPPED."""

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "batch_size", "accumulate", "save_every", "eval_every", "inspect_every"):
            check_count(name, getattr(self, name))
        check_count("tokens", self.tokens, most=_MOST_TOKENS)
        for name in ("warmup", "max_skipped_steps"):
            check_count(name, getattr(self, name), least=0)
        check_number("lr", self.lr)
        check_number("weight_decay", self.weight_decay, zero=True)
        check_seed(self.seed)
        check_choice("dtype", self.dtype, DTYPES)
        if self.steps is not None and self.tokens is not None:
            raise OptionError("Both {steps} and {tokens} are given; give one of them.")

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
    def most_skipped(self) -> int:
        return min(MOST_SKIPPED, self.total_steps // 10) if self.max_skipped_steps is None else self.max_skipped_steps

    @property
    def warmup_steps(self) -> int:
        return self.total_steps // 10 if self.warmup is None else self.warmup


def _model(default: Any) -> Any:
    """A field that describes a new model: with `init` it keeps its default."""
    return field(default=default, metadata={"model": True})


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """One run of `regla.train.run.train`.

    The defaults make a small model that two CPU cores train on the embedded text in about a minute.
    """

    out: str = without_effect()
    """Folder for the model; must be new or empty, unless `resume` goes on in it."""
    init: str | None = without_effect(None)
    """Folder of a model to start from (trained or converted): its weights, config and tokenizer; None: a new model."""
    data: tuple[str, ...] = without_effect(())
    """Text (.txt), records (.jsonl, .parquet) or tokens (.bin), or folders of such files; where `dataset` is None, too:
    the embedded text."""
    data_weights: tuple[float, ...] | None = added_later(None)
    """Shares of the tokens to train on, for each of `data` and then `dataset`; None: in proportion to their tokens."""
    dataset: str | None = without_effect(None)
    """NAME or NAME:CONFIG of a Hugging Face data set, or a folder of one: as much of it as the run needs."""
    text_field: str = without_effect("text")
    """Where a record has its text."""
    max_bad_records: int = without_effect(MAX_BAD_RECORDS)
    """How many records that cannot be used may be left out."""
    token_cache: str | None = without_effect(None)
    """Folder for the tokens of text files, which are then read from there; None: text and tokens are in memory."""
    verify_data: bool = without_effect(True)
    """Compare every token file with its checksum before the first step."""
    sampling: str = added_later("random")
    """random: sequences from random places; epochs: each sequence of a source once before any comes again."""
    reset_at_documents: bool = added_later(False)
    """No token sees a document before its own: states start empty, softmax attention is masked, positions restart."""
    valid: tuple[str, ...] = without_effect(())
    """Files to validate on; none: the last tenth of every data file, which is then not trained on."""
    tokenizer: str | None = without_effect(None, model=True)
    """Folder of a tokenizer; None: train one on the training text."""
    vocab_size: int | None = _model(None)
    """Tokens of the tokenizer to train, or ids of the task; None: DEFAULT_VOCAB_SIZE."""

    carry_state: bool = False
    """Read the text in order, each sequence on from the one before in its row of the batch, with the states of linear
    layers, gradients cut between them (truncated backpropagation); see `regla.train.carry`. False: random crops."""

    task: str | None = None
    """In place of text: mqar, multi-query associative recall (see `regla.eval.probes.tokens`), new sequences for every
    batch; loss and scores are of the answers alone."""
    pairs: tuple[int, ...] | None = None
    """Of mqar: numbers of pairs in a sequence, drawn evenly; None: DEFAULT_PAIRS."""
    gaps: tuple[int, ...] | None = None
    """Of mqar: tokens of noise between pairs and queries, drawn evenly; those that fit, with the pairs, into seq_len.
    None: no gap."""

    mixer: str = _model("regla")
    """regla: every layer ReGLA; softmax: every layer softmax attention; hybrid: ReGLA, and every softmax_every-th layer
    softmax; window: every layer softmax attention over a sliding window; paper: every layer ReGLA in the paper's own
    form, `regla.layers.defaults.PAPER`."""
    softmax_every: int | None = _model(None)
    """Of the mixer `hybrid`: 2 is ReGLA and softmax in turn, 4 one layer in four; None: DEFAULT_SOFTMAX_EVERY."""
    window: int | None = _model(None)
    """Tokens that a softmax layer of the mixers `window` and `hybrid` attends to, its own included, so that memory does
    not grow with the text; None: DEFAULT_WINDOW of `window`, all of `hybrid`."""
    hidden_size: int = _model(128)
    layers: int = _model(4)
    heads: int = _model(4)
    kv_heads: int | None = _model(None)
    """None: as many as heads."""
    head_dim: int | None = _model(None)
    """None: hidden_size / heads."""
    intermediate_size: int | None = _model(None)
    """MLP width of the softmax model; None: 8/3 of hidden_size. Layers of ReGLA narrow it, see `regla.train.model`."""
    overrides: Mapping[str, Any] = field(default_factory=dict, metadata={"model": True})
    """Arguments of ReGLAConfig that win over all of the above."""

    device: str = without_effect("auto")
    parallel: str = without_effect("ddp")
    """How the processes that torchrun started share a step, see `regla.train.parallel`: ddp or fsdp, the sequences of a
    batch; sequence, the tokens of every sequence. Without effect in one process."""
    sequence_parallel_size: int | None = without_effect(None)
    """Of `parallel` sequence: how many processes share a sequence; groups of so many share the sequences of a batch.
    None: all of them."""
    resume: str | None = without_effect(None)
    """Go on in `out`, from its newest checkpoint (`latest`) or the one before that (`previous`)."""
    eval_context: int | None = without_effect(None)
    """Tokens of the windows in which the trained model is scored by position, too; None: not done."""
    tensorboard: bool = without_effect(False)
    """Write the log for TensorBoard, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("hidden_size", "layers", "heads", "window", "kv_heads", "head_dim", "intermediate_size", "vocab_size")
        for name in (*sizes, "eval_context", "sequence_parallel_size"):
            check_count(name, getattr(self, name))
        check_choice("mixer", self.mixer, MIXERS)
        check_choice("device", self.device, DEVICES)
        check_choice("parallel", self.parallel, PARALLEL)
        check_choice("resume", self.resume, (None, *RESUME))
        if self.sequence_parallel_size is not None and self.parallel != "sequence":
            raise OptionError(
                "{sequence_parallel_size} {value} is given with {parallel} {other}; it is of {parallel} sequence: "
                "leave one out.",
                value=self.sequence_parallel_size,
                other=self.parallel,
            )
        if self.init is not None:
            self._check_init()
        self._check_data()
        self._check_task()
        if self.tokenizer is not None and self.vocab_size is not None:
            raise OptionError("Both {tokenizer} and {vocab_size} are given; the size is that of a tokenizer to train.")
        if self.window is not None and self.mixer not in ("window", "hybrid"):
            raise OptionError(
                "{window} {value} is given with {mixer} {other}; it is of {mixer} window and hybrid: leave one out.",
                value=self.window,
                other=self.mixer,
            )
        if self.softmax_every is not None and self.mixer != "hybrid":
            raise OptionError(
                "{softmax_every} {value} is given with {mixer} {other}; it is of {mixer} hybrid: leave one out.",
                value=self.softmax_every,
                other=self.mixer,
            )
        if self.softmax_every is not None and not 2 <= self.softmax_every <= self.layers:
            raise OptionError(
                "{softmax_every} is {value}, expected a number from 2 to {layers} {depth}; for one kind of layer use "
                "{mixer}.",
                value=self.softmax_every,
                depth=self.layers,
            )
        if self.head_dim is None and self.hidden_size % self.heads:
            raise OptionError(
                "{hidden_size} {width} is no multiple of {heads} {number}; change one or give {head_dim}.",
                width=self.hidden_size,
                number=self.heads,
            )
        if self.heads % (self.kv_heads or self.heads):
            raise OptionError(
                "{heads} {number} is no multiple of {kv_heads} {groups}; change one of them.",
                number=self.heads,
                groups=self.kv_heads,
            )

    def _check_data(self) -> None:
        check_count("max_bad_records", self.max_bad_records, least=0)
        check_choice("sampling", self.sampling, SAMPLING)
        if self.data_weights is not None:
            sources = len(self.data) + (self.dataset is not None)
            if len(self.data_weights) != sources:
                raise OptionError(
                    "{data_weights} has {count} numbers, but {data} and {dataset} name {sources} sources; give one for "
                    "each.",
                    count=len(self.data_weights),
                    sources=sources,
                )
            for weight in self.data_weights:
                check_number("data_weights", weight)
        for name in ("data_weights", "reset_at_documents"):
            if self.carry_state and getattr(self, name):
                raise OptionError(
                    f"Both {{carry_state}} and {{{name}}} are given; carried states read all text in its order and are "
                    "empty behind a document: leave one out."
                )
        if self.carry_state and self.sampling != "random":
            raise OptionError("{carry_state} reads all text in its order; leave it or {sampling} out.")
        if self.token_cache is not None and self.tokenizer is None and self.init is None:
            raise OptionError(
                "{token_cache} is given without {tokenizer}; name the tokenizer of the tokens there, or leave it out."
            )
        if self.reset_at_documents and self.parallel == "sequence":
            raise OptionError(
                "Both {reset_at_documents} and {parallel} sequence are given, which passes states on from part to part "
                "of a sequence; leave one out."
            )

    def _check_task(self) -> None:
        check_choice("task", self.task, (None, *TASKS))
        for name, least in (("pairs", 1), ("gaps", 0)):
            values = getattr(self, name)
            if values is not None and self.task is None:
                raise OptionError(f"{{{name}}} is given without {{task}}; it is of the task mqar: leave it out.")
            for value in values or ():
                check_count(name, value, least=least)
        text = ("init", "data", "data_weights", "dataset", "valid", "reset_at_documents", "token_cache", "tokenizer")
        for name in (*text, "eval_context", "carry_state"):
            if self.task is not None and getattr(self, name):
                raise OptionError(
                    f"Both {{task}} and {{{name}}} are given; a task makes its own sequences: leave one out."
                )

    def _check_init(self) -> None:
        for entry in fields(self):
            default = {} if entry.name == "overrides" else entry.default
            if entry.metadata.get("model") and getattr(self, entry.name) != default:
                raise OptionError(
                    f"Both {{init}} and {{{entry.name}}} are given; the model and its tokenizer are those of the "
                    "folder: leave one out."
                )
