"""ReGLA: refined gated linear attention for PyTorch and Hugging Face (arXiv 2502.01578).

The names below load on first use: `import regla` is quick, and `import regla.ops` needs torch alone.
`import regla.models` makes the model type "regla" known to transformers' Auto classes.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "gated_linear_attention": "regla.ops",
    "log_refined_gate": "regla.ops",
    "regla_attention": "regla.ops",
    "safe_exp_key": "regla.ops",
    "safe_exp_query": "regla.ops",
    "ReGLAAttention": "regla.layers",
    "ReGLAState": "regla.layers",
    "ReGLAConfig": "regla.models",
    "ReGLAForCausalLM": "regla.models",
    "ReGLAForQuestionAnswering": "regla.models",
    "ReGLAForSequenceClassification": "regla.models",
    "ReGLAForTokenClassification": "regla.models",
    "ReGLAModel": "regla.models",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'regla' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
