"""Folders: what is written, that it loads unchanged, and that it loads in a program that never imported regla."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.same import assert_same_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from regla.models import ReGLAConfig, ReGLAForCausalLM, ReGLAModel
from regla.models.configuration import FORMAT_VERSION, NEW_OPTIONS
from regla.models.hub import write_hub_module
from regla.runtime.install import install_regla


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saved(request, variant, build, tmp_path):
    model = build(variant, tie_word_embeddings=request.param)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_loading_changes_nothing(saved):
    model, folder = saved
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is ReGLAForCausalLM
    assert_same_model(again, model, torch.randint(3, 97, (2, 9)))


def test_tied_weights_stay_tied(build, tmp_path):
    model = build("hybrid", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = ReGLAForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_folders_from_before_an_option_load(build, tmp_path):
    """A config that lacks the options of gates' starts and softmax extras means that they are off."""
    model = build("hybrid")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in list(config):
        if name.startswith(("softmax_", "gate_half_life", "qk_initializer_range", "format_version")):
            del config[name]
    path.write_text(json.dumps(config))
    again, report = ReGLAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same_model(again, model, torch.randint(3, 97, (2, 9)))


@pytest.fixture
def edited(build, tmp_path):
    """`edited(name=value)`: a saved folder whose config.json says so."""

    def save(**entries):
        build("hybrid").save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return tmp_path

    return save


def test_a_saved_model_has_a_format_version(edited):
    assert json.loads((edited() / "config.json").read_text())["format_version"] == FORMAT_VERSION == 3


@pytest.mark.parametrize("load", [ReGLAConfig, AutoConfig, ReGLAForCausalLM, AutoModelForCausalLM])
def test_formats_of_newer_versions_are_refused(edited, load):
    with pytest.raises(ValueError, match=r"format_version is 4, .* up to version 3; install a newer regla"):
        load.from_pretrained(edited(format_version=4))


@pytest.mark.parametrize("load", [ReGLAConfig, ReGLAForCausalLM])
def test_removed_options_load_if_they_were_off_and_are_refused_if_in_use(build, edited, load):
    off = load.from_pretrained(edited(format_version=1, qk_temperature=False, gate_half_life_over="channels"))
    config = off if load is ReGLAConfig else off.config
    assert config.format_version == 3
    assert "qk_temperature" not in config.to_dict()
    for option, value, what in (
        ("qk_temperature", True, "an option that"),
        ("gate_half_life_over", "layers", "which"),
    ):
        with pytest.raises(ValueError, match=f"{option} is {value!r}, {what} was removed after git revision e07f40d"):
            load.from_pretrained(edited(format_version=1, **{option: value}))


@pytest.mark.parametrize("load", [ReGLAConfig, AutoConfig, ReGLAForCausalLM])
def test_what_an_older_folder_does_not_name_is_what_it_meant(edited, load, monkeypatch):
    """Whatever the default is: the value of NEW_OPTIONS, not that of ReGLAConfig."""
    assert NEW_OPTIONS[3].keys() <= ReGLAConfig.__annotations__.keys()
    assert NEW_OPTIONS[3]["update_rule"] == "additive"
    monkeypatch.setitem(NEW_OPTIONS[3], "gate_half_life_over", "heads")
    folder = edited()
    written = json.loads((folder / "config.json").read_text())
    older = {name: value for name, value in written.items() if name != "gate_half_life_over"}
    for version, expected in ((None, "heads"), (1, "heads"), (2, "heads"), (3, "channels")):
        config = older | {"format_version": version}
        if version is None:
            del config["format_version"]
        (folder / "config.json").write_text(json.dumps(config))
        loaded = load.from_pretrained(folder)
        loaded = loaded.config if load is ReGLAForCausalLM else loaded
        assert loaded.gate_half_life_over == expected
        assert loaded.format_version == 3


def test_a_missing_bias_starts_at_its_half_life_and_a_saved_one_is_kept(build, tmp_path):
    build("hybrid", gate_half_life=[2, 32], gate_axis="both").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    missing, kept = (f"model.layers.{layer}.self_attn.gate.proj.bias" for layer in (0, 2))
    save_file({name: value for name, value in weights.items() if name != missing}, path, {"format": "pt"})
    model = ReGLAForCausalLM.from_pretrained(tmp_path)
    half_lives = -1 / torch.sigmoid(model.get_parameter(missing).detach().double()).log2()
    torch.testing.assert_close(
        half_lives, torch.logspace(1, 5, 12, base=2.0, dtype=torch.float64).repeat(4), rtol=1e-5, atol=0
    )
    assert torch.equal(model.get_parameter(kept), weights[kept])


def test_bare_model(build, tmp_path):
    model = build("hybrid")
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare) is ReGLAModel
    ids = torch.randint(3, 97, (2, 9))
    assert torch.equal(model.lm_head(bare(ids).last_hidden_state), model(ids).logits)


def test_missing_weights_start_like_new_ones_and_the_others_are_kept(build, tmp_path):
    build("hybrid", gate_bias=-1.25, initializer_range=0.03, tie_word_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    missing = [
        "model.layers.0.self_attn.gate.proj.bias",
        "model.layers.0.self_attn.gate.refine_proj.weight",
        "model.layers.0.self_attn.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.input_layernorm.weight",
    ]
    save_file({name: value for name, value in weights.items() if name not in missing}, path, {"format": "pt"})
    model, report = ReGLAForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(missing)
    for name, parameter in model.named_parameters():
        if name in missing:
            assert not torch.equal(parameter, weights[name]), name
        else:
            assert torch.equal(parameter, weights[name]), name
    bias, refine, norm, q, outer_norm = (model.get_parameter(name).detach() for name in missing)
    assert torch.equal(bias, torch.full_like(bias, -1.25))
    assert refine.std() == pytest.approx(0.03, rel=0.1)
    assert q.std() == pytest.approx(0.03, rel=0.1)
    assert torch.equal(norm, torch.ones_like(norm))
    assert torch.equal(outer_norm, torch.ones_like(outer_norm))


def test_dtype_of_loading(build, tmp_path):
    build("hybrid").save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_more_tokens(build):
    model = build("hybrid", tie_word_embeddings=True)
    ids = torch.randint(3, 97, (2, 9))
    before = model(ids).logits
    model.resize_token_embeddings(101, mean_resizing=False)
    after = model(ids).logits
    assert after.shape == (2, 9, 101)
    torch.testing.assert_close(after[..., :97], before)
    assert model.config.vocab_size == 101
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_config_alone_takes_its_module_along(tmp_path):
    ReGLAConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1).save_pretrained(tmp_path)
    assert (tmp_path / "modeling_regla_hub.py").is_file()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_regla_hub.ReGLAConfig",
        "AutoModel": "modeling_regla_hub.ReGLAModel",
        "AutoModelForCausalLM": "modeling_regla_hub.ReGLAForCausalLM",
        "AutoModelForSequenceClassification": "modeling_regla_hub.ReGLAForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_regla_hub.ReGLAForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_regla_hub.ReGLAForQuestionAnswering",
    }
    assert type(AutoConfig.from_pretrained(tmp_path)) is ReGLAConfig


STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM
folder, copy = sys.argv[1:]
assert not any(name.split(".")[0] == "regla" for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.arange(5, 14)[None]
print(model(ids).logits[0, -1, :5].tolist())
print(model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist())
model.save_pretrained(copy)
"""


def test_a_program_that_never_imported_regla(build, tmp_path):
    model = build("hybrid")
    folder, copy = tmp_path / "folder", tmp_path / "copy"
    model.save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(copy)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    logits, tokens = (json.loads(line) for line in done.stdout.splitlines())
    ids = torch.arange(5, 14)[None]
    torch.testing.assert_close(torch.tensor(logits), model(ids).logits[0, -1, :5])
    assert tokens == model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist()
    # What such a program saves loads in the next one: it is the same folder, with none of the package's files.
    assert {path.name for path in copy.iterdir()} == {path.name for path in folder.iterdir()}
    for name in ("config.json", "modeling_regla_hub.py"):
        assert (copy / name).read_text() == (folder / name).read_text()


def test_a_folder_says_how_to_install_regla(tmp_path: Path) -> None:
    """transformers would advise `pip install regla`, which is on no index."""
    from transformers.dynamic_module_utils import get_imports

    file = write_hub_module(tmp_path)
    assert get_imports(file) == []
    code = f"import sys; sys.modules['regla'] = None; exec(open({str(file)!r}).read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: This model needs the package regla, which is not installed; run `{install_regla()}`."
    )
