"""The arguments of a conversion, checked where they are made. No heavy imports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regla.runtime.errors import OptionError, check_choice, check_count, check_number, check_seed
from regla.runtime.options import without_effect
from regla.train.config import DEVICES, DTYPES, RESUME

CALIBRATION_LENGTH = 512  # tokens of a sequence that layers are calibrated on
CALIBRATION_TOKENS = 8192
KEEP = "every-2"
BASELINES = ("relu", "hedgehog", "scalar", "fast_decay", "paper")  # of the paper's table 5, and its own
UNGATED = ("relu", "hedgehog")
MIXERS = ("additive", "delta", *BASELINES, "window")
PRESETS = ("distill", "paper", "lora")
ORIGINAL_LR = 0.1  # of the weights outside the mixers, in relation to theirs
LONG_LR = 0.1  # of the long-context stage, in relation to the others
LONG_SEQ_LEN = 2048
LARGEST_TOKENS = 10**12
WINDOW = 64  # tokens of --mixer window
WINDOW_DROPOUT = 0.1  # of a window branch, so that the recurrence learns to do without it
TEACHER, DISTANCE = "teacher", "distance"  # gates start from the original's attention, see `calibrate`
CONSTANT_HALF_LIFE = 14.0  # where gates start that are not told otherwise, in tokens

TRANSFER, DISTILLATION, CROSS_ENTROPY, LONG = (
    "attention transfer",
    "distillation",
    "cross-entropy",
    "long-context tuning",
)

_TRANSFER_SHARE = 1 / 3  # of the tokens before long-context tuning, unless told otherwise


@dataclass(frozen=True)
class StagePlan:
    """One stage of the training."""

    name: str
    steps: int
    batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.seq_len


@dataclass(frozen=True, kw_only=True)
class LinearizeConfig:
    """One conversion by `regla.linearize.linearize`; the defaults are the command's."""

    model: str = without_effect()
    """The original: a name on the Hugging Face hub, a folder or a .gguf file."""
    out: str | None = without_effect(None)
    """Folder for the converted model; must be new or empty, unless `resume`. A dry run needs none."""
    init: str | None = None
    """Folder of a converted model to go on from, with `model` as its teacher; None: convert `model` itself."""
    keep: str | Sequence[int] | None = None
    """Layers that keep softmax attention, see `regla.linearize.layer_types`; "auto:N" or "auto:P%" to choose that many
    after attention transfer. None: KEEP, or those of `init`."""
    mixer: str | None = None
    """What takes the place of softmax attention: the "additive" or the "delta" rule; "relu", "hedgehog", "scalar",
    "fast_decay" or "paper": linear attention with these parts and the paper's layer norm, ReGLA's own as "paper",
    without calibration; "window": softmax attention over the last `window` tokens and the first four, without training.
    None: "additive", or that of `init`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Options of the mixer over those of its name (`regla.models.student_configuration.MIXER`)."""
    window: int | None = None
    """Tokens of the mixer "window"; None: WINDOW."""
    window_branch: int | None = None
    """Tokens of a softmax attention beside the recurrence of linear layers; None: they have none."""
    window_sinks: int | None = None
    """First tokens of a text that it sees, too; None: four."""
    window_dropout: float | None = None
    """How likely it is, in training, that a sequence goes without it; None: WINDOW_DROPOUT."""
    preset: str = "distill"
    """How it is trained: "distill", "paper" (cross-entropy alone) or "lora" (distill by adapters)."""
    tokens: int | str = 0
    """To train on in all stages together, such as 60_000_000 or "60M"; 0 converts and calibrates only."""
    transfer_tokens: int | str | None = None
    """How many of them go to attention transfer; None: a third of those before long-context tuning, or none if no
    layer is new."""
    long_tokens: int | str = 0
    """How many of them go to long-context tuning."""
    long_seq_len: int | None = None
    """Tokens of its sequences; None: LONG_SEQ_LEN."""
    gate_start: str | float | None = None
    """Where the forget gates start: "teacher", at the half-life whose output is nearest to the original's; "distance",
    at the mean distance that its attention looks back; or a half-life in tokens. None: "teacher", or CONSTANT_HALF_LIFE
    without calibration."""
    data: tuple[str, ...] = without_effect(())
    """Text or token files to calibrate and train on; none: the embedded text."""
    text_field: str = without_effect("text")
    """Name of the text in a record."""
    valid: tuple[str, ...] = without_effect(())
    """Files to validate on; none: the last tenth of every data file, which is then not trained on."""
    valid_tokens: int = without_effect(100_000)
    """Tokens of each validation source that are scored, at most."""
    calibration_tokens: int | None = None
    """0: do not calibrate. None: CALIBRATION_TOKENS, or 0 with the preset "paper" and with BASELINES."""
    seq_len: int = 512
    batch_size: int = 16
    lr: float = 1e-3
    """Peak learning rate of the mixers."""
    original_lr: float | None = None
    """That of all other weights in distillation; None: ORIGINAL_LR times `lr`."""
    seed: int = 0
    device: str = without_effect("auto")
    dtype: str = "float32"
    """Of matrix products in training and scoring, see `regla.runtime.device`."""
    compile: bool = without_effect(False)
    dry_run: bool = without_effect(False)
    save_every: int | None = without_effect(None)
    """Steps between checkpoints; None: a tenth of a stage, but at least 50."""
    resume: str | None = without_effect(None)
    """Go on in `out`, from the newest checkpoint of its stage (`latest`) or the one before that (`previous`)."""

    def __post_init__(self) -> None:
        for name in ("tokens", "transfer_tokens", "long_tokens"):
            object.__setattr__(self, name, token_count(name, getattr(self, name)))
        if self.keep is None and self.init is None:
            object.__setattr__(self, "keep", KEEP)
        elif self.keep is not None and not isinstance(self.keep, str):
            object.__setattr__(self, "keep", ",".join(map(str, self.keep)))
        if self.out is None and not self.dry_run:
            raise OptionError("{out} is missing; name a new folder for the model, or use {dry_run}.")
        for name in ("valid_tokens", "seq_len", "batch_size", "save_every", "window", "window_branch", "long_seq_len"):
            check_count(name, getattr(self, name))
        check_count("window_sinks", self.window_sinks, least=0)
        check_number("window_dropout", self.window_dropout, zero=True)
        if self.window_dropout is not None and self.window_dropout >= 1:
            raise OptionError("{window_dropout} is {value}, expected a share below 1.", value=self.window_dropout)
        check_seed(self.seed)
        check_number("lr", self.lr)
        check_number("original_lr", self.original_lr)
        for name, allowed in (
            ("mixer", MIXERS if self.mixer is not None else (None,)),
            ("preset", PRESETS),
            ("device", DEVICES),
            ("dtype", DTYPES),
            ("resume", (None, *RESUME)),
        ):
            check_choice(name, getattr(self, name), allowed)
        if self.init is not None and self.keep is None and self.tokens == 0:
            raise OptionError("{init} without {tokens} or {keep} changes nothing; give one of them.")
        self._settle_start()
        self._check_stages()
        self._check_mixer()

    def _settle_start(self) -> None:
        """Fill in and check what depends on the preset: calibration and the start of the gates."""
        plain = self.preset == "paper" or self.mixer in ("window", *BASELINES)
        if self.gate_start is not None and self.mixer in UNGATED:
            raise OptionError("{gate_start} is given, but {mixer} {value} has no gate; leave it out.", value=self.mixer)
        if self.calibration_tokens is None:
            object.__setattr__(self, "calibration_tokens", 0 if plain else CALIBRATION_TOKENS)
        assert self.calibration_tokens is not None
        check_count("calibration_tokens", self.calibration_tokens, least=0)
        if 0 < self.calibration_tokens < 2 * CALIBRATION_LENGTH:
            raise OptionError(
                "{calibration_tokens} is {value}, expected 0 (none) or at least {least}: a sequence of {length} to "
                "calibrate on, and one to check it.",
                value=self.calibration_tokens,
                least=2 * CALIBRATION_LENGTH,
                length=CALIBRATION_LENGTH,
            )
        if self.gate_start is None:
            object.__setattr__(self, "gate_start", TEACHER if self.calibration_tokens else CONSTANT_HALF_LIFE)
        if self.gate_start in (TEACHER, DISTANCE):
            if not self.calibration_tokens:
                raise OptionError(
                    "{gate_start} {value} is measured on the calibration's tokens, but {calibration_tokens} is 0; give "
                    "a half-life in tokens, such as {gate_start} 14.",
                    value=self.gate_start,
                )
            return
        try:
            object.__setattr__(self, "gate_start", float(self.gate_start))  # type: ignore[arg-type]
        except ValueError:
            raise OptionError(
                "{gate_start} is {value!r}, expected teacher, distance or a half-life in tokens such as 14.",
                value=self.gate_start,
            ) from None
        check_number("gate_start", self.gate_start)  # type: ignore[arg-type]

    def _check_mixer(self) -> None:
        if self.init is not None:
            for name in ("mixer", "overrides", "window_branch"):
                if getattr(self, name):
                    raise OptionError(
                        f"Both {{init}} and {{{name}}} are given; the mixers are those of the folder: leave one out."
                    )
        if self.window is not None and self.mixer != "window":
            raise OptionError("{window} is given without {mixer} window; leave it out.")
        for name in ("window_sinks", "window_dropout"):
            if getattr(self, name) is not None and self.window_branch is None:
                raise OptionError(f"{{{name}}} is given without {{window_branch}}; say how many tokens it has.")
        if self.mixer == "window":
            for name in ("tokens", "overrides", "window_branch", "calibration_tokens"):
                if getattr(self, name):
                    raise OptionError(f"{{mixer}} window is not trained, but {{{name}}} is given; leave it out.")
        if self.keep == "all" and self.preset != "paper":
            raise OptionError(
                "{keep} all leaves the model as it is, which has nothing to learn from itself; it goes with {preset} "
                "paper, which trains it on the text."
            )
        if self.chooses_layers and self.transfer == 0:
            raise OptionError(
                "{keep} {value} chooses layers after attention transfer, which this conversion does not have; give "
                "{tokens} with {preset} distill or lora, or name the layers.",
                value=self.keep,
            )

    def _check_stages(self) -> None:
        """Raise ValueError where a stage would have no step."""
        if self.transfer_tokens is not None and self.preset == "paper":
            raise OptionError("{preset} paper has no attention transfer; leave {transfer_tokens} out.")
        if self.long_seq_len is not None and not self.long_tokens:
            raise OptionError("{long_seq_len} is given without {long_tokens}; say how many tokens.")
        parts = int(self.transfer_tokens or 0) + int(self.long_tokens)
        if parts > int(self.tokens):
            raise OptionError(
                "{transfer_tokens} and {long_tokens} are {parts} together, expected at most {total}, since {tokens} "
                "counts them.",
                parts=parts,
                total=self.tokens,
            )
        for stage in self.stages:
            if stage.steps:
                continue
            step = stage.batch_size * stage.seq_len
            name, least = "tokens", int(self.long_tokens) + (2 * step if self.transfer is None else step)
            if stage.name == LONG:
                name, least = "long_tokens", step
            elif self.transfer:
                name, least = "tokens", self.transfer + int(self.long_tokens) + step
                if stage.name == TRANSFER:
                    name, least = "transfer_tokens", step
            raise OptionError(
                f"{{{name}}} is {{value}}, too few for a step of {{stage}} ({{batch}} x {{length}} tokens); give at "
                f"least {{least}}, or a smaller {{batch_size}} or {{seq_len}}.",
                value=getattr(self, name),
                stage=stage.name,
                batch=stage.batch_size,
                length=stage.seq_len,
                least=least,
            )

    @property
    def chooses_layers(self) -> bool:
        return isinstance(self.keep, str) and self.keep.startswith("auto")

    @property
    def transfer(self) -> int | None:
        """Tokens of attention transfer; None: a share of all."""
        if self.preset == "paper" or not self.tokens:
            return 0
        if self.transfer_tokens is not None:
            return int(self.transfer_tokens)
        return 0 if self.keep is None else None

    @property
    def stages(self) -> list[StagePlan]:
        """The stages of the training that have tokens, in order; each has as many whole steps as its tokens hold."""
        long, transfer = int(self.long_tokens), self.transfer
        rest = int(self.tokens) - long
        if transfer is None:
            step = self.batch_size * self.seq_len
            transfer = max(1, round(rest // step * _TRANSFER_SHARE)) * step
        long_length = self.long_seq_len or LONG_SEQ_LEN
        stages = []
        for name, tokens, batch_size, seq_len in (
            (TRANSFER, transfer, self.batch_size, self.seq_len),
            (CROSS_ENTROPY if self.preset == "paper" else DISTILLATION, rest - transfer, self.batch_size, self.seq_len),
            (LONG, long, max(1, self.batch_size * self.seq_len // long_length), long_length),
        ):
            if tokens:
                stages.append(StagePlan(name, max(0, tokens) // (batch_size * seq_len), batch_size, seq_len))
        return stages


def token_count(name: str, value: int | str | None) -> int | None:
    """A number of tokens, from a number or from text such as "60M", "500k" or "1.5B".

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+|\d*\.\d+)([kKmMbB]?)", value.strip().replace("_", "").replace(",", ""))
        if match is None:
            raise OptionError(
                f"{{{name}}} is {{value!r}}, expected a number of tokens such as 60M or 500000.", value=value
            )
        value = round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])
    check_count(name, value, least=0, most=LARGEST_TOKENS)
    return value
