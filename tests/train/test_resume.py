"""Runs that end early, in every way, go on exactly where they were and end in the same weights."""

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regla.cli import main
from regla.data.embedded import embedded_text
from regla.runtime import checkpoint
from regla.runtime.signals import Interrupted
from regla.train import loop, material, run
from regla.train.config import TrainConfig

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "seq_len": 32,
    "batch_size": 2,
    "lr": 1e-2,
    "device": "cpu",
    "mixer": "hybrid",
}
STEPS = 9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n<|endoftext|>\n".join(embedded_text().documents[:2]), encoding="utf-8")
    return file


def config(out: Path, corpus: Path, **arguments) -> TrainConfig:
    return TrainConfig(
        **{"out": str(out), "data": (str(corpus),), "steps": STEPS, "save_every": 3, "eval_every": 4} | TINY | arguments
    )


def command(out: Path, corpus: Path, *more: str) -> list[str]:
    """The command line of `config`."""
    options = {"--out": out, "--data": corpus, "--steps": STEPS, "--save-every": 3, "--eval-every": 4}
    options |= {"--" + name.replace("_", "-"): value for name, value in TINY.items()}
    return ["train", *(str(part) for pair in options.items() for part in pair), *more]


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run.train(config(out, corpus))
    return out


def act_in_step(number: int, act, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `act` when the crops of step `number` are drawn."""
    draw = loop.crops

    def drawing(*arguments, batch: int, **options):
        if batch == number - 1:
            act()
        return draw(*arguments, batch=batch, **options)

    monkeypatch.setattr(loop, "crops", drawing)


def end_in_step(number: int, arguments: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until step `number`, which does not happen any more; the checkpoints before it stay."""
    with monkeypatch.context() as patch, pytest.raises(FloatingPointError):

        def fail() -> None:
            raise FloatingPointError("The end.")

        act_in_step(number, fail, patch)
        run.train(arguments)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def assert_same_end(out: Path, undisturbed: Path) -> None:
    """Same weights bit for bit, same losses, and every step in the log once."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, undisturbed))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    ours, theirs = (json.loads((folder / "training.json").read_text()) for folder in (out, undisturbed))
    for key in ("train_loss", "validation_loss", "steps", "tokens", "complete"):
        assert ours[key] == theirs[key], key
    assert records(out) == records(undisturbed)


def records(out: Path) -> list[dict[str, float]]:
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def test_the_log_has_every_step_once(undisturbed: Path) -> None:
    lines = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in lines] == [64 * step for step in range(1, STEPS + 1)]
    assert lines[0]["loss"] == pytest.approx(math.log(300), abs=0.3) and lines[-1]["loss"] < lines[0]["loss"]
    assert max(line["lr"] for line in lines) == pytest.approx(1e-2) and lines[-1]["lr"] == pytest.approx(1e-3)
    assert all(line["gradient_norm"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert all(later["seconds"] > earlier["seconds"] for earlier, later in pairwise(lines))
    assert [line["step"] for line in lines if "validation_loss" in line] == [4, 8]
    final = json.loads((undisturbed / "training.json").read_text())["validation_loss"]
    assert lines[7]["validation_loss"] == pytest.approx(final, rel=0.05)


def test_the_last_two_checkpoints_stay(undisturbed: Path) -> None:
    assert checkpoints(undisturbed) == ["step-000003", "step-000006"]
    names = {path.name for path in (undisturbed / "checkpoints" / "step-000006").iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_checkpoint_and_resume_goes_on(
    number: signal.Signals,
    code: int,
    corpus: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        act_in_step(5, lambda: signal.raise_signal(number), patch)
        assert main(command(out, corpus)) == code
    assert signal.getsignal(number) is before
    assert checkpoints(out) == ["step-000003", "step-000005"]
    assert not json.loads((out / "training.json").read_text())["complete"]
    printed = capsys.readouterr()
    assert f"--resume goes on from the last checkpoint, {out / 'checkpoints' / 'step-000005'}." in printed.out
    assert printed.err.endswith("regla: interrupted\n")

    assert main(command(out, corpus, "--resume")) == 0
    assert f"Goes on from {out / 'checkpoints' / 'step-000005'}." in capsys.readouterr().out
    assert_same_end(out, undisturbed)


def test_a_second_signal_ends_at_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    act_in_step(2, twice, monkeypatch)
    with pytest.raises(Interrupted) as caught:
        run.train(config(tmp_path / "run", corpus))
    assert caught.value.signum == signal.SIGTERM


def test_resume_without_a_checkpoint_starts(
    corpus: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """So that one command serves for every start of a job that may be killed at any time."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "log.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "lo')
    (out / "checkpoints" / ".unfinished-step-000003").mkdir(parents=True)
    assert main(command(out, corpus, "--resume")) == 0
    assert "Goes on from the start: there is no checkpoint yet." in capsys.readouterr().out
    assert checkpoints(out) == ["step-000003", "step-000006"]
    assert_same_end(out, undisturbed)


def test_a_loss_that_is_not_finite_keeps_and_names_the_last_good_checkpoint(
    corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    good = loop.next_token_loss
    calls = []

    def spoilt(model, crop_BL):
        calls.append(0)
        return good(model, crop_BL) * (math.nan if len(calls) == 6 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(material, "next_token_loss", spoilt)
        assert main(command(out, corpus)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "regla: error: The loss of step 6 is not finite; with it 1 of the last 100 steps are skipped, and at "
        "most 0 may be; lower --lr or lengthen --warmup. "
        f"--resume goes on from the last checkpoint, {out / 'checkpoints' / 'step-000003'}."
    )
    assert checkpoints(out) == ["step-000003"] and not (out / "model.safetensors").exists()
    assert main(command(out, corpus, "--resume")) == 0
    assert_same_end(out, undisturbed)


def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(
    corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    write = checkpoint._write
    written = []

    def filling(path: Path, content: bytes):
        written.append(path)
        if len(written) == 7:  # the optimiser of the second checkpoint
            path.write_bytes(content[: len(content) // 2])
            raise OSError(28, os.strerror(28))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", filling)
        assert main(command(out, corpus)) == 2
    assert written[6].name == "optimizer.safetensors"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"regla: error: The checkpoint of step 6 cannot be written to {out / 'checkpoints'} (No space left on device). "
        f"--resume goes on from the last checkpoint, {out / 'checkpoints' / 'step-000003'}."
    )
    assert checkpoints(out) == ["step-000003"]
    assert main(command(out, corpus, "--resume")) == 0
    assert_same_end(out, undisturbed)


def test_a_limit_of_the_system_on_file_sizes(
    corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write itself fails halfway, in a process of its own."""
    out = tmp_path / "run"
    end_in_step(5, config(out, corpus), monkeypatch)
    size = (out / "checkpoints" / "step-000003" / "optimizer.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-m", "regla", *command(out, corpus, "--resume")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, size - 1000)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("regla: error: The checkpoint of step 6 cannot be written to") and "too large" in error
    assert checkpoints(out) == ["step-000003"]
    run.train(config(out, corpus, resume="latest"))
    assert_same_end(out, undisturbed)


@pytest.fixture
def two_checkpoints(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    end_in_step(8, config(tmp_path / "run", corpus), monkeypatch)
    assert checkpoints(tmp_path / "run") == ["step-000003", "step-000006"]
    return tmp_path / "run"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def odd_size(file: Path) -> None:
    manifest = json.loads(file.read_text())
    manifest["files"]["model.safetensors"]["size"] = []
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", truncate, r"model.safetensors is corrupt: it has [\d,]+ bytes, expected [\d,]+; "),
        ("optimizer.safetensors", flip, r"optimizer.safetensors is corrupt: its content does not have the recorded "),
        ("random.safetensors", Path.unlink, r"random.safetensors cannot be read \(No such file or directory\); "),
        ("manifest.json", truncate, r"manifest.json is missing or damaged; "),
        ("manifest.json", odd_size, r"manifest.json is missing or damaged; "),
    ],
)
def test_a_corrupt_checkpoint_is_named_and_the_previous_one_offered(
    name: str, damage, message: str, corpus: Path, two_checkpoints: Path
) -> None:
    newest = two_checkpoints / "checkpoints" / "step-000006"
    damage(newest / name)
    with pytest.raises(ValueError, match=message + r".*--resume previous goes on from .*step-000003\.$") as caught:
        run.train(config(two_checkpoints, corpus, resume="latest"))
    assert str(newest / name) in str(caught.value)
    assert newest.is_dir()  # nothing is thrown away before the user says so


def test_resume_previous(corpus: Path, undisturbed: Path, two_checkpoints: Path, capsys: pytest.CaptureFixture) -> None:
    truncate(two_checkpoints / "checkpoints" / "step-000006" / "model.safetensors")
    assert main(command(two_checkpoints, corpus, "--resume")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(command(two_checkpoints, corpus, "--resume", "previous")) == 0
    assert_same_end(two_checkpoints, undisturbed)
    assert main(command(two_checkpoints, corpus, "--resume")) == 0  # the damaged one was written anew


def test_previous_needs_two(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_in_step(5, config(tmp_path / "run", corpus), monkeypatch)
    with pytest.raises(ValueError, match="holds no checkpoint before the newest; use --resume alone"):
        run.train(config(tmp_path / "run", corpus, resume="previous"))


def test_a_run_of_other_settings_is_refused(
    corpus: Path, undisturbed: Path, two_checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text()[:-100])
    for options, message in (
        ({"lr": 5e-3}, r"step-000006 is of a run with --lr 0.01, but this one has --lr 0.005; repeat the options"),
        ({"overrides": {"qk_norm": True}}, r"with --config \{\}, but this one has --config \{'qk_norm': True\}"),
        ({"steps": 12}, r"with --steps 9, but this one has --steps 12"),
        ({"data": (str(other),)}, r"with --data \(SHA-256 of its tokens\) [0-9a-f]{64}, but"),
    ):
        with pytest.raises(ValueError, match=message):
            run.train(config(two_checkpoints, corpus, resume="latest", **options))
    assert main([*command(two_checkpoints, corpus, "--resume"), "--seed", "3"]) == 2
    assert "with --seed 0, but this one has --seed 3" in capsys.readouterr().err
    shutil.copy(corpus, tmp_path / "renamed.txt")  # the same text by another name, saved more often: the same run
    run.train(config(two_checkpoints, tmp_path / "renamed.txt", resume="latest", save_every=1))
    assert_same_end(two_checkpoints, undisturbed)


def test_a_full_folder_is_refused(corpus: Path, two_checkpoints: Path, tmp_path: Path, capsys) -> None:
    assert main(command(two_checkpoints, corpus)) == 2
    assert capsys.readouterr().err == (
        f"regla: error: {two_checkpoints} is not empty; give --out a new folder, "
        "or --resume to go on from its step-000006.\n"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").touch()
    assert main(command(tmp_path / "other", corpus, "--resume")) == 2
    assert "other holds no checkpoint to resume from" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_on_a_gpu_goes_on_with_the_same_losses(
    dtype: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: sums on a GPU have no fixed order."""
    options = {"device": "cuda", "dtype": dtype, "save_every": 1}
    whole = run.train(config(tmp_path / "whole", corpus, **options))
    end_in_step(6, config(tmp_path / "run", corpus, **options), monkeypatch)
    resumed = run.train(config(tmp_path / "run", corpus, resume="latest", **options))
    for key in ("train_loss", "validation_loss"):
        assert resumed[key] == pytest.approx(whole[key], rel=1e-4 if dtype == "float32" else 1e-2), key
    assert [line["step"] for line in records(tmp_path / "run")] == list(range(1, STEPS + 1))


def killed_runs(kills: int, corpus: Path, undisturbed: Path, folder: Path) -> int:
    """Kill runs that save after each step at random moments until `kills` are dead, and resume each to its end.

    Returns how many died while they wrote or removed a checkpoint.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["regla.train.run"])
    moments = random.Random(0)
    dead, writing, out = 0, 0, folder / "0"
    length = None  # seconds from the first to the last checkpoint of a run
    while True:
        process = processes.Process(target=run.train, args=(config(out, corpus, save_every=1, resume="latest"),))
        process.start()
        if dead < kills and length is not None:
            saved = (out / "checkpoints").stat().st_mtime_ns if (out / "checkpoints").exists() else 0
            while process.is_alive() and not (
                (out / "checkpoints").exists() and (out / "checkpoints").stat().st_mtime_ns != saved
            ):
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.5 * length))
            process.kill()
        began = None
        while process.is_alive():
            if began is None and (out / "checkpoints").exists():
                began = time.perf_counter()
            time.sleep(0.001)
        process.join()
        if process.exitcode == 0:
            length = time.perf_counter() - began if length is None else length
            assert_same_end(out, undisturbed)
            if dead >= kills:
                return writing
            out = folder / str(int(out.name) + 1)
        else:
            assert process.exitcode == -signal.SIGKILL
            dead += 1
            writing += any((out / "checkpoints").glob(".unfinished-*"))


def test_killed_runs_end_in_the_same_weights(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    killed_runs(2, corpus, undisturbed, tmp_path)


@pytest.mark.slow
def test_runs_killed_at_20_moments_end_in_the_same_weights(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    assert killed_runs(20, corpus, undisturbed, tmp_path) > 0  # some while they wrote
