"""What a YAML file makes of a grid, and what it must not hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from regla.study.grid import in_order, read_study, shipped, sweep_of
from regla.study.trials import check_variants

GRID = """\
title: A grid
base: {hidden_size: 32, heads: 2, steps: 4, weight_decay: 1e-2, overrides: {qk_norm: true}}
vary:
  gate: {refined: {overrides: {gate: refined}}, plain: {overrides: {gate: sigmoid}}}
  length: {4: {}, 8: {steps: 8, overrides: {qk_norm: false}}}
also:
  softmax: {mixer: softmax}
lr: [1e-3, 4.0e-3, 2e-3]
seeds: [0, 1]
"""


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_the_grid_is_the_product_and_what_is_beside_it(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, GRID))
    assert (study.name, study.source, study.title) == ("mine", "mine.yaml", "A grid")
    settings = {variant.name: dict(variant.settings) for variant in study.variants}
    base = {"hidden_size": 32, "heads": 2, "steps": 4, "weight_decay": 0.01}
    assert settings == {
        "refined/4": base | {"overrides": {"qk_norm": True, "gate": "refined"}},
        "refined/8": base | {"steps": 8, "overrides": {"qk_norm": False, "gate": "refined"}},
        "plain/4": base | {"overrides": {"qk_norm": True, "gate": "sigmoid"}},
        "plain/8": base | {"steps": 8, "overrides": {"qk_norm": False, "gate": "sigmoid"}},
        "softmax": base | {"mixer": "softmax", "overrides": {"qk_norm": True}},
    }
    assert study.variants[1].choices == {"gate": "refined", "length": "8"}
    assert study.variants[4].choices == {"also": "softmax"}


def test_the_order_has_every_variant_at_the_middle_rate_first(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, GRID))
    order = [(lr, seed) for variant, lr, seed in in_order(study) if variant.name == "plain/4"]
    assert order == [(2e-3, 0), (1e-3, 0), (4e-3, 0), (2e-3, 1), (1e-3, 1), (4e-3, 1)]
    assert [variant.name for variant, _, _ in in_order(study)[:5]] == [variant.name for variant in study.variants]
    assert len(in_order(study)) == 5 * 3 * 2


def test_only_and_set(tmp_path: Path) -> None:
    file = written(tmp_path, GRID)
    study = read_study(file, ["lr=[5e-3]", "seeds=[7]", "overrides.linear_conv_kernel_dim=0", "layers=2"])
    assert (study.lrs, study.seeds) == ((5e-3,), (7,))
    assert study.variants[0].settings["overrides"] == {
        "qk_norm": True,
        "linear_conv_kernel_dim": 0,
        "gate": "refined",
    }
    assert study.variants[0].settings["layers"] == 2
    assert [variant.name for variant in read_study(file, only=["*/8"]).variants] == ["refined/8", "plain/8"]
    several = read_study(file, only=["softmax", "plain/*", "*/8", "none"])
    assert [variant.name for variant in several.variants] == ["refined/8", "plain/4", "plain/8", "softmax"]
    with pytest.raises(ValueError, match=r"No variant matches --only 'x\*' 'y'; the study has refined/4, refined/8"):
        read_study(file, only=["x*", "y"])


def test_set_need_not_reach_variants_that_are_left_out(tmp_path: Path) -> None:
    file, sets = written(tmp_path, GRID), ["overrides.qk_norm=true"]
    with pytest.raises(
        ValueError, match=r"overrides\.qk_norm=\.\.\. would not reach the variant refined/8, which sets"
    ):
        read_study(file, sets)
    with pytest.raises(ValueError, match="would not reach the variant plain/8"):
        read_study(file, sets, only=["plain/*"])
    (variant,) = read_study(file, sets, only=["plain/4"]).variants
    assert variant.settings["overrides"] == {"qk_norm": True, "gate": "sigmoid"}


@pytest.mark.parametrize("gate", ["sigmoid", "refined", "refined_low_rank", "mamba2"])
def test_the_axis_of_a_gate_counts_where_the_gate_has_one(gate: str, tmp_path: Path) -> None:
    """Else two variants that differ in it would be one run."""
    axes = "{key: {overrides: {gate_axis: key}}, head: {overrides: {gate_axis: head}}}"
    text = (
        f"base: {{layers: 1, overrides: {{gate: {gate}, gate_half_life: null}}}}\nvary: {{axis: {axes}}}\nlr: [1e-3]\n"
    )
    study = read_study(written(tmp_path, text))
    _, models = check_variants(study, study.variants, vocab_size=300)
    assert (models["key"] == models["head"]) == (gate == "mamba2")


def test_the_configuration_of_every_variant_is_checked_with_its_name(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, GRID + "\n"))
    sizes, models = check_variants(study, study.variants, vocab_size=300)
    assert models["plain/8"]["gate"] == "sigmoid" and models["softmax"]["layer_types"] == ["full_attention"] * 4
    assert models["plain/8"]["gate_axis"] == "key" and models["softmax"]["gate_axis"] is None  # which has no use for it
    assert sizes["plain/8"].tokens == 2 * sizes["plain/4"].tokens == 8 * 4 * 256
    for old, new, message in (
        ("gate: sigmoid", "gate: sigmoyd", "The variant plain/4 does not fit: gate is 'sigmoyd'; expected one of"),
        (
            "gate: sigmoid",
            "gat: sigmoid",
            "The variant plain/4 does not fit: Unknown configuration key 'gat'",
        ),
        ("heads: 2", "heads: 3", "The variant refined/4 does not fit: hidden_size 32 is no multiple of heads 3"),
    ):
        study = read_study(written(tmp_path, GRID.replace(old, new)))
        with pytest.raises(ValueError, match=message):
            check_variants(study, study.variants, vocab_size=300)


BAD = {
    "unknown key": ("vary:", "varies:", "Unknown key 'varies' in the study mine; the nearest known one is 'vary'."),
    "unknown field": ("heads: 2", "haeds: 2", "Unknown key 'haeds' in base of the study mine; the .* is 'heads'."),
    "unknown field of a choice": ("steps: 8", "stepps: 8", "Unknown key 'stepps' in 8 in the axis length of the study"),
    "wrong type": ("heads: 2", "heads: two", "heads in base of the study mine is 'two', expected a whole number."),
    "bool for number": ("steps: 8", "steps: true", "steps in 8 in the axis length .* expected a whole number or null."),
    "not its own": ("heads: 2", "lr: 2", "lr stands in base of the study mine, but the study's own `lr` gives it"),
    "of the command": ("heads: 2", "data: [a]", "data stands in base of the study mine, but --data gives it"),
    "vocabulary": ("{mixer: softmax}", "{vocab_size: 9}", "The variant softmax sets vocab_size; set it in base"),
    "no mapping": (
        "{mixer: softmax}",
        "softmax",
        "softmax in `also` of the study mine is 'softmax', expected a",
    ),
    "no choices": ("{4: {}, 8: {steps: 8, overrides: {qk_norm: false}}}", "{}", "The axis length .* has no choices"),
    "yes": ("refined: {o", "yes: {o", "True in the axis gate of the study mine is no name; put the word into quotes"),
    "twice": ("title: A grid", "lr: [1e-3]", "'lr' stands twice"),
    "same name": (
        "  softmax: {m",
        "  refined/4: {m",
        "Two variants of the study mine are named refined/4",
    ),
    "no YAML": ("also:", "also: {", "The study mine is no valid YAML \\(line [0-9]+: .*\\); correct it."),
    "no rates": (
        "lr: [1e-3, 4.0e-3, 2e-3]",
        "",
        "`lr` of the study mine is None, expected a list of",
    ),
    "rate 0": (
        "lr: [1e-3,",
        "lr: [0,",
        "is \\[0, 0.004, 0.002\\], expected a list of different learning rates",
    ),
    "same rate": ("lr: [1e-3,", "lr: [2e-3,", "expected a list of different learning rates above 0"),
    "seeds": (
        "seeds: [0, 1]",
        "seeds: [-1]",
        "`seeds` of the study mine is \\[-1\\], expected a list of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    old, new, message = BAD[case]
    assert old in GRID
    with pytest.raises(ValueError, match=message) as caught:
        read_study(written(tmp_path, GRID.replace(old, new)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "--set steps is no assignment, expected KEY=VALUE such as steps=100."),
        ("stepz=3", "Unknown key 'stepz' in --set stepz=3; the nearest known one is 'steps'."),
        ("steps=many", "steps in --set steps=many is 'many', expected a whole number or null."),
        ("steps=3", "--set steps=... would not reach the variant refined/8, which sets steps itself"),
        ("overrides.gate=gla", "would not reach the variant refined/4, which sets overrides.gate itself"),
        ("layers=[", r"--set layers=\[ is no valid YAML"),
    ],
)
def test_bad_assignments(assignment: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_study(written(tmp_path, GRID), [assignment])


def test_unknown_studies(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no study 'demmo'; give one of demo, .*, or the path of a \.yaml"):
        read_study("demmo")
    with pytest.raises(ValueError, match=r"none.yaml cannot be read \(No such file or directory\)"):
        read_study(str(tmp_path / "none.yaml"))


def test_a_sweep_and_more_seeds(tmp_path: Path) -> None:
    more = "sweep: {steps: 2, overrides: {qk_norm: false}}\nmore_seeds: {softmax: [5], refined/4: [1, 7]}\n"
    study = read_study(written(tmp_path, GRID + more), ["sweep.steps=1", "layers=1"])
    sweep = sweep_of(study)
    assert (sweep.name, sweep.title, sweep.seeds) == ("mine-sweep", "A grid: learning rates", (0,))
    assert {variant.settings["steps"] for variant in sweep.variants} == {1}
    assert not any(variant.settings["overrides"]["qk_norm"] for variant in sweep.variants)
    assert study.variants[0].settings["steps"] == 4 and study.variants[0].settings["layers"] == 1
    assert len(in_order(sweep)) == 5 * 3 * 1
    rates = {variant.name: 1e-3 for variant in study.variants} | {"softmax": 4e-3}
    trials = [(variant.name, lr, seed) for variant, lr, seed in in_order(replace(study, rates=rates))]
    assert [seed for _, _, seed in trials] == [0] * 5 + [1] * 5 + [7, 5]
    assert trials[-2:] == [("refined/4", 1e-3, 7), ("softmax", 4e-3, 5)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sweep: {stepps: 2}", "Unknown key 'stepps' in sweep of the study mine; the nearest known one is 'steps'"),
        ("more_seeds: {softmaxx: [1]}", "`more_seeds` of the study mine names 'softmaxx', .* the nearest is 'softmax'"),
        (
            "more_seeds: {softmax: 1}",
            "`seeds` of `more_seeds` of the study mine is 1, expected a list of different seeds",
        ),
        ("generate: [8, 4]", r"`generate` of the study mine is \[8, 4\], expected ascending numbers of tokens such as"),
        ("generate: []", r"`generate` of the study mine is \[\], expected ascending numbers"),
        ("inspect: 1", "`inspect` of the study mine is 1, expected a number of tokens of at least 2"),
    ],
)
def test_bad_measurements(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_study(written(tmp_path, GRID + line + "\n"))


@pytest.mark.parametrize("name", shipped())
def test_shipped_studies_fit_at_equal_parameters(name: str) -> None:
    study = read_study(name)
    sizes, _ = check_variants(study, study.variants, vocab_size=None if name == "demo" else 16384)
    by_size: dict[str, list[int]] = {}
    for variant in study.variants:
        by_size.setdefault(variant.choices.get("size", ""), []).append(sizes[variant.name].parameters)
    for parameters in by_size.values():
        assert max(parameters) < 1.01 * min(parameters)
    if study.variants[0].settings.get("task") is None and name not in ("demo", "speed-and-memory"):
        assert min(size.tokens for size in sizes.values()) in (26_214_400, 100_007_936)
        assert 4e-3 in study.lrs and len(study.lrs) > 1


def test_options_that_came_later_leave_finished_runs_the_same() -> None:
    """What rows say of their models is what their variants are now."""
    rows = Path(__file__).parents[2] / "benchmarks" / "studies" / "memory-parts.jsonl"
    study = read_study("memory-parts")
    _, models = check_variants(study, study.variants, vocab_size=16384, end_of_text=0)
    for row in map(json.loads, rows.read_text().splitlines()):
        assert models["/".join(row["variant"].values())] == row["model"]
