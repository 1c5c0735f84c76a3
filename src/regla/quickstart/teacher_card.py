"""The model card of the pretrained model that ships with the package."""

from __future__ import annotations

from typing import Any

from regla.report.tables import markdown

_TEXT = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [gpt_neox, tiny]
---

# A small pretrained GPT-NeoX for tests and demonstrations

{parameters:,} parameters in the architecture of Pythia: parallel residuals, RoPE on a quarter of each head, biases,
input and output embeddings of their own. Softmax attention in all layers; weights in bfloat16. It belongs to the
package `regla`, whose quickstart turns it into a linear model. It is too small to be useful for anything else: what it
writes has the style of its texts, and no sense.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

## Text

- English books in the public domain, novels and essays of the 19th and early 20th century.
- The prose of Python's language reference (PSF licence), as `pydoc_data.topics` ships it with every CPython, {repeat}
  times; its last part is held out.

{text_tokens:,} tokens in all, of a byte-level BPE trained on the same text. {tokens:,} tokens were seen, so every text
was read {epochs:.1f} times.

## Validation

Held-out text in windows of {seq_len} tokens, float32, of the weights as they are here. `{embedded}` is the
last tenth of that text.

{scores}

## The command that made it

```sh
python -m regla.quickstart.teacher --data {data} --out DIR --tokens {tokens_asked} --repeat {repeat}
```

{seconds:.0f} s on {device}; {versions}.
"""


def teacher_card(summary: dict[str, Any]) -> str:
    """Markdown with Hugging Face's front matter, from what `regla.quickstart.teacher.train_teacher` returns."""
    arguments, scores = summary["arguments"], summary["validation"]
    body = [
        [row["name"], f"{row['tokens']:,}", f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.3f}"] for row in scores
    ]
    return _TEXT.format(
        parameters=summary["parameters"],
        repeat=arguments["repeat"],
        text_tokens=summary["text_tokens"],
        tokens=summary["tokens"],
        epochs=summary["tokens"] / summary["text_tokens"],
        seq_len=arguments["seq_len"],
        embedded=scores[-1]["name"],
        scores=markdown(["text", "tokens", "perplexity", "bits per byte"], body, numbers_from=1),
        data=" ".join(arguments["data"]),
        tokens_asked=arguments["tokens"],
        seconds=summary["seconds"],
        device=summary["device"],
        versions=", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
    )
