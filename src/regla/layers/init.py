"""How a mixer starts: the one place that names each of its parameters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import init

from regla.layers.attention import ReGLAAttention
from regla.layers.gates import HalfLife, check_gate_start


def init_linear_attention(
    module: ReGLAAttention,
    *,
    std: float,
    qk_std: float | None = None,
    gate_bias: float = 0.0,
    refine_bias: float = 0.0,
    gate_half_life: HalfLife | None = None,
    gate_half_life_over: str = "channels",
) -> None:
    """Initialise every parameter of a mixer in place.

        weights of q, k                             normal(0, qk_std); None: std
        weights of v, o, output gate, gates         normal(0, std)
        short convolution                           normal(0, std) around its identity path
        gains of the norms                          1
        calibration of q and k                      the identity: means 0, scales 1
        feature maps                                as their class says, projections that do not train included
        share of the window branch                  logit 0: one half
        biases of q, k, v, o and of layer norms     0
        bias of the forget gates                    gate_bias   (0: g = 1/2, a memory of about one token)
        bias of the refining gate                   refine_bias (0: r = 1/2, the refined gate equals the plain one)

    gate_half_life n says the same in tokens: the decay starts at F = 2^(-1/n), the bias at logit(F), or where F is a
    root of the sigmoid at logit(F^root); gate_bias 0 is a half-life of 1 without a root. A pair (shortest, longest)
    spaces n evenly in its logarithm over the channels of each head, or with gate_half_life_over "heads" over the heads.
    Where both axes decay, each starts so. The "mamba2" gate has a start of its own.

    Raises:
        ValueError: a parameter that this list does not name; a half-life that does not fit.
    """
    check_gate_start(
        type(module.gate),
        gate_axis=module.gate.axis,
        gate_bias=gate_bias,
        refine_bias=refine_bias,
        gate_half_life=gate_half_life,
        gate_half_life_over=gate_half_life_over,
    )
    for name, parameter in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in ("q_norm.original", "k_norm.original"):
            continue  # a converted model's own norms, which its class initialises
        if owner in ("q_norm", "k_norm", "norm"):
            (init.ones_ if kind == "weight" else init.zeros_)(parameter)
        elif owner == "qk_calibration":
            (init.ones_ if kind.endswith("scale") else init.zeros_)(parameter)
        elif owner == "window":
            init.zeros_(parameter)
        elif owner == "feature_map":
            _copy(parameter, module.feature_map.start(kind))
        elif owner == "gate.refine_proj" and kind == "bias":
            init.constant_(parameter, refine_bias)
        elif owner.startswith("gate.") and kind == "bias":
            if gate_half_life is None:
                init.constant_(parameter, gate_bias)
            else:
                bias = module.gate.half_life_bias(owner.removeprefix("gate."), gate_half_life, gate_half_life_over)
                _copy(parameter, bias)
        elif owner == "gate" and module.gate.starts_itself:
            _copy(parameter, module.gate.start(kind))
        elif owner.endswith("_proj") and kind == "bias":  # of beta, too: half of the old answer is replaced
            init.zeros_(parameter)
        elif owner in ("q_proj", "k_proj"):
            init.normal_(parameter, 0.0, std if qk_std is None else qk_std)
        elif kind == "weight" and (owner.endswith("_proj") or owner in ("conv", "output_gate", *_GATE_WEIGHTS)):
            init.normal_(parameter, 0.0, std)
        else:
            raise ValueError(f"parameter {name} of a linear attention layer has no initial distribution: add it here")
    for name, buffer in module.feature_map.named_buffers():
        _copy(buffer, module.feature_map.start(name))


_GATE_WEIGHTS = ("gate.proj", "gate.down")


@torch.no_grad()
def _copy(parameter: Tensor, start: Tensor) -> None:
    # torch.nn.init has no copy. Inside transformers its functions pass over weights that a checkpoint gave, so marked.
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(start)
