"""ReGLA: refined gated linear attention for PyTorch and Hugging Face (arXiv 2502.01578).

The names below load on first use, so that `import regla.ops` needs torch alone. `import regla` makes the model type
"regla" known to transformers' Auto classes, whichever of the two is imported first.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
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


class _RegisterWithAutoClasses(importlib.abc.MetaPathFinder):
    """Imports ReGLAConfig, which registers itself, as soon as transformers' module of AutoConfig has been imported."""

    target = "transformers.models.auto.configuration_auto"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            importlib.import_module("regla.models.configuration")

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if _RegisterWithAutoClasses.target in sys.modules:
    importlib.import_module("regla.models.configuration")
else:
    sys.meta_path.insert(0, _RegisterWithAutoClasses())
