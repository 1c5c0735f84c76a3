"""What a conversion computed before it was stopped is not computed again."""

import json

import pytest

import regla.linearize.driver as driver
from regla.cli import main
from regla.linearize.texts import Texts
from regla.runtime.log import TrainingLog
from tests.linearize.models import command

SHORT = ("--tokens", "1024", "--save-every", "2")


@pytest.fixture
def scored(monkeypatch):
    """The models that are scored, by the number of times."""
    found = []
    score = Texts.scores
    monkeypatch.setattr(Texts, "scores", lambda *args: found.append(type(args[1]).__name__) or score(*args))
    return found


def stop_in_step(number, monkeypatch, folder, out):
    write = TrainingLog.__call__

    def killed(log, record):
        write(log, record)
        if record["step"] == number:
            raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(TrainingLog, "__call__", killed)
        main(command(folder, out, *SHORT))


def test_one_step_left(folder, tmp_path, scored, monkeypatch, capsys):
    """Neither the check, nor the calibration, nor the scores of the untrained models; all figures as they were."""
    out = tmp_path / "out"
    stop_in_step(4, monkeypatch, folder, out)
    before = json.loads((out / "linearize.json").read_text())
    scored.clear()

    def again(*args, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(driver, "check_transfer", again)
    monkeypatch.setattr(driver, "calibrate", again)
    assert main(command(folder, out, *SHORT, "--resume")) == 0
    assert scored == ["ReGLALlamaForCausalLM"]  # trained
    after = json.loads((out / "linearize.json").read_text())
    for name in ("calibration", "transfer_error", "linear_layers", "parameters"):
        assert after[name] == before[name]
    assert {state: after["scores"][state] for state in before["scores"]} == before["scores"]
    assert "trained" in after["scores"] and "perplexity" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "## Calibration" in card and "original | after conversion | after training" in card


def test_other_texts_are_scored_anew(folder, tmp_path, scored, monkeypatch):
    out = tmp_path / "out"
    stop_in_step(4, monkeypatch, folder, out)
    scored.clear()
    assert main(command(folder, out, *SHORT, "--resume", "--valid-tokens", "500")) == 0
    assert scored == ["LlamaForCausalLM", "ReGLALlamaForCausalLM", "ReGLALlamaForCausalLM"]
    scores = json.loads((out / "linearize.json").read_text())["scores"]
    assert {rows[0]["tokens"] for rows in scores.values()} == {500}


def test_stopped_before_the_training(folder, tmp_path, scored, monkeypatch, capsys):
    """In the middle of the scores, when the folder has no model yet: a plain run says what to do, --resume does it."""
    out = tmp_path / "out"
    score = Texts.scores

    def killed(texts, model, config):
        if type(model).__name__ == "ReGLALlamaForCausalLM":
            raise SystemExit(9)
        return score(texts, model, config)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Texts, "scores", killed)
        main(command(folder, out, *SHORT))
    assert main(command(folder, out, *SHORT)) == 2
    assert "or --resume to go on with its conversion" in capsys.readouterr().err
    scored.clear()
    assert main(command(folder, out, *SHORT, "--resume")) == 0
    assert scored == ["ReGLALlamaForCausalLM"] * 2


@pytest.mark.parametrize("content", ["[" * 100_000, '{"scores": null}', "7", '{"arguments": {}}'])
def test_a_damaged_summary(content, folder, tmp_path, monkeypatch):
    """The checkpoints are whole, so the conversion ends all the same."""
    out = tmp_path / "out"
    stop_in_step(4, monkeypatch, folder, out)
    (out / "linearize.json").write_text(content)
    assert main(command(folder, out, *SHORT, "--resume")) == 0


def test_two_at_once(folder, tmp_path, monkeypatch, capsys):
    """The second of two that resume in one folder is refused, and the first goes on."""
    out = tmp_path / "out"
    stop_in_step(3, monkeypatch, folder, out)
    answers = []
    run = driver.run_stages

    def meanwhile(*args, **options):
        monkeypatch.setattr(driver, "run_stages", run)
        answers.append(main(command(folder, out, *SHORT, "--resume")))
        return run(*args, **options)

    monkeypatch.setattr(driver, "run_stages", meanwhile)
    assert main(command(folder, out, *SHORT, "--resume")) == 0
    assert answers == [2] and f"Another conversion is at work in {out}" in capsys.readouterr().err


def test_bits_per_byte(folder, converted):
    """Of the beginning of a longer text, too: its bytes are those of the tokens that were scored."""
    from transformers import AutoTokenizer

    from regla.data.sources import HELD_OUT, read_source

    row = json.loads((converted / "linearize.json").read_text())["scores"]["trained"][0]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    document = read_source(folder / "text.txt").hold_out(HELD_OUT)[1].documents[0]
    offsets = tokenizer(document, return_offsets_mapping=True)["offset_mapping"]
    assert row["tokens"] == 1000 and row["bytes"] == offsets[999][1]
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * 1000 / 0.6931471805599453 / row["bytes"])
