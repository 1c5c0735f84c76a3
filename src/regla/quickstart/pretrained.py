"""A small pretrained GPT-NeoX that ships with the package, and its linearisation on a CPU.

`python -m regla.quickstart.teacher` made it; its card in `PRETRAINED` says from what, and what it scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regla.linearize.driver import linearize

PRETRAINED = Path(__file__).with_name("tiny-neox")
"""A model folder of transformers, with tokenizer and card."""


def linearize_pretrained(out: Path, *, steps: int) -> dict[str, Any]:
    """Make every layer of the model in `PRETRAINED` linear and train it on the embedded text for `steps` steps.

    Prints each stage, and how much of the perplexity that the conversion lost came back on held-out text.

    Returns:
        What `linearize.json` in `out` holds.
    """
    summary = linearize(
        str(PRETRAINED),
        out=str(out),
        keep="none",
        calibration_tokens=2048,
        tokens=steps * 1024,
        seq_len=256,
        batch_size=4,
        lr=3e-3,
        device="cpu",
    )
    assert summary is not None  # no dry run
    before, converted, trained = (summary["scores"][state][0]["perplexity"] for state in _STATES)
    print(
        f"Held-out perplexity: {before:.2f} with softmax attention, {converted:.2f} when all layers became linear, "
        f"{trained:.2f} after training: {trained / before:.3f} times the original's."
    )
    return summary


_STATES = ("original", "converted", "trained")
