"""One home for what a mixer is by default: the layer's own and that of a default model agree."""

from regla.layers import ReGLAAttention
from regla.models import ReGLAConfig, ReGLAForCausalLM


def numbers_and_names(module):
    values = {name: value for name, value in vars(module).items() if isinstance(value, str | int | float)}
    return {name: value for name, value in values.items() if not name.startswith("_") and name != "layer_idx"}


def test_the_layer_is_the_mixer_of_a_default_model():
    """`ReGLAAttention(64, 4)`, module for module, parameter for parameter, number for number."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8}
    mixer = ReGLAForCausalLM(ReGLAConfig(**sizes, intermediate_size=8)).model.layers[0].self_attn
    layer = ReGLAAttention(64, 4)
    assert str(layer) == str(mixer)
    shapes = [[(name, x.shape) for name, x in module.named_parameters()] for module in (layer, mixer)]
    assert shapes[0] == shapes[1]
    for (name, module), (_, other) in zip(layer.named_modules(), mixer.named_modules(), strict=True):
        assert numbers_and_names(module) == numbers_and_names(other), name
