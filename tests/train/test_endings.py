"""Runs that end badly or share a folder: what is saved, what is left, and what the next run says."""

import json
import math
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regla.cli import main
from regla.data.tokenizer import train_tokenizer
from regla.linearize.convert import convert
from regla.runtime import checkpoint, files
from regla.runtime.files import alone_in
from regla.train import material, run
from regla.train.config import TrainConfig
from regla.train.parallel import Parallel
from tests.linearize.models import llama

TINY = {"vocab_size": 300, "hidden_size": 16, "layers": 1, "heads": 2, "seq_len": 16, "batch_size": 2, "device": "cpu"}
STEPS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("".join(f"Line {number} of the text says {number % 7}.\n" for number in range(300)))
    return file


def config(out: Path, corpus: Path, **arguments) -> TrainConfig:
    return TrainConfig(**{"out": str(out), "data": (str(corpus),), "steps": STEPS, "save_every": 2} | TINY | arguments)


def command(out: Path, corpus: Path, *more: str) -> list[str]:
    options = {"--out": out, "--data": corpus, "--steps": STEPS, "--save-every": 2}
    options |= {"--" + name.replace("_", "-"): value for name, value in TINY.items()}
    return ["train", *(str(part) for pair in options.items() for part in pair), *more]


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def spoil_gradient(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one NaN into the gradient of step `step` behind a finite loss."""
    clip, calls = Parallel.clip, []

    def clipped(parallel: Parallel, parameters: list[torch.nn.Parameter], norm: float) -> tuple[Tensor, Tensor]:
        calls.append(0)
        if len(calls) == step:
            parameters[0].grad.view(-1)[0] = math.nan
        return clip(parallel, parameters, norm)

    monkeypatch.setattr(Parallel, "clip", clipped)


@pytest.mark.parametrize("step", [4, STEPS])  # one that saves a checkpoint, and the last
def test_a_nan_gradient_is_never_saved(
    step: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil_gradient(step, patch)
        assert main(command(out, corpus)) == 1
    last = checkpoints(out)[-1]
    assert last == f"step-{step - 2:06d}" and not (out / "model.safetensors").exists()
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"regla: error: The gradient of step {step} is not finite, in model.embed_tokens.weight; with it 1 of the last "
        "100 steps are skipped, and at most 0 may be; lower --lr or lengthen --warmup. "
        f"--resume goes on from the last checkpoint, {out / 'checkpoints' / last}."
    )
    for name in ("model", "optimizer"):
        found = load_file(out / "checkpoints" / last / f"{name}.safetensors")
        assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())
    assert main(command(out, corpus, "--resume")) == 0
    assert main(command(tmp_path / "undisturbed", corpus)) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "undisturbed"))
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.items())


@pytest.mark.parametrize("state", [False, True])
def test_numbers_that_are_not_finite_are_in_no_checkpoint(
    state: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A weight, or the optimiser's state, spoiled by the step before the checkpoint."""
    step, steps = torch.optim.AdamW.step, []

    def spoiling(optimizer: torch.optim.AdamW) -> None:
        step(optimizer)
        steps.append(0)
        parameter = optimizer.param_groups[0]["params"][0]
        if len(steps) == 4:
            (optimizer.state[parameter]["exp_avg_sq"] if state else parameter.data).view(-1)[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", spoiling)
    assert main(command(tmp_path / "run", corpus)) == 1
    named = "" if state else ", first model.embed_tokens.weight"
    assert f"The weights are no longer finite (by step 4){named}; lower --lr" in capsys.readouterr().err
    assert checkpoints(tmp_path / "run") == ["step-000002"] and not (tmp_path / "run" / "model.safetensors").exists()


def test_a_validation_loss_that_is_not_finite_is_a_failure(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    score = material.score
    monkeypatch.setattr(
        material, "score", lambda *arguments, **options: replace(score(*arguments, **options), loss=math.nan)
    )
    assert main(command(tmp_path / "run", corpus)) == 1
    assert "The validation loss of the model in" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").exists()


def killed_while(name: str, out: Path, corpus: Path) -> None:
    """A run of a process that kills itself between writing `.unfinished-NAME` and its rename."""
    code = f"""
import os, signal, sys
from pathlib import Path
from regla.cli import main
from regla.data.tokenizer import train_tokenizer
from regla.linearize.convert import convert
replace, rename = os.replace, Path.rename
def die(source, target, act):
    if Path(target).name == {name!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return act(source, target)
os.replace = lambda source, target: die(source, target, replace)
Path.rename = lambda source, target: die(source, target, rename)
main(sys.argv[1:])
"""
    process = subprocess.run([sys.executable, "-c", code, *command(out, corpus)], capture_output=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert list(out.rglob(f".unfinished-{name}"))


@pytest.mark.parametrize("options", [pytest.param([], marks=pytest.mark.slow), ["--resume"]])
def test_a_kill_while_the_log_begins_stops_nothing(options: list[str], corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed_while("log.jsonl", out, corpus)
    assert main(command(out, corpus, *options)) == 0
    assert not list(out.rglob(".unfinished-*")) and not (out / ".lock").exists()
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").open()] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", [pytest.param("step-000002", marks=pytest.mark.slow), "training.json"])
def test_a_kill_during_any_other_write_is_resumed(name: str, corpus: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    killed_while(name, out, corpus)
    assert main(command(out, corpus)) == 2  # what it has written already is not overwritten
    assert "is not empty; give --out a new folder" in capsys.readouterr().err
    assert main(command(out, corpus, "--resume")) == 0
    assert not list(out.rglob(".unfinished-*")) and json.loads((out / "training.json").read_text())["complete"]


def test_leftovers_alone_are_no_content(corpus: Path, tmp_path: Path) -> None:
    for number, options in enumerate(([], ["--resume"])):
        out = tmp_path / str(number)
        (out / "checkpoints" / ".unfinished-step-000002").mkdir(parents=True)
        (out / ".unfinished-training.json").touch()
        (out / ".unfinished-anything").mkdir()
        assert main(command(out, corpus, *options)) == 0
        assert not list(out.rglob(".unfinished-*"))


def test_two_runs_into_one_new_folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen the folder empty before either takes it."""
    out, outcomes = tmp_path / "run", {}
    barrier, check, met = threading.Barrier(2), files.check_new, set()

    def meet(folder: Path) -> None:
        check(folder)
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            barrier.wait()

    def start(seed: int) -> None:
        try:
            outcomes[seed] = run.train(config(out, corpus, seed=seed))["arguments"]["seed"]
        except ValueError as error:
            outcomes[seed] = str(error)

    monkeypatch.setattr(files, "check_new", meet)
    threads = [threading.Thread(target=start, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [seed for seed in (1, 2) if outcomes[seed] == seed]
    said = outcomes[3 - winner]
    assert said == f"Another run is at work in {out}; wait for it, or give another out." or "is not empty" in said
    assert json.loads((out / "training.json").read_text())["arguments"]["seed"] == winner
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").open()] == list(range(1, STEPS + 1))


def test_a_second_resume_is_refused_and_disturbs_nothing(corpus: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert main(command(out, corpus)) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    with alone_in(out):
        for options in (["--resume"], ["--resume", "previous"]):
            assert main(command(out, corpus, *options)) == 2
            assert capsys.readouterr().err == (
                f"regla: error: Another run is at work in {out}; wait for it, or give another --out.\n"
            )
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_killed_run_leaves_no_lock(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "regla", *command(out, corpus, "--steps", "100000")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while process.poll() is None and not list(out.glob("checkpoints/step-*")):
            time.sleep(0.01)
        assert process.poll() is None
        with pytest.raises(ValueError, match="Another run is at work in"):
            run.train(config(out, corpus, steps=100000, resume="latest"))
    finally:
        process.kill()
        process.wait()
    assert (out / ".lock").exists()
    with alone_in(out):
        pass


def test_a_finished_run_goes_on_with_more_steps(corpus: Path, tmp_path: Path, capsys) -> None:
    """From its last checkpoint (4 of 6), with the learning rates of the longer run; as often as one likes."""
    out = tmp_path / "run"
    assert main(command(out, corpus, "--warmup", "1")) == 0
    with pytest.raises(ValueError, match="with --steps 6, but this one has --steps 5"):
        run.train(config(out, corpus, warmup=1, steps=5, resume="latest"))
    assert main(command(out, corpus, "--warmup", "1", "--steps", "10", "--resume")) == 0
    assert f"Goes on from {out / 'checkpoints' / 'step-000004'}." in capsys.readouterr().out
    summary = json.loads((out / "training.json").read_text())
    assert summary["complete"] and summary["steps"] == 10
    rates = [json.loads(line)["lr"] for line in (out / "log.jsonl").open()]
    from regla.train.loop import learning_rate

    expected = [learning_rate(step, steps=6 if step < 4 else 10, warmup=1, peak=3e-3) for step in range(10)]
    assert rates == expected
    tokens = 14 * config(out, corpus).tokens_per_step
    run.train(config(out, corpus, warmup=1, steps=None, tokens=tokens, resume="latest"))
    assert json.loads((out / "training.json").read_text())["steps"] == 14


def test_a_longer_run_that_was_killed_goes_on_exactly(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    weights = []
    for name, dies in (("whole", False), ("killed", True)):
        out = tmp_path / name
        run.train(config(out, corpus))
        if dies:
            with monkeypatch.context() as patch, pytest.raises(FloatingPointError):
                spoil_gradient(5, patch)  # step 9
                run.train(config(out, corpus, steps=12, resume="latest", max_skipped_steps=0))
            assert checkpoints(out)[-1] == "step-000008"
        run.train(config(out, corpus, steps=12, resume="latest"))
        weights.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_run_too_short_for_a_checkpoint_can_be_longer(corpus: Path, tmp_path: Path) -> None:
    run.train(config(tmp_path / "run", corpus, save_every=None))
    assert checkpoints(tmp_path / "run") == ["step-000006"]
    summary = run.train(config(tmp_path / "run", corpus, save_every=None, steps=8, resume="latest"))
    assert summary["steps"] == 8 and summary["complete"]


def test_a_checkpoint_of_an_older_version_is_refused(corpus: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 1)
        run.train(config(tmp_path / "run", corpus))
    assert main(command(tmp_path / "run", corpus, "--resume")) == 2
    error = capsys.readouterr().err
    assert "step-000004 was written by another version of regla (format 1, this one reads 2); go on with" in error


def test_init_starts_from_a_model(corpus: Path, tmp_path: Path, capsys) -> None:
    first = tmp_path / "first"
    run.train(config(first, corpus, mixer="hybrid", layers=2))
    model = {name: value for name, value in TINY.items() if name in ("seq_len", "batch_size", "device")}
    options = ["--init", str(first), "--data", str(corpus), "--steps", "1", "--lr", "1e-12"]
    options += [str(part) for name, value in model.items() for part in ("--" + name.replace("_", "-"), value)]
    assert main(["train", "--out", str(tmp_path / "second"), *options]) == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("second", "first"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-9)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0] == configs[1] and configs[0]["layer_types"] == ["linear_attention", "full_attention"]
    assert (tmp_path / "second" / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()
    ours, theirs = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("second", "first"))
    assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-5)


def test_init_takes_a_converted_model_and_no_other(corpus: Path, tmp_path: Path) -> None:
    original = llama(vocab_size=300, tie_word_embeddings=True)
    tokenizer = train_tokenizer([corpus.read_text()], 300)
    for name, model in (("original", original), ("converted", convert(original, keep="every-2"))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options = {"data": (str(corpus),), "steps": 2, "device": "cpu", "seq_len": 16, "batch_size": 2}
    summary = run.train(TrainConfig(out=str(tmp_path / "run"), init=str(tmp_path / "converted"), **options))
    assert summary["complete"] and math.isfinite(summary["validation_loss"])
    layers = [
        json.loads((tmp_path / name / "config.json").read_text())["linear_layers"] for name in ("run", "converted")
    ]
    assert layers[0] == layers[1] == [0, 2]
    with pytest.raises(ValueError, match="original holds a model of type llama, expected one of regla; convert it"):
        run.train(TrainConfig(out=str(tmp_path / "other"), init=str(tmp_path / "original"), **options))
    assert not (tmp_path / "other").exists()


def test_an_init_run_resumes_only_with_its_weights(corpus: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        run.train(config(tmp_path / name, corpus, steps=1, seed=seed))
    options = {name: value for name, value in TINY.items() if name in ("seq_len", "batch_size", "device")}
    options |= {"data": (str(corpus),), "steps": 4, "save_every": 2, "out": str(tmp_path / "run")}
    run.train(TrainConfig(init=str(tmp_path / "a"), **options))
    whole = load_file(tmp_path / "run" / "model.safetensors")
    with pytest.raises(ValueError, match=r"is of a run with --init \(SHA-256 of its weights\)"):
        run.train(TrainConfig(init=str(tmp_path / "b"), resume="latest", **options))
    run.train(TrainConfig(init=str(tmp_path / "a"), resume="latest", **options))
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


def test_init_and_options_of_a_new_model_exclude_each_other(tmp_path: Path, capsys) -> None:
    for option, value in (("--layers", "3"), ("--mixer", "hybrid"), ("--tokenizer", "t"), ("--vocab-size", "300")):
        assert main(["train", "--out", "new", "--init", "folder", option, value]) == 2
        assert capsys.readouterr().err == (
            f"regla: error: Both --init and {option} are given; the model and its tokenizer are those of the folder: "
            "leave one out.\n"
        )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seed", str(2**70), "--seed is 1180591620717411303424, expected at most 9223372036854775807."),
        ("--seed", "-1", "--seed is -1, expected 0 or more."),
        ("--steps", str(10**30), f"--steps is {10**30}, expected at most 2147483647."),
        ("--batch-size", str(2**40), "--batch-size is 1099511627776, expected at most 2147483647."),
        ("--hidden-size", "-8", "--hidden-size is -8, expected a number above 0."),
        ("--lr", "nan", "--lr is nan, expected a number above 0."),
        ("--lr", "inf", "--lr is inf, expected a number above 0."),
        ("--weight-decay", "nan", "--weight-decay is nan, expected 0 or more."),
        ("--weight-decay", "-1", "--weight-decay is -1.0, expected 0 or more."),
        ("--warmup", "-3", "--warmup is -3, expected 0 or more."),
        ("--save-every", "0", "--save-every is 0, expected a number above 0."),
        ("--tokens", str(10**20), f"--tokens is {10**20}, expected at most 9007199254740992."),
    ],
)
def test_extreme_numbers_on_the_command_line(option: str, value: str, message: str, capsys) -> None:
    assert main(["train", "--out", "new", option, value]) == 2
    assert capsys.readouterr().err == f"regla: error: {message}\n"


def test_the_largest_seed_trains(corpus: Path, tmp_path: Path) -> None:
    assert run.train(config(tmp_path / "run", corpus, steps=1, seed=2**63 - 1))["complete"]


def test_a_memory_that_is_full_is_one_sentence(corpus: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run, "match_softmax", lambda _: torch.empty(2**58))
    assert main(command(tmp_path / "run", corpus)) == 1
    error = capsys.readouterr().err
    assert "The memory of the device is full; lower --batch-size" in error and "Traceback" not in error
