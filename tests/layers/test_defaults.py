"""One place says what a mixer is by default, and what the paper's is."""

import dataclasses
import inspect

import torch

from regla.layers import ReGLAAttention, init_linear_attention
from regla.layers.defaults import DEFAULTS, PAPER, Mixer


def test_a_mixer_names_every_option():
    """What it left out would change with the defaults."""
    assert all(field.default is dataclasses.MISSING for field in dataclasses.fields(Mixer))
    layer = inspect.signature(ReGLAAttention.__init__).parameters
    sizes = {"self", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "value_head_dim", "out_bias"}
    sizes |= {"feature_dim", "horizon"}
    options = DEFAULTS.of_layer()
    assert layer.keys() - sizes == options.keys()
    for name, value in options.items():
        assert layer[name].default == value, name


@torch.no_grad()
def test_the_papers_mixer_is_its_equations():
    """W_o LayerNorm(S_t^T phi(q_t)), S_t = S_{t-1} Diag(F_t) + phi(k_t) v_t^T F_t the refined gate; no other part."""
    layer = ReGLAAttention(32, 4, **PAPER.of_layer()).double()
    init_linear_attention(layer, std=0.5)
    x = torch.randn(1, 12, 32, dtype=torch.float64)
    q, k, v, a, c = (
        projection(x).unflatten(-1, (4, 8))[0]
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.gate.proj, layer.gate.refine_proj)
    )
    g, r = torch.sigmoid(a), torch.sigmoid(c)
    F = (1 - r) * g**2 + r * (1 - (1 - g) ** 2)
    phi_q = (q - q.amax(-1, keepdim=True)).exp()
    phi_k = (k - k.amax((0, 2), keepdim=True)).exp()  # the paper's maximum, of the whole sequence
    S, h = torch.zeros(4, 8, 8, dtype=torch.float64), []
    for t in range(12):
        S = S * F[t, :, None] + phi_k[t, :, :, None] * v[t, :, None]
        h.append((S * phi_q[t, :, :, None]).sum(1))
    h = torch.stack(h)[None]
    normed = torch.nn.functional.layer_norm(h / h.abs().amax(-1, keepdim=True), (8,), eps=PAPER.norm_eps)
    torch.testing.assert_close(layer(x)[0], layer.o_proj(normed.flatten(2)), rtol=1e-9, atol=1e-9)
    names = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate", "norm"}
