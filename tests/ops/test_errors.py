"""Bad input: one sentence with the value, the expectation and the fix."""

import pytest
import torch

from regla.ops import gated_linear_attention, regla_attention

B, T, H, K, V = 1, 6, 2, 4, 5


def arguments(**changes):
    values = {
        "q": torch.randn(B, T, H, K),
        "k": torch.randn(B, T, H, K),
        "v": torch.randn(B, T, H, V),
        "gate": torch.randn(B, T, H, V),
        "refine": torch.randn(B, T, H, V),
    }
    return values | changes


@pytest.fixture(autouse=True)
def _device():
    """On the CPU, where the numbers are checked without being asked."""


BAD = {
    "three dimensions": ({"q": torch.randn(T, H, K)}, r"q has shape \[6, 2, 4\]; expected four dimensions"),
    "integers": ({"k": torch.ones(B, T, H, K, dtype=torch.long)}, "k has dtype torch.int64; expected float32"),
    "no tokens": ({n: x[:, :0] for n, x in arguments().items()}, "at least one token"),
    "no query heads": (
        {"q": torch.randn(B, T, 0, K)},
        r"q has shape \[1, 6, 0, 4\]; expected at least one token, head",
    ),
    "no channels": (
        dict.fromkeys(("v", "gate", "refine"), torch.randn(B, T, H, 0)),
        r"v has shape \[1, 6, 2, 0\]; expected at least one token, head",
    ),
    "v length": ({"v": torch.randn(B, T + 1, H, V)}, r"v has shape \[1, 7, 2, 5\]; expected \[B, T, H, V\]"),
    "q channels": ({"q": torch.randn(B, T, H, K + 1)}, r"q has shape \[1, 6, 2, 5\]; expected \[B, T, HQ, K\]"),
    "q heads": ({"q": torch.randn(B, T, 3, K)}, "q has 3 heads and k has 2; .* must be a multiple"),
    "gate channels": (
        {"gate": torch.randn(B, T, H, 7), "refine": torch.randn(B, T, H, 7)},
        "gate has 7 channels; .*'value'.*expects 5 or 1",
    ),
    "axis": ({"gate_axis": "values"}, "gate_axis is 'values'; expected one of 'value', 'key', 'both'"),
    "key_max": ({"key_max": "max"}, "key_max is 'max'; expected one of 'decay', 'running', 'sequence'"),
    "backend": (
        {"backend": "cuda"},
        "backend is 'cuda'; expected one of 'auto', 'recurrent', 'chunked', 'native', 'triton'",
    ),
    "triton and the sequence's maximum": (
        {"backend": "triton", "key_max": "sequence"},
        "backend='triton' cannot run: key_max is 'sequence'",
    ),
    "refine alone": (
        {"refine": torch.randn(B, T, H, 1)},
        r"refine_v has shape \[1, 6, 2, 1\]; expected \[1, 6, 2, 5\]",
    ),
    "float16": ({"v": torch.randn(B, T, H, V).half()}, "v is float16.*use bfloat16 or float32"),
    "mask shape": ({"mask": torch.ones(B, T + 1).bool()}, r"mask has shape \[1, 7\]; expected \[B, T\] = \[1, 6\]"),
    "mask dtype": ({"mask": torch.ones(B, T)}, "mask has dtype torch.float32; expected torch.bool.*mask.bool"),
    "mask and packing": (
        {"mask": torch.ones(B, T).bool(), "cu_seqlens": torch.tensor([0, T])},
        "mask and cu_seqlens are both given",
    ),
    "packing start": (
        {"cu_seqlens": torch.tensor([1, T])},
        r"cu_seqlens is \[1, 6\]; expected boundaries that start at 0",
    ),
    "packing end": ({"cu_seqlens": torch.tensor([0, 3])}, "end at T = 6"),
    "packing order": ({"cu_seqlens": torch.tensor([0, 4, 3, T])}, "ascend"),
    "packing type": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens has shape .* expected integers"),
    "packing batch": (
        {n: x.expand(2, -1, -1, -1) for n, x in arguments().items()} | {"cu_seqlens": torch.tensor([0, T])},
        "cu_seqlens is given with B = 2; .*reshape to B = 1",
    ),
    "state alone": ({"initial_state": torch.zeros(B, H, K, V)}, "initial_state is a Tensor; expected the pair"),
    "state shape": (
        {"initial_state": (torch.zeros(B, H, V, K), torch.zeros(B, H))},
        r"initial_state has shape \[1, 2, 5, 4\]; expected \[N, H, K, V\] = \[1, 2, 4, 5\]",
    ),
    "m shape": (
        {"initial_state": (torch.zeros(B, H, K, V), torch.zeros(B))},
        r"m of initial_state has shape \[1\]; expected \[N, H\] = \[1, 2\]",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_regla_attention(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        regla_attention(**arguments(**changes))
    assert "\n" not in str(error.value)


def test_positive_decays():
    q, k, v = torch.randn(3, B, T, H, K).unbind(0)
    gk = -torch.rand(B, T, H, K)
    gk[0, 2, 1, 3] = 0.25
    with pytest.raises(ValueError, match=r"gk holds 0.25; log-decays .* at most 0: pass logsigmoid"):
        gated_linear_attention(q, k, v, gk)
    with pytest.raises(ValueError, match=r"gv holds nan"):
        gated_linear_attention(q, k, v, gv=torch.full((B, T, H, 1), torch.nan))
    gated_linear_attention(q, k, v, gk, validate=False)


@pytest.mark.parametrize("name", ["gk", "gv"])
def test_decay_shapes(name):
    q, k, v = torch.randn(3, B, T, H, K).unbind(0)
    with pytest.raises(
        ValueError, match=rf"{name} has shape \[1, 6, 2, 3\]; expected \[1, 6, 2, 4\] or \[1, 6, 2, 1\]"
    ):
        gated_linear_attention(q, k, v, **{name: -torch.rand(B, T, H, 3)})
