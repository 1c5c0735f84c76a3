"""Steps of many texts at once against each text by itself."""

import pytest
import torch

from regla.layers.attention import ReGLAState
from regla.layers.defaults import ADDITIVE, DELTA
from regla.models import ReGLAConfig
from regla.models.configuration import mixer_arguments
from regla.models.modeling import linear_mixer
from regla.serving.rows import mix_rows, state_layout

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 7}

LAYERS = {
    "additive": mixer_arguments(ADDITIVE),
    "running maximum, convolution": mixer_arguments(ADDITIVE) | {"key_max": "running", "linear_conv_kernel_dim": 3},
    "rope, other values": mixer_arguments(ADDITIVE) | {"linear_rope": True, "value_head_dim": 10, "qk_norm": False},
    "sum norm, both axes": mixer_arguments(ADDITIVE)
    | {"attention_norm": "sum", "feature_map": "one_plus_elu", "gate_axis": "both"},
    "delta": mixer_arguments(DELTA) | {"gate_low_rank_dim": 4},
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    """(config, layer) with random weights everywhere."""
    config = ReGLAConfig(**SHAPE, **request.param)
    mixer = linear_mixer(config, 0).eval()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter.data, 0.1, 0.4)
    return config, mixer.requires_grad_(False)


def test_a_window_branch_is_refused():
    config = ReGLAConfig(**SHAPE, window_branch=8)
    with pytest.raises(ValueError, match="window_branch is 8: vLLM's pages hold the states of linear layers, and no"):
        state_layout(config, torch.bfloat16)


def angles(positions):
    angle = positions.float()[None, :, None] * torch.tensor([1.0, 0.1, 0.01]).repeat(2)
    return angle.cos(), angle.sin()


def test_a_layer_stores_what_the_layout_says(layer):
    config, mixer = layer
    x = torch.zeros(2, 3, 32, dtype=torch.bfloat16)
    rotary = angles(torch.arange(3)) if config.linear_rope else None
    state = mixer.to(torch.bfloat16)(x, rotary=rotary, return_state=True)[1]
    expected = [(part.shape[1:], part.dtype) for part in state if part is not None]
    assert state_layout(config, torch.bfloat16) == expected


def test_texts_come_and_go_and_are_read_in_parts(layer):
    """Three texts of 9, 5 and 7 tokens: one is read in two parts while another goes on token by token."""
    config, mixer = layer
    texts = [torch.randn(length, 32) for length in (9, 5, 7)]
    # (text, from, to) of each step, texts of one token first
    steps = [
        [(0, 0, 4), (1, 0, 1)],
        [(1, 1, 2), (0, 4, 9)],
        [(1, 2, 3), (2, 0, 1)],
        [(1, 3, 4), (2, 1, 7)],
        [(1, 4, 5)],
    ]
    layout = state_layout(config, torch.float32)
    pages = [torch.zeros(3, *shape, dtype=dtype) for shape, dtype in layout]
    outputs = [torch.empty_like(text) for text in texts]
    for step in steps:
        step = sorted(step, key=lambda part: part[2] - part[1] > 1)
        rows = [text for text, _, _ in step]
        x = torch.cat([texts[text][first:last] for text, first, last in step])
        places = torch.cat([torch.arange(first, last) for _, first, last in step])
        lengths = [last - first for _, first, last in step]
        starts = [sum(lengths[:row]) for row in range(len(step) + 1)]
        before = [page[rows] for page in pages] + [None] * (3 - len(pages))
        rotary = angles(places) if config.linear_rope else None
        y, after = mix_rows(mixer, x, rotary, starts, lengths.count(1), ReGLAState(*before))
        for page, part in zip(pages, after, strict=False):
            page[rows] = part
        for (text, first, last), start in zip(step, starts, strict=False):
            outputs[text][first:last] = y[start : start + last - first]
    for text, found in zip(texts, outputs, strict=True):
        rotary = angles(torch.arange(len(text))) if config.linear_rope else None
        alone = mixer(text[None], rotary=rotary)[0][0]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
        assert alone.std() > 0.01
