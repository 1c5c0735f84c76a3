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
    assert "regla linearize model --out converted --keep none" in card and "--steps 90" in card
    assert str(folder) not in card
    assert f"{summary['transfer_error']:.1e} of the largest" in card
    figures = [f"{summary['scores'][key][0]['perplexity']:.2f}" for key in ("original", "converted", "trained")]
    assert f"| text.txt | 1,000 | {' | '.join(figures)} |" in card
    row = summary["calibration"][1]
    assert f"| 1 | {row['features_before']:.1f} | {row['features_after']:.1f} |" in card
    assert all(version in card for version in summary["versions"].values())


def test_same_seed_same_model(folder, tmp_path):
    for name in "ab":
        assert main(command(folder, tmp_path / name, "--steps", "3")) == 0
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
    assert main(command(folder, tmp_path / "out", "--steps", "4", "--dtype", "bfloat16")) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_dry_run_writes_nothing(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out", "--steps", "10", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"estimated time +[\d.]+ minutes on cpu: 40 sequences", printed)
    for expected in ("parameters", "training memory", "2,560 (10 steps of 4 x 64)", "512k tokens"):
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
    arguments = command(folder, out, "--steps", "100000")
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


SHORT = ("--steps", "12", "--transfer-steps", "5", "--save-every", "2")


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
    assert "--resume without --steps has nothing to go on with" in capsys.readouterr().err
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
    assert main(command(folder, tmp_path / "out", "--steps", "30", "--lr", "1e30")) == 1
    assert "no longer finite" in capsys.readouterr().err
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
    options = ("--steps", "6", "--transfer-steps", "0", "--save-every", "2")
    assert main(command(folder, out, *options)) == 1
    assert "not finite" in (error := capsys.readouterr().err) or "no longer finite" in error
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
        (["--steps", "-1"], "--steps is -1, expected 0 or more"),
        (["--steps", "5", "--transfer-steps", "6"], "--transfer-steps is 6, expected 0 to 5"),
        (["--calibration-tokens", "600"], "--calibration-tokens is 600, expected at least 1024"),
        (["--lr", "0"], "--lr is 0.0, expected a number above 0"),
        (
            ["--keep", "most"],
            "--keep is 'most'; expected 'none', 'every-N' with N of at least 2, 'sliding', or layer numbers",
        ),
        (["--keep", "0,5"], "--keep names layer 5; the model has layers 0 to 1"),
        (["--keep", "0,,1"], "--keep is '0,,1'; expected"),
        (["--keep", "0,1"], "--keep 0,1 names every layer, so that none becomes linear"),
        (["--lr", "nan"], "--lr is nan, expected a number above 0"),
        (["--gate-bias", "inf"], "--gate-bias is inf, expected a finite number"),
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
        "regla: error: The memory of the device is full; lower --batch-size, --seq-len or --calibration-tokens."
    )


def test_stages():
    def stages(**options):
        return LinearizeConfig(model="m", out="o", **options).stages

    assert stages(steps=300) == {"attention transfer": 100, "distillation": 200}
    assert stages(steps=10, transfer_steps=10) == {"attention transfer": 10}
    assert stages(steps=10, transfer_steps=0) == {"distillation": 10}
    assert stages() == {}


def test_a_full_folder_is_left_alone(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        linearize(LinearizeConfig(model=str(folder / "model"), out=str(tmp_path)))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
