"""How a mixer starts: the one place that names each of its parameters."""

from __future__ import annotations

from torch.nn import init

from regla.layers.attention import ReGLAAttention


def init_linear_attention(
    module: ReGLAAttention, *, std: float, gate_bias: float = 0.0, refine_bias: float = 0.0
) -> None:
    """Initialise every parameter of a mixer in place.

        weights of q, k, v, o, output gate, gates   normal(0, std)
        short convolution                           normal(0, std) around its identity path
        gains of the norms                          1
        calibration of q and k                      the identity: means 0, scales 1
        biases of q, k, v, o and of layer norms     0
        bias of the forget gates                    gate_bias   (0: g = 1/2, a memory of about one token)
        bias of the refining gate                   refine_bias (0: r = 1/2, the refined gate equals the plain one)

    Raises:
        ValueError: a parameter that this list does not name.
    """
    for name, parameter in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in ("q_norm", "k_norm", "norm"):
            (init.ones_ if kind == "weight" else init.zeros_)(parameter)
        elif owner == "qk_calibration":
            (init.ones_ if kind.endswith("scale") else init.zeros_)(parameter)
        elif owner == "gate.refine_proj" and kind == "bias":
            init.constant_(parameter, refine_bias)
        elif owner.startswith("gate.") and kind == "bias":
            init.constant_(parameter, gate_bias)
        elif owner.endswith("_proj") and kind == "bias":
            init.zeros_(parameter)
        elif kind == "weight" and (owner.endswith("_proj") or owner in ("conv", "output_gate", *_GATE_WEIGHTS)):
            init.normal_(parameter, 0.0, std)
        else:
            raise ValueError(f"parameter {name} of a linear attention layer has no initial distribution: add it here")


_GATE_WEIGHTS = ("gate.proj", "gate.down")
