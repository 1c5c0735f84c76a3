"""The arguments of a conversion, checked where they are made. No heavy imports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from regla.runtime.errors import OptionError, check_choice, check_count, check_number, check_seed
from regla.runtime.options import without_effect
from regla.train.config import DEVICES, DTYPES, RESUME

CALIBRATION_LENGTH = 512  # tokens of a sequence that layers are calibrated on
KEEP = "every-2"
REST_LR = 0.1  # learning rate of everything but the mixers, in relation to theirs

#: Where the biases of the new forget gates start: a memory of about 20 tokens. The best of a short scan of attention
#: transfer on SmolLM2-135M (0, 1, 2, 3, 4, 6), with gates on the value axis. Not settled: sweep --gate-bias.
GATE_BIAS = 3.0

_TRANSFER_SHARE = 1 / 3  # of the steps go to attention transfer, unless told otherwise


@dataclass(frozen=True, kw_only=True)
class LinearizeConfig:
    """One conversion by `regla.linearize.driver.linearize`; the defaults are the command's."""

    model: str = without_effect()
    """The original: a name on the Hugging Face hub, a folder or a .gguf file."""
    out: str | None = without_effect(None)
    """Folder for the converted model; must be new or empty, unless `resume`. A dry run needs none."""
    init: str | None = None
    """Folder of a converted model to go on from, with `model` as its teacher; None: convert `model` itself."""
    keep: str | Sequence[int] | None = None
    """Layers that keep softmax attention, see `regla.linearize.layer_types`; None: KEEP, or those of `init`."""
    gate_bias: float = GATE_BIAS
    """Where the biases of the new forget gates start."""
    data: tuple[str, ...] = without_effect(())
    """Text or token files to calibrate and train on; none: the embedded text."""
    text_field: str = without_effect("text")
    """Name of the text in a record."""
    valid: tuple[str, ...] = without_effect(())
    """Files to validate on; none: the last tenth of every data file, which is then not trained on."""
    valid_tokens: int = without_effect(100_000)
    """Tokens of each validation source that are scored, at most."""
    calibration_tokens: int = 4096
    steps: int = 0
    """Of both stages together; 0 converts and calibrates only."""
    transfer_steps: int | None = None
    """How many of them are attention transfer; None: a third, or none if no layer is new."""
    seq_len: int = 512
    batch_size: int = 16
    lr: float = 1e-3
    """Peak learning rate of the mixers in both stages; all other parameters learn at REST_LR times that."""
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
        if self.keep is None and self.init is None:
            object.__setattr__(self, "keep", KEEP)
        elif self.keep is not None and not isinstance(self.keep, str):
            object.__setattr__(self, "keep", ",".join(map(str, self.keep)))
        if self.out is None and not self.dry_run:
            raise OptionError("{out} is missing; name a new folder for the model, or use {dry_run}.")
        for name in ("valid_tokens", "seq_len", "batch_size", "save_every"):
            check_count(name, getattr(self, name))
        check_count("steps", self.steps, least=0)
        check_count("transfer_steps", self.transfer_steps, least=0)
        check_seed(self.seed)
        check_number("lr", self.lr)
        if not math.isfinite(self.gate_bias):
            raise OptionError("{gate_bias} is {value}, expected a finite number.", value=self.gate_bias)
        for name, allowed in (("device", DEVICES), ("dtype", DTYPES), ("resume", (None, *RESUME))):
            check_choice(name, getattr(self, name), allowed)
        if self.calibration_tokens < 2 * CALIBRATION_LENGTH:
            raise OptionError(
                "{calibration_tokens} is {value}, expected at least {least}: a sequence of {length} to calibrate on, "
                "and one to check it.",
                value=self.calibration_tokens,
                least=2 * CALIBRATION_LENGTH,
                length=CALIBRATION_LENGTH,
            )
        check_count("calibration_tokens", self.calibration_tokens)
        if self.transfer_steps is not None and self.transfer_steps > self.steps:
            raise OptionError(
                "{transfer_steps} is {value}, expected 0 to {total}, since {steps} counts them.",
                value=self.transfer_steps,
                total=self.steps,
            )
        if self.init is not None and self.keep is None and self.steps == 0:
            raise OptionError("{init} without {steps} or {keep} changes nothing; give one of them.")

    @property
    def stages(self) -> dict[str, int]:
        """Steps of each stage that has any."""
        transfer = self.transfer_steps
        if transfer is None:
            transfer = 0 if self.keep is None else round(self.steps * _TRANSFER_SHARE)
        stages = {"attention transfer": transfer, "distillation": self.steps - transfer}
        return {name: steps for name, steps in stages.items() if steps}
