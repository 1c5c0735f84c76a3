"""`regla linearize` as a whole: what it prints and saves, that training helps, and what it refuses."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, OPTConfig

from regla.cli import main
from regla.data.tokenizer import train_tokenizer
from regla.linearize import driver
from regla.linearize.config import LinearizeConfig
from regla.linearize.driver import linearize
from regla.runtime.log import TrainingLog, read_log
from tests.linearize.models import TEMPLATE, command, llama


def test_training_brings_the_model_back(converted):
    """Both stages lower their loss; the whole wins back at least half of what the conversion lost."""
    summary = json.loads((converted / "linearize.json").read_text())
    assert {stage: row["steps"] for stage, row in summary["stages"].items()} == {
        "attention transfer": 30,
        "distillation": 60,
    }
    for row in summary["stages"].values():
        assert row["last_loss"] < 0.9 * row["first_loss"]
    original, before, after = (summary["scores"][key][0]["loss"] for key in ("original", "converted", "trained"))
    assert before > original + 0.2  # else there is nothing to bring back
    assert after < original + 0.5 * (before - original)


def test_folder_is_complete(folder, converted):
    model = AutoModelForCausalLM.from_pretrained(converted)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert model.config.linear_layers == [0, 1]
    assert tokenizer.chat_template == TEMPLATE
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer("the cat sat", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, min_new_tokens=4).shape[1] == prompt["input_ids"].shape[1] + 4
    steps = [json.loads(line) for line in (converted / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, 91))
    assert {row["stage"] for row in steps} == {"attention transfer", "distillation"}


def test_model_card(folder, converted):
    card = (converted / "README.md").read_text()
    summary = json.loads((converted / "linearize.json").read_text())
    assert "regla linearize model --out converted --keep none" in card and "--tokens 23040" in card
    assert str(folder) not in card
    assert f"{summary['transfer_error']:.1e} of the largest" in card
    figures = [f"{summary['scores'][key][0]['perplexity']:.2f}" for key in ("original", "converted", "trained")]
    assert f"| text.txt | 1,000 | {' | '.join(figures)} |" in card
    row = summary["calibration"][1]
    assert f"| 1 | {row['features_before']:.1f} | {row['features_after']:.1f} |" in card
    assert all(version in card for version in summary["versions"].values())


def test_same_seed_same_model(folder, tmp_path):
    for name in "ab":
        assert main(command(folder, tmp_path / name, "--tokens", "768")) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_convert_only(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out", "--dtype", "bfloat16")) == 0
    printed = capsys.readouterr().out
    assert "reproduces the original's logits to" in printed
    assert "KL divergence from softmax attention" in printed and "the contract" in printed
    assert "its gates are untrained" in printed
    assert "It was not trained" in (tmp_path / "out" / "README.md").read_text()


def test_bfloat16(folder, tmp_path):
    assert main(command(folder, tmp_path / "out", "--tokens", "1024", "--dtype", "bfloat16")) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_dry_run_writes_nothing(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out", "--tokens", "2560", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"estimated time +[\d.]+ minutes on cpu: 40 sequences", printed)
    for expected in (
        "parameters",
        "training memory",
        "training tokens   2,560",
        "1,792 (7 steps of 4 x 64)",
        "512k tokens",
    ):
        assert expected in printed
    assert not (tmp_path / "out").exists()


def test_dry_run_needs_no_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [word for word in command(folder, "OUT", "--dry-run") if word not in ("--out", "OUT")]
    assert main(words) == 0
    assert "13,301 tokens to train on, 1,000 to score" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert main([word for word in words if word != "--dry-run"]) == 2
    assert "--out is missing; name a new folder for the model, or use --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["accelerate", "gguf"])
def test_dry_run_of_gguf_asks_for_what_the_run_needs(package, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    found = importlib.util.find_spec
    here = {"gguf": True, "accelerate": True, package: None}  # what find_spec says of a package that is not there
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: here.get(name, found(name, *more)))
    assert main(["linearize", str(tmp_path / "model.gguf"), "--dry-run"]) == 2
    assert f"needs the package {package}, which is not installed; run `pip install" in sentence(capsys.readouterr().err)


def test_interrupt_saves_the_model(folder, tmp_path):
    """Ctrl-C in the middle of the training: the folder holds a model that loads, and says how far it came."""
    out = tmp_path / "out"
    arguments = command(folder, out, "--tokens", "25600000")
    process = subprocess.Popen(
        [sys.executable, "-m", "regla", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Stage 1"):
            break
    while not (out / "log.jsonl").is_file() or not (out / "log.jsonl").read_text():
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed
    assert f"Interrupted; the model as it is now is in {out}" in printed
    summary = json.loads((out / "linearize.json").read_text())
    assert summary["stages"]["attention transfer"]["steps"] >= 1 and "trained" not in summary["scores"]
    AutoModelForCausalLM.from_pretrained(out)


@pytest.fixture(scope="module")
def undisturbed(folder):
    out = folder / "undisturbed"
    assert main(command(folder, out, *SHORT)) == 0
    return out


SHORT = ("--tokens", "3072", "--transfer-tokens", "1280", "--save-every", "2")


@pytest.mark.parametrize("stopped_at", [1, 4, 5, 8, 11])
def test_resume_ends_in_the_same_model(stopped_at, folder, undisturbed, tmp_path, monkeypatch, capsys):
    """Killed at any step, in any stage: no checkpoint but what was saved on the way."""
    out = tmp_path / "out"
    write = TrainingLog.__call__

    def killed(log, record):
        write(log, record)
        if record["step"] == stopped_at:
            raise SystemExit(9)  # no signal that would save anything more

    monkeypatch.setattr(TrainingLog, "__call__", killed)
    with pytest.raises(SystemExit):
        main(command(folder, out, *SHORT))
    monkeypatch.undo()
    assert "trained" not in json.loads((out / "linearize.json").read_text())["scores"]
    assert main(command(folder, out, *SHORT, "--resume")) == 0
    assert ("goes on from" in capsys.readouterr().out) == (stopped_at > 2)
    ours, theirs = (load_file(place / "model.safetensors") for place in (out, undisturbed))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [record["step"] for record in read_log(out)] == list(range(1, 13))
    stages, expected = (json.loads((place / "linearize.json").read_text())["stages"] for place in (out, undisturbed))
    for name, stage in stages.items():
        assert stage["first_loss"] == expected[name]["first_loss"] and stage["last_loss"] == expected[name]["last_loss"]
    assert not list(out.glob("stage-*"))


def test_resume_says_what_it_cannot_do(folder, undisturbed, tmp_path, capsys):
    assert main(command(folder, undisturbed, *SHORT, "--resume")) == 2
    assert f"The conversion in {undisturbed} is finished; there is nothing to resume." in capsys.readouterr().err
    assert main(command(folder, folder, *SHORT, "--resume")) == 2
    assert f"{folder} holds no conversion to resume" in capsys.readouterr().err


def test_interrupted_and_resumed_with_other_options(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    write = TrainingLog.__call__

    def interrupted(log, record):
        write(log, record)
        if record["step"] == 7:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(TrainingLog, "__call__", interrupted)
    assert main(command(folder, out, *SHORT)) == 143
    monkeypatch.undo()
    assert "--resume goes on from the last checkpoint" in capsys.readouterr().out
    assert main(command(folder, out, *SHORT)) == 2
    assert f"{out} is not empty; give --out a new folder, or --resume to go on with its" in capsys.readouterr().err
    assert main(command(folder, out, *SHORT, "--resume", "--lr", "0.5")) == 2
    assert "is of a conversion with --lr 0.001, but this one has --lr 0.5" in capsys.readouterr().err
    assert main(command(folder, out, "--resume")) == 2
    assert "--resume without --tokens has nothing to go on with" in capsys.readouterr().err
    (out / "linearize.json").write_text("{")  # damaged; the checkpoints are whole
    (out / "log.jsonl").unlink()
    assert main(command(folder, out, *SHORT, "--resume", "previous")) == 0


def test_a_damaged_checkpoint_of_the_first_stage(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    write = TrainingLog.__call__

    def killed(log, record):
        write(log, record)
        if record["step"] == 6:  # before the second stage has a checkpoint
            raise SystemExit(9)

    monkeypatch.setattr(TrainingLog, "__call__", killed)
    with pytest.raises(SystemExit):
        main(command(folder, out, *SHORT))
    monkeypatch.undo()
    newest = out / "stage-1" / "checkpoints" / "step-000005"
    (newest / "model.safetensors").write_bytes(b"")
    assert main(command(folder, out, *SHORT, "--resume")) == 2
    assert "is corrupt" in capsys.readouterr().err
    assert main(command(folder, out, *SHORT, "--resume", "previous")) == 0


def test_a_finished_conversion_is_not_overwritten(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(folder, out)) == 0
    before = (out / "config.json").read_bytes()
    assert main(command(folder, out, *SHORT, "--resume", "--keep", "none")) == 2
    assert "is of a conversion with --keep every-2, but this one has --keep none" in capsys.readouterr().err
    assert (out / "config.json").read_bytes() == before


def test_a_loss_that_is_not_finite(folder, tmp_path, capsys):
    """Exit 1, one sentence, and the folder keeps the untrained model."""
    assert main(command(folder, tmp_path / "out", "--tokens", "7680", "--lr", "1e30")) == 1
    assert "is not finite" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("step", [2, 6])
def test_a_gradient_that_is_not_finite(step, folder, tmp_path, monkeypatch, capsys):
    """Behind a finite loss, in a step that saves a checkpoint and in the last one: no such weight is ever saved."""
    out = tmp_path / "out"
    backward, calls = torch.Tensor.backward, []

    def spoilt(loss, *args, **options):
        backward(loss, *args, **options)
        calls.append(1)
        if len(calls) == step:
            norm = model[0].model.norm.weight
            norm.grad = torch.full_like(norm, float("nan"))

    model = []
    run = driver.run_stages
    monkeypatch.setattr(driver, "run_stages", lambda *args, **options: model.append(args[1]) or run(*args, **options))
    monkeypatch.setattr(torch.Tensor, "backward", spoilt)
    options = ("--tokens", "1536", "--transfer-tokens", "0", "--save-every", "2")
    assert main(command(folder, out, *options)) == 1
    assert "The gradient of step" in (error := capsys.readouterr().err) and "in model.norm.weight;" in error
    assert "trained" not in json.loads((out / "linearize.json").read_text())["scores"]
    for file in out.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values()), file
    monkeypatch.undo()
    assert main(command(folder, out, *options, "--resume")) == 0


def sentence(error):
    """The last line, which is all there is but for transformers' progress bars, off only where `regla` starts anew."""
    *before, last = re.split(r"[\r\n]+", error.strip())
    assert last.startswith("regla: error: ") and all(not line or "%|" in line for line in before), error
    return last


def unsupported(place):
    OPTConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(place)


def foreign_tokenizer(place):
    llama().save_pretrained(place)  # 97 tokens
    train_tokenizer(["some words to make a tokenizer of"] * 3, 300).save_pretrained(place)


def cross_attention(place):
    GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True).save_pretrained(place)


def pickled(place):
    model = llama()
    model.config.save_pretrained(place)
    train_tokenizer(["a b"], 260).save_pretrained(place)
    torch.save(model.state_dict(), place / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unsupported, "the model is of type 'opt'; conversion supports 'llama', 'mistral', 'qwen2'"),
        (foreign_tokenizer, r"has ids up to \d+, but the model's vocab_size is 97"),
        (cross_attention, "add_cross_attention is True"),
        (pickled, "cannot be loaded"),
    ],
)
def test_bad_models(make, message, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    for more in ([], ["--dry-run"]):
        assert main(["linearize", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *more]) == 2
        error = capsys.readouterr().err
        assert re.search(message, sentence(error)), error
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tokens", "-1"], "--tokens is '-1', expected a number of tokens such as 60M or 500000"),
        (
            ["--tokens", "1280", "--transfer-tokens", "1536"],
            "--transfer-tokens and --long-tokens are 1536 together, expected at most 1280, since --tokens counts",
        ),
        (["--calibration-tokens", "600"], "--calibration-tokens is 600, expected 0 (none) or at least 1024"),
        (["--lr", "0"], "--lr is 0.0, expected a number above 0"),
        (
            ["--keep", "most"],
            "--keep is 'most'; expected 'none', 'every-N' with N of at least 2, 'sliding', 'auto:N' or 'auto:P%', ",
        ),
        (["--keep", "0,5"], "--keep names layer 5; the model has layers 0 to 1"),
        (["--keep", "0,,1"], "--keep is '0,,1'; expected"),
        (["--keep", "0,1"], "--keep 0,1 names every layer, so that none becomes linear"),
        (["--lr", "nan"], "--lr is nan, expected a number above 0"),
        (["--gate-start", "inf"], "--gate-start is inf, expected a number above 0"),
        (["--seed", str(2**70)], f"--seed is {2**70}, expected at most"),
        (["--batch-size", str(10**15)], "--batch-size is 1000000000000000, expected at most"),
        (["--data", "missing.txt"], "There is no file missing.txt"),
        (
            ["--data", "r.jsonl", "--text-field", "none"],
            "has no field 'none' (it has body); name the field of the text with --text-field",
        ),
        (["--data", "short.txt"], "expected more than one sequence of 512; give more text"),
    ],
)
def test_bad_arguments(folder, more, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("the cat sat on a mat. " * 20)
    (tmp_path / "r.jsonl").write_text('{"body": "a"}')
    for dry in ([], ["--dry-run"]):
        assert main(command(folder, tmp_path / "out", *more, *dry)) == 2
        error = capsys.readouterr().err
        assert message in sentence(error)
        assert not (tmp_path / "out").exists()


def test_keep_by_number(folder, tmp_path):
    assert main(command(folder, tmp_path / "out", "--keep", "0")) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["linear_layers"] == [1]
    assert LinearizeConfig(model="m", out="o", keep=(0, 7)).keep == "0,7"


def test_an_unknown_activation(folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "sililu"}))
    for more in ([], ["--dry-run"]):
        words = command(folder, tmp_path / "out", *more)
        words[1] = str(model)
        assert main(words) == 2
        assert "sililu" in sentence(capsys.readouterr().err)
        assert not (tmp_path / "out").exists()


def test_full_memory_is_one_sentence(folder, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("regla.linearize.driver.calibrate", full)
    assert main(command(folder, tmp_path / "out")) == 1
    assert sentence(capsys.readouterr().err) == (
        "regla: error: The memory of the device is full; lower --batch-size, --seq-len or --calibration-tokens, "
        "or give --preset lora, which trains fewer weights."
    )


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        (
            {"features_after": 3.9},
            "layer 1: 3.9 of 16 key features are effective, expected 4; name such layers in --keep",
        ),
        (
            {"kl_after": 2.5, "kl_uniform": 2.25},
            "layer 1: its KL from softmax attention is 2.50 nats, expected less than the 2.25 of uniform attention;",
        ),
    ],
)
def test_a_layer_that_calibration_does_not_fit(figures, message, folder, tmp_path, monkeypatch, capsys):
    fit = driver.calibrate

    def spoilt(*args, **options):
        rows = fit(*args, **options)
        return [*rows[:-1], replace(rows[-1], **figures)]

    monkeypatch.setattr(driver, "calibrate", spoilt)
    assert main(command(folder, tmp_path / "out", "--keep", "none")) == 2
    assert message in sentence(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_transfer_that_fails(folder, tmp_path, monkeypatch, capsys):
    """A planted fault: the sentence names the layer, and nothing is written."""
    made = driver.make_student

    def spoilt(*args):
        student = made(*args)
        with torch.no_grad():
            student.model.model.layers[1].self_attn.mixer.v_proj.weight.mul_(1.1)
        return student

    monkeypatch.setattr(driver, "make_student", spoilt)
    assert main(command(folder, tmp_path / "out", "--keep", "none")) == 2
    assert "layer 1 is the first to differ" in sentence(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_stages():
    def stages(**options):
        config = LinearizeConfig(model="m", out="o", batch_size=4, seq_len=64, **options)
        return {stage.name: (stage.steps, stage.batch_size, stage.seq_len) for stage in config.stages}

    assert stages(tokens=300 * 256) == {"attention transfer": (100, 4, 64), "distillation": (200, 4, 64)}
    assert stages(tokens="2.56k", transfer_tokens="2560") == {"attention transfer": (10, 4, 64)}
    assert stages(tokens=2560, transfer_tokens=0) == {"distillation": (10, 4, 64)}
    assert stages(tokens=2560, preset="paper") == {"cross-entropy": (10, 4, 64)}
    assert stages(tokens=4096, long_tokens=1024, long_seq_len=128) == {
        "attention transfer": (4, 4, 64),
        "distillation": (8, 4, 64),
        "long-context tuning": (4, 2, 128),
    }
    assert stages(tokens=2560, init="i") == {"distillation": (10, 4, 64)}  # no layer is new
    assert stages() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 511}, "tokens is 511, too few for a step of distillation (4 x 64 tokens); give at least 512,"),
        ({"tokens": 600, "transfer_tokens": 100}, "transfer_tokens is 100, too few for a step of attention transfer"),
        (
            {"tokens": 600, "transfer_tokens": 512},
            "tokens is 600, too few for a step of distillation (4 x 64 tokens); give at least 768",
        ),
        (
            {"tokens": 255, "preset": "paper"},
            "tokens is 255, too few for a step of cross-entropy (4 x 64 tokens); give at least 256",
        ),
        (
            {"tokens": 9999, "long_tokens": 99},
            "long_tokens is 99, too few for a step of long-context tuning (1 x 2048 tokens); give at least 2048",
        ),
        ({"tokens": "60X"}, "tokens is '60X', expected a number of tokens such as 60M or 500000"),
        (
            {"tokens": 600, "preset": "paper", "transfer_tokens": 256},
            "preset paper has no attention transfer; leave transfer_tokens out",
        ),
        ({"tokens": 600, "long_seq_len": 256}, "long_seq_len is given without long_tokens"),
        (
            {"keep": "auto:25%"},
            "keep auto:25% chooses layers after attention transfer, which this conversion does not have",
        ),
        ({"keep": "auto:1", "tokens": 600, "transfer_tokens": 0}, "chooses layers after attention transfer"),
        ({"keep": "all", "tokens": 600}, "keep all leaves the model as it is, which has nothing to learn from itself"),
        (
            {"gate_start": "teacher", "calibration_tokens": 0},
            "gate_start teacher is measured on the calibration's tokens",
        ),
        (
            {"gate_start": "soon"},
            "gate_start is 'soon', expected teacher, distance or a half-life in tokens such as 14",
        ),
        ({"mixer": "gru"}, "mixer is 'gru', expected one of additive, delta, relu, hedgehog"),
        ({"preset": "fast"}, "preset is 'fast', expected one of distill, paper, lora"),
        ({"mixer": "window", "tokens": 600}, "mixer window is not trained, but tokens is given"),
        ({"window": 32}, "window is given without mixer window"),
        ({"init": "i", "keep": "none", "mixer": "delta"}, "Both init and mixer are given"),
    ],
)
def test_what_contradicts_itself(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LinearizeConfig(model="m", out="o", batch_size=4, seq_len=64, **options)


def test_a_full_folder_is_left_alone(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        linearize(str(folder / "model"), out=str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
