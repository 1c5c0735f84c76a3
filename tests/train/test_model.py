"""The model of a run: overrides, and equal parameters for all mixers."""

from pathlib import Path

import pytest

from regla.layers.defaults import PAPER
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.configuration import mixer_arguments
from regla.train.config import TrainConfig
from regla.train.model import count_parameters, equal_parameters, match_softmax, model_config, read_overrides

SHAPES = {
    "default": {},
    "tiny": {"hidden_size": 48, "layers": 2, "heads": 3},
    "grouped": {"hidden_size": 144, "layers": 3, "heads": 9, "kv_heads": 3},
    "pilot": {"hidden_size": 512, "layers": 8, "heads": 8},
    "wide heads": {"hidden_size": 64, "layers": 2, "heads": 2, "head_dim": 48, "intermediate_size": 400},
}


def build(**arguments) -> ReGLAConfig:
    return model_config(TrainConfig(out="unused", **arguments), vocab_size=1000, end_of_text=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mixer", ["regla", "hybrid", "paper"])
def test_all_mixers_have_equal_parameters(shape: str, mixer: str) -> None:
    softmax = build(mixer="softmax", **SHAPES[shape])
    asked = build(mixer=mixer, **SHAPES[shape])
    matched, target = match_softmax(asked)
    assert target == count_parameters(softmax)
    assert abs(count_parameters(matched) / target - 1) <= 0.005
    assert matched.intermediate_size < asked.intermediate_size == softmax.intermediate_size
    assert matched.layer_types == asked.layer_types
    assert match_softmax(softmax) == (softmax, target)


EXTRAS = {
    "softmax_conv_kernel_dim": 4,
    "softmax_qk_norm": True,
    "softmax_output_gate": "silu",
    "softmax_output_norm": True,
}


@pytest.mark.parametrize("mixer", ["softmax", "hybrid"])
def test_extras_of_softmax_come_out_of_the_mlp(mixer: str) -> None:
    """The target is the plain softmax model, with and without extras."""
    plain = build(mixer="softmax", **SHAPES["pilot"])
    asked = build(mixer=mixer, overrides=EXTRAS, **SHAPES["pilot"])
    assert count_parameters(asked) > 1.05 * count_parameters(plain)
    matched, target = match_softmax(asked)
    assert target == count_parameters(plain)
    assert abs(count_parameters(matched) / target - 1) <= 0.005
    assert matched.intermediate_size < plain.intermediate_size
    assert {name: getattr(matched, name) for name in EXTRAS} == EXTRAS


def test_the_same_overrides_fit_every_mixer() -> None:
    """A study gives one set of options to regla, hybrid and softmax; each takes what concerns its layers."""
    overrides = EXTRAS | {
        "gate_half_life": [4, 1024],
        "qk_initializer_range": 0.09,
    }
    sizes = set()
    for mixer in ("regla", "hybrid", "softmax"):
        matched, target = match_softmax(build(mixer=mixer, overrides=overrides))
        sizes.add(target)
        assert abs(count_parameters(matched) / target - 1) <= 0.005
        assert {name: getattr(matched, name) for name in overrides} == overrides
    assert len(sizes) == 1


def test_widths_are_multiples_of_eight_where_that_is_near_enough() -> None:
    matched, _ = match_softmax(build(mixer="regla", **SHAPES["pilot"]))
    assert matched.intermediate_size % 8 == 0


def test_no_width_is_near_enough() -> None:
    with pytest.raises(ValueError, match=r"No MLP width gives this model 5,000 parameters within 0.5 % .* raise"):
        equal_parameters(build(), 5_000)


def test_parameters_are_counted_as_the_model_has_them() -> None:
    config = build(mixer="hybrid", **SHAPES["tiny"])
    assert config.tie_word_embeddings
    assert count_parameters(config) == sum(p.numel() for p in ReGLAForCausalLM(config).parameters())


def test_mixers() -> None:
    linear, full = "linear_attention", "full_attention"
    assert build(mixer="regla", layers=3).layer_types == [linear, linear, linear]
    assert build(mixer="hybrid", layers=3).layer_types == [linear, full, linear]
    assert build(mixer="softmax", layers=3).layer_types == [full, full, full]
    assert build(mixer="hybrid", softmax_every=3, layers=4).layer_types == [linear, linear, full, linear]
    assert build(mixer="hybrid", softmax_every=8, layers=8).layer_types == [linear] * 7 + [full]


def test_the_papers_own_form() -> None:
    config = build(mixer="paper", layers=2)
    options = mixer_arguments(PAPER) | {"gate_low_rank_dim": config.hidden_size // 8}
    assert {name: getattr(config, name) for name in options} == options
    assert (config.gate_axis, config.attention_norm, config.qk_norm, config.output_gate) == (
        "value",
        "layernorm",
        False,
        None,
    )
    assert config.layer_types == ["linear_attention"] * 2 and not config.uses_rope
    assert build(mixer="paper", overrides={"gate_axis": "key"}).gate_axis == "key"


def test_overrides_win() -> None:
    config = build(hidden_size=64, overrides={"linear_conv_kernel_dim": 0, "hidden_size": 96, "output_gate": None})
    assert (config.linear_conv_kernel_dim, config.hidden_size, config.output_gate) == (0, 96, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"linear_conv_kernel": 0}, "Unknown configuration key 'linear_conv_kernel'.*'linear_conv_kernel_dim'"),
        ({"gate_axes": "key"}, "Unknown configuration key 'gate_axes'.*'gate_axis'"),
        ({"gate_axis": "both ways"}, "gate_axis is 'both ways'"),
        ({"gate_halflife": 4}, "Unknown configuration key 'gate_halflife'.*'gate_half_life'"),
        ({"gate_half_life": 4, "gate_bias": 1.0}, "gate_bias is 1.0 and gate_half_life 4"),
        ({"gate_half_life": "4"}, "The configuration does not fit: .*gate_half_life"),
        ({"hidden_size": "large"}, "The configuration does not fit: .*hidden_size"),
        ({"vocab_size": 10}, "vocab_size is 10, but the largest id of the tokenizer is 999"),
    ],
)
def test_overrides_that_do_not_fit(overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(overrides=overrides)
    assert "\n" not in str(caught.value)


def test_override_files(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"qk_norm": true}')
    assert read_overrides(file) == {"qk_norm": True}
    file.write_text("{qk_norm: true}")
    with pytest.raises(ValueError, match=r"a.json is not JSON"):
        read_overrides(file)
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"a.json holds a JSON list, expected an object"):
        read_overrides(file)
    with pytest.raises(ValueError, match=r"none.json cannot be read"):
        read_overrides(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "layers is 0, expected a number above 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"steps": 0}, "steps is 0"),
        ({"warmup": -1}, "warmup is -1, expected 0 or more"),
        ({"mixer": "mamba"}, "mixer is 'mamba', expected one of regla, hybrid, softmax"),
        ({"steps": 1, "tokens": 1}, "Both steps and tokens"),
        ({"tokenizer": "a", "vocab_size": 300}, "Both tokenizer and vocab_size"),
        ({"softmax_every": 4}, "softmax_every 4 is given with mixer regla; it is of mixer hybrid: leave one out"),
        ({"softmax_every": 1, "mixer": "hybrid"}, "softmax_every is 1, expected a number from 2 to layers 4; for one"),
        ({"softmax_every": 8, "mixer": "hybrid"}, "softmax_every is 8, expected a number from 2 to layers 4; for one"),
        ({"hidden_size": 100, "heads": 3}, "hidden_size 100 is no multiple of heads 3"),
        ({"heads": 4, "kv_heads": 3}, "heads 4 is no multiple of kv_heads 3"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(out="unused", **arguments)


def test_length_of_a_run() -> None:
    config = TrainConfig(out="unused", tokens=1000, batch_size=2, accumulate=3, seq_len=10)
    assert (config.tokens_per_step, config.total_steps, config.warmup_steps) == (60, 17, 1)
    assert TrainConfig(out="unused", steps=50, warmup=7).warmup_steps == 7


@pytest.mark.parametrize(("options", "window"), [({}, 64), ({"window": 256}, 256)])
def test_the_window_is_in_the_configuration(options: dict[str, int], window: int) -> None:
    model = build(mixer="window", **options)
    assert model.layer_types == ["sliding_attention"] * model.num_hidden_layers
    assert model.sliding_window == window
    assert build(mixer="softmax").sliding_window is None
    assert count_parameters(model) == count_parameters(build(mixer="softmax"))


def test_a_hybrid_of_windows() -> None:
    model = build(mixer="hybrid", window=8)
    assert model.layer_types == ["linear_attention", "sliding_attention"] * (model.num_hidden_layers // 2)
    assert model.sliding_window == 8
    assert build(mixer="hybrid").layer_types[1] == "full_attention"


def test_a_window_without_its_mixer() -> None:
    with pytest.raises(ValueError, match="window 8 is given with mixer regla; it is of mixer window and hybrid"):
        TrainConfig(out="-", window=8)
