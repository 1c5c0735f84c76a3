"""Calibration of queries and keys: the identity at first, then what its equation says."""

import torch

from regla.layers import ReGLAAttention, init_linear_attention
from regla.layers.calibration import QKCalibration
from regla.layers.defaults import ADDITIVE


def test_equation():
    calibration = QKCalibration(4, 2, 3)
    with torch.no_grad():
        for parameter in calibration.parameters():
            parameter.normal_()
    q, k = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 2, 3)
    q_new, k_new = calibration(q, k)
    for head in range(4):
        expected = (q[:, :, head] - calibration.q_mean[head]) * calibration.q_scale[head]
        torch.testing.assert_close(q_new[:, :, head], expected)
    for head in range(2):
        expected = (k[:, :, head] - calibration.k_mean[head]) * calibration.k_scale[head]
        torch.testing.assert_close(k_new[:, :, head], expected)


def test_it_starts_as_the_identity():
    options = {"num_kv_heads": 2, "backend": "chunked"}  # the kernels would do the norm of the plain one themselves
    plain = ReGLAAttention(32, 4, **ADDITIVE.of_layer() | options)
    calibrated = ReGLAAttention(32, 4, **ADDITIVE.of_layer() | options | {"qk_calibration": True})
    for parameter in calibrated.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    init_linear_attention(plain, std=0.4)
    init_linear_attention(calibrated, std=0.4)
    calibrated.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 9, 32)
    assert torch.equal(calibrated(x)[0], plain(x)[0])


def test_means_undo_a_constant_in_the_keys():
    """What the layer is there for: the same large number in every key, as pretrained keys carry it, has no effect."""
    layer = ReGLAAttention(32, 2, **ADDITIVE.of_layer() | {"qk_norm": False, "qk_calibration": True, "bias": True})
    init_linear_attention(layer, std=0.4)
    x = torch.randn(1, 9, 32)
    with torch.no_grad():
        before = layer(x)[0]
        layer.k_proj.bias.add_(20 * torch.eye(16)[5].repeat(2))
        spoilt = layer(x)[0]
        layer.qk_calibration.k_mean[:, 5] += 20
        mended = layer(x)[0]
    assert (spoilt - before).abs().max() > 0.1 * before.abs().max()
    torch.testing.assert_close(mended, before, rtol=1e-4, atol=1e-4)
