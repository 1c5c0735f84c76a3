"""Each supported architecture: its weights in the right places whatever its layout, and what of it is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from regla.linearize import FAMILIES, calibrate, check_transfer, convert
from regla.linearize.load import load_config
from regla.linearize.losses import transfer_loss
from regla.models import register
from regla.models.families import Family, Projection, projection, separate, stacked, stacked_by_head
from regla.models.student import OriginalNorm, linear_attention
from tests.linearize.originals import FIRST, SHAPE, VARIANTS, original, stir
from tests.same import assert_same_model


def test_every_family_is_tested():
    assert {name.partition(",")[0] for name in VARIANTS} == set(FAMILIES) == set(FIRST)


@pytest.mark.parametrize("name", VARIANTS)
def test_transfer(name):
    model, tokens = original(name), torch.randint(97, (2, 30))
    pure = convert(model, "none", check=False)
    assert sorted(linear_attention(pure)) == [0, 1, 2]
    assert check_transfer(model, pure) <= 1e-4
    assert isinstance(pure, type(model))
    assert check_transfer(model, convert(model, [1], check=False)) <= 1e-4
    kept = convert(model, range(3))
    with torch.no_grad():
        assert torch.equal(kept(tokens).logits, model(tokens).logits)
        assert not torch.allclose(pure(tokens).logits, model(tokens).logits, rtol=0.1)


def three_blocks(attention, heads):
    """NeoX's heads read as if q, k and v were stacked."""
    return stacked("query_key_value")(attention, heads)


def keys_first(attention, heads):
    q, k, v = stacked("qkv_proj")(attention, heads)
    both = torch.cat([k.weight, v.weight, q.weight])
    return [Projection(weight, None) for weight in both.split(heads.rows)]


def not_transposed(attention, heads):
    """GPT-2's Conv1D taken for a Linear: its columns cut into q, k, v as if they were rows."""
    weight = attention.c_attn.weight.reshape(-1, attention.c_attn.weight.shape[0])
    biases = attention.c_attn.bias.split(heads.rows)
    return [Projection(*parts) for parts in zip(weight.split(heads.rows), biases, strict=True)]


def by_head(attention, heads):
    return stacked_by_head("c_attn")(attention, heads)


def swapped(attention, heads):
    q, k, v = (projection(getattr(attention, f"{letter}_proj")) for letter in "qkv")
    return [q, v, k]


def without_biases(attention, heads):
    return [
        Projection(weight, None if bias is None else torch.zeros_like(bias))
        for weight, bias in separate(attention, heads)
    ]


#: A slip in the row of a family.
SLIPS = {
    "gpt_neox: stacked": ("gpt_neox", {"qkv": three_blocks}),
    "phi3: another order": ("phi3", {"qkv": keys_first}),
    "gpt2: not transposed": ("gpt2", {"qkv": not_transposed}),
    "gpt2: by head": ("gpt2", {"qkv": by_head}),
    "llama: k for v": ("llama", {"qkv": swapped}),
    "mistral: k for v": ("mistral", {"qkv": swapped}),
    "granite: k for v": ("granite", {"qkv": swapped}),
    "qwen2: no biases": ("qwen2", {"qkv": without_biases}),
    "qwen3: no norm": ("qwen3", {"norm": None}),
    "qwen3_moe: no norm": ("qwen3_moe", {"norm": None}),
    "gemma3_text: no norm": ("gemma3_text", {"norm": None}),
}


@pytest.mark.parametrize(("name", "slip"), SLIPS.values(), ids=SLIPS)
def test_a_slip_in_a_row_is_found(name, slip, monkeypatch):
    """The self-check, or before it the count of weights, names the layer."""
    model = original(name)
    convert(model, [0])  # without the slip
    monkeypatch.setitem(FAMILIES, name, replace(FAMILIES[name], **slip))
    with pytest.raises(ValueError, match=r"layer 1 is the first to differ|\.1\.self_attn holds"):
        convert(model, [0])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("olmo2", lambda attention: setattr(attention.mixer, "q_norm", OneByOne(attention.mixer.q_norm))),
        ("gemma3_text", lambda attention: attention.mixer.q_norm.original.weight.add_(1.0)),
        ("granite", lambda attention: setattr(attention, "scaling", attention.mixer.head_dim**-0.5)),
        ("gpt2", lambda attention: attention.mixer.o_proj.weight.copy_(attention.mixer.o_proj.weight.T.clone())),
        ("gpt_neox", lambda attention: attention.mixer.q_proj.bias.copy_(attention.mixer.q_proj.bias.roll(1))),
        ("phi3", lambda attention: attention.mixer.k_proj.weight.copy_(attention.mixer.v_proj.weight)),
    ],
)
def test_a_fault_in_a_student_is_found(name, spoil):
    """Norms of heads for one of all, Gemma's 1 + weight, a scaling, the output's layout, a bias, one weight."""
    model = original(name)
    student = convert(model, [0])
    with torch.no_grad():
        spoil(linear_attention(student)[1])
    with pytest.raises(ValueError, match="layer 1 is the first to differ"):
        check_transfer(model, student)


def test_a_row_from_elsewhere(monkeypatch, tmp_path):
    """As docs/extend.md adds one: it converts, and its folder loads without further ado."""
    monkeypatch.setitem(FAMILIES, "mixtral", Family())
    register()
    shape = SHAPE | {"num_local_experts": 3, "num_experts_per_tok": 2}
    model = stir(MixtralForCausalLM(MixtralConfig(**shape)).eval())
    student = convert(model, [0])
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(97, (2, 12))
    assert type(loaded).__name__ == "ReGLAMixtralForCausalLM"
    assert_same_model(loaded, student, tokens)


class OneByOne(nn.Module):
    """OLMo 2's norm of all heads, applied to each head."""

    def __init__(self, norm: OriginalNorm):
        super().__init__()
        self.weight = nn.Parameter(norm.original.weight.unflatten(0, (9, -1)))

    def forward(self, x):
        return nn.functional.rms_norm(x, x.shape[-1:]) * self.weight


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
def test_other_implementations_of_attention(implementation):
    """The check runs in float32, which flash attention does not, and leaves the model as it was."""
    model = original("qwen2, windows")
    student = convert(model, [0], check=False)
    for one in (model, student):
        one.config._attn_implementation = implementation
    assert check_transfer(model, student) <= 1e-4
    assert model.config._attn_implementation == student.config._attn_implementation == implementation


@pytest.mark.parametrize(
    "name",
    [name if name in FIRST or "windows" in name else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_calibration_and_transfer_see_the_originals_attention(name):
    """Norms, RoPE, scaling and window: KL to uniform attention is that of the weights which the original computes."""
    model, tokens = original(name), torch.randint(97, (4, 33))
    student = convert(model, "none", check=False)
    rows = calibrate(model, student, tokens[:, :-1])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(tokens[2:, :-1], output_attentions=True).attentions
    for row, p_BHTT in zip(rows, weights, strict=True):
        p = p_BHTT.double()
        expected = (torch.xlogy(p, p).sum(-1) + torch.arange(1, 33).log()).mean()
        assert row.kl_uniform == pytest.approx(expected.item(), rel=1e-4)
        assert 0 <= row.kl_after < float("inf")
    transfer_loss(model)(student, tokens).backward()
    for attention in linear_attention(student).values():
        assert all(parameter.grad is not None for parameter in attention.mixer.parameters())


def test_the_originals_dropout_stays():
    """GPT-2's attention ends in a dropout, which a student keeps; attention transfer goes without."""
    model, tokens = original("gpt2", resid_pdrop=0.5), torch.randint(97, (2, 33))
    student = convert(model, "none")
    assert transfer_loss(model)(student.train(), tokens) == transfer_loss(model)(student.eval(), tokens)
    student.train()
    attention = student.transformer.h[0].attn
    y = attention(torch.randn(1, 50, 96))[0]
    assert 0.4 < (y == 0).float().mean() < 0.6


@pytest.mark.parametrize(
    ("name", "keep", "linear"),
    [
        ("mistral, windows", "sliding", []),
        ("qwen2, windows", "sliding", [0]),
        ("gemma3_text", "sliding", [1]),
        ("gemma3_text", "none", [0, 1, 2]),
        ("gemma3_text", "0", [1, 2]),
        ("llama", "sliding", [0, 1, 2]),
    ],
)
def test_windows_stay_or_are_converted_as_told(name, keep, linear):
    assert convert(original(name), keep).config.linear_layers == linear


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True in the configuration"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True in the config"),
    ],
)
def test_variants_that_are_refused(name, changes, message, tmp_path):
    model = original(name, **changes)
    with pytest.raises(ValueError, match=message):
        convert(model)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):  # before any weights are looked for
        load_config(str(tmp_path))
