"""Whether a module is no more than its class says: only then may its weights be used in place of calling it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether `module` is one of `classes`, and calling it does nothing besides.

    Not so with hooks, another `forward`, a subclass (FSDP2, parametrizations and adapters make one), a compiled call,
    or parameters of their own kind (sharded, quantised).
    """
    own = module.__dict__
    if type(module) not in classes or has_hooks(module) or "forward" in own:
        return False
    if own.get("_compiled_call_impl") is not None:
        return False
    for x in module._parameters.values():
        if x is not None and type(x) is not nn.Parameter and type(x) is not Tensor:
            return False
    return True


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs any hook."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or _has_any_global_hook()
