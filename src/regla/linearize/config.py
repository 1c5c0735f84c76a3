"""The arguments of a conversion, checked where they are made. No heavy imports."""

from __future__ import annotations

import math
from dataclasses import dataclass

CALIBRATION_LENGTH = 512  # tokens of a sequence that layers are calibrated on
KEEP = "every-2"
REST_LR = 0.1  # learning rate of everything but the mixers, in relation to theirs

#: Where the biases of the new forget gates start: a memory of about 20 tokens. The best of a short scan of attention
#: transfer on SmolLM2-135M (0, 1, 2, 3, 4, 6), with gates on the value axis. Not settled: sweep --gate-bias.
GATE_BIAS = 3.0

_LARGEST_SEED = 2**63 - 1
_TRANSFER_SHARE = 1 / 3  # of the steps go to attention transfer, unless told otherwise


@dataclass(frozen=True, kw_only=True)
class LinearizeConfig:
    """One conversion by `regla.linearize.driver.linearize`; the defaults are the command's."""

    model: str
    """The original: a name on the Hugging Face hub, a folder or a .gguf file."""
    out: str | None = None
    """Folder for the converted model; must be new or empty, unless `resume`. A dry run needs none."""
    init: str | None = None
    """Folder of a converted model to go on from, with `model` as its teacher; None: convert `model` itself."""
    keep: str | None = None
    """Layers that keep softmax attention, see `regla.linearize.layer_types`; None: KEEP, or those of `init`."""
    gate_bias: float = GATE_BIAS
    """Where the biases of the new forget gates start."""
    data: tuple[str, ...] = ()
    """Text or token files to calibrate and train on; none: the embedded text."""
    valid: tuple[str, ...] = ()
    """Files to validate on; none: the last tenth of every data file, which is then not trained on."""
    valid_tokens: int = 100_000
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
    device: str = "auto"
    dtype: str = "float32"
    """Of matrix products in training and scoring; weights, states and losses stay float32."""
    compile: bool = False
    dry_run: bool = False
    save_every: int | None = None
    """Steps between checkpoints; None: a tenth of a stage, but at least 50."""
    resume: str | None = None
    """Go on in `out`, from the newest checkpoint of its stage (`latest`) or the one before that (`previous`)."""

    def __post_init__(self) -> None:
        if self.keep is None and self.init is None:
            object.__setattr__(self, "keep", KEEP)
        if self.out is None and not self.dry_run:
            raise ValueError("--out is missing; name a new folder for the model, or add --dry-run.")
        for name in ("valid_tokens", "seq_len", "batch_size", "lr", "save_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{flag(name)} is {value}, expected a number above 0.")
        if not math.isfinite(self.gate_bias):
            raise ValueError(f"--gate-bias is {self.gate_bias}, expected a finite number.")
        if self.steps < 0:
            raise ValueError(f"--steps is {self.steps}, expected 0 or more.")
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ValueError(f"--seed is {self.seed}, expected 0 to {_LARGEST_SEED}.")
        if self.calibration_tokens < 2 * CALIBRATION_LENGTH:
            raise ValueError(
                f"--calibration-tokens is {self.calibration_tokens}, expected at least {2 * CALIBRATION_LENGTH}: "
                f"a sequence of {CALIBRATION_LENGTH} to calibrate on, and one to check it."
            )
        if self.transfer_steps is not None and not 0 <= self.transfer_steps <= self.steps:
            raise ValueError(
                f"--transfer-steps is {self.transfer_steps}, expected 0 to {self.steps}, since --steps counts them."
            )
        if self.init is not None and self.keep is None and self.steps == 0:
            raise ValueError("--init without --steps or --keep changes nothing; give one of them.")

    @property
    def stages(self) -> dict[str, int]:
        """Steps of each stage that has any."""
        transfer = self.transfer_steps
        if transfer is None:
            transfer = 0 if self.keep is None else round(self.steps * _TRANSFER_SHARE)
        stages = {"attention transfer": transfer, "distillation": self.steps - transfer}
        return {name: steps for name, steps in stages.items() if steps}


def flag(name: str) -> str:
    """The option that sets a field."""
    return "--" + name.replace("_", "-")
