"""Perplexity: equal to the sum over tokens done by hand, for any model and any cut into windows."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regla.cli import main
from regla.data.embedded import embedded_text
from regla.data.sources import HELD_OUT, Encoded, encode_source, read_source
from regla.data.text import Text
from regla.data.tokenizer import first_id, train_tokenizer
from regla.eval import perplexity
from regla.eval.measure import evaluate
from regla.eval.perplexity import (
    mean_score,
    position_scores,
    position_table,
    score,
    stream_nats,
    table,
    token_nats,
)
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.folders import load_model

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,  # far from uniform predictions
}


def make_model(kind: str):
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    layer_types = ["linear_attention", "full_attention" if kind == "hybrid" else "linear_attention"]
    return ReGLAForCausalLM(ReGLAConfig(**SHAPE, layer_types=layer_types))


def total_nats(*arguments, **options) -> float:
    return float(token_nats(*arguments, **options).double().sum())


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(embedded_text().documents[:3], 300)


@pytest.fixture
def folder(tmp_path: Path, tokenizer) -> Path:
    make_model("hybrid").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def nats_by_hand(model, ids: np.ndarray, first: int, seq_len: int) -> float:
    """One token at a time, in float64."""
    model = model.double()
    stream = [first, *ids.tolist()]
    nats = 0.0
    for position, target in enumerate(ids.tolist()):
        window_start = position // seq_len * seq_len
        logits = model(input_ids=torch.tensor([stream[window_start : position + 1]]), use_cache=False).logits[0, -1]
        nats -= float(torch.log_softmax(logits.double(), -1)[target])
    return nats


@pytest.mark.parametrize("kind", ["regla", "hybrid", "llama"])
@pytest.mark.parametrize("tokens", [40, 48, 5])  # windows of 16: two and a half, three, less than one
def test_equals_a_sum_by_hand(kind: str, tokens: int) -> None:
    model = make_model(kind)
    ids = np.random.randint(0, 300, tokens).astype(np.int32)
    nats = total_nats(model, ids, first=7, seq_len=16, batch_size=2, dtype="float32")
    assert nats == pytest.approx(nats_by_hand(model, ids, 7, 16), rel=2e-6)


def test_evaluation_leaves_dropout_out() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5)).train()
    ids = np.random.randint(0, 300, 40).astype(np.int32)
    options = {"first": 7, "seq_len": 16, "batch_size": 2, "dtype": "float32"}
    assert total_nats(model, ids, **options) == total_nats(model, ids, **options)


def test_bfloat16_is_near_and_not_the_same() -> None:
    model = make_model("regla")
    ids = np.random.randint(0, 300, 40).astype(np.int32)
    exact, rounded = (
        total_nats(model, ids, first=7, seq_len=16, batch_size=2, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.02)


def test_units(tokenizer) -> None:
    text = Text("a", ("The statement.", "Größe"))
    encoded = encode_source(text, tokenizer)
    model = make_model("llama")
    result = score(model, encoded, first=0, seq_len=16, batch_size=2, dtype="float32")
    nats = total_nats(model, encoded.ids, first=0, seq_len=16, batch_size=2, dtype="float32")
    expected_tokens = sum(len(tokenizer(document)["input_ids"]) + 1 for document in text.documents)  # with end of text
    assert (result.tokens, result.bytes) == (expected_tokens, 14 + 7)
    assert result.loss == pytest.approx(nats / expected_tokens)
    assert result.perplexity == pytest.approx(math.exp(nats / expected_tokens))
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 21)


def test_the_mean_weighs_sources_alike() -> None:
    model = make_model("llama")
    texts = [Encoded("a", np.full(4, 1, np.int32), 10), Encoded("b", np.arange(30, dtype=np.int32), 50)]
    a, b = (score(model, text, first=0, seq_len=16, batch_size=2, dtype="float32") for text in texts)
    mean = mean_score([a, b])
    assert (mean.tokens, mean.bytes) == (34, 60)
    assert mean.loss == pytest.approx((a.loss + b.loss) / 2)
    assert mean.perplexity == pytest.approx(math.sqrt(a.perplexity * b.perplexity))
    assert mean.bits_per_byte == pytest.approx((a.bits_per_byte + b.bits_per_byte) / 2)
    unknown = score(model, Encoded("c", texts[0].ids, None), first=0, seq_len=16, batch_size=2, dtype="float32")
    assert unknown.bits_per_byte is None and mean_score([a, unknown]).bits_per_byte is None
    lines = table([a, unknown]).splitlines()
    assert [line.split()[0] for line in lines] == ["source", "a", "c", "mean"]
    assert lines[1].split() == ["a", "4", f"{a.loss:.4f}", f"{a.perplexity:.2f}", f"{a.bits_per_byte:.4f}"]
    assert lines[2].split()[-1] == "-"


def test_files_are_scored_one_by_one(folder: Path, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("The first text.\n<|endoftext|>\nAnd more.")
    (tmp_path / "b.txt").write_text("Quite another one, and longer than the first.")
    encode_source(Text("a", ("The first text.", "And more.")), tokenizer).ids.astype("<u2").tofile(tmp_path / "a.bin")
    files = [tmp_path / name for name in ("a.txt", "b.txt", "a.bin")]
    scores = evaluate(folder, data=files, device="cpu", json_file=tmp_path / "scores.json")
    assert [score.name for score in scores] == [str(file) for file in files]
    assert scores[0].loss == scores[2].loss and scores[0].bits_per_byte == scores[2].bits_per_byte

    model = ReGLAForCausalLM.from_pretrained(folder)
    ids = encode_source(Text("b", ("Quite another one, and longer than the first.",)), tokenizer).ids
    by_hand = nats_by_hand(model, ids, first_id(tokenizer), 16)  # 16: the model's own length
    assert scores[1].loss * scores[1].tokens == pytest.approx(by_hand, rel=2e-6)

    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["seq_len"] == 16 and len(result["sources"]) == 3
    assert result["sources"][1]["loss"] == scores[1].loss
    assert result["mean"]["loss"] == pytest.approx(sum(score.loss for score in scores) / 3)
    assert capsys.readouterr().out.strip() == table(scores)


def test_by_default_the_held_out_part_of_the_embedded_text_is_scored(folder: Path) -> None:
    (result,) = evaluate(folder, device="cpu", seq_len=512)
    assert result.bytes == embedded_text().hold_out(HELD_OUT)[1].bytes


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seq_len is 0"):
        evaluate(folder, seq_len=0)
    with pytest.raises(ValueError, match="is no model folder"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match=r"There is no model folder .*none"):
        evaluate(tmp_path / "none")
    with pytest.raises(ValueError, match="There is no folder for"):
        evaluate(folder, json_file=tmp_path / "none" / "scores.json")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"holds no readable model \(.*\); give another"):
        evaluate(folder)


@pytest.mark.parametrize("kind", ["regla", "hybrid", "llama"])
def test_positions_are_counted_in_each_window(kind: str) -> None:
    model = make_model(kind)
    ids = np.random.randint(0, 300, 700).astype(np.int32)
    text = Encoded("a", ids, None)
    result = score(model, text, first=7, seq_len=300, batch_size=2, dtype="float32", by_position=True)
    assert [(bin_.first, bin_.last) for bin_ in result.positions] == [(0, 63), (64, 127), (128, 255), (256, 299)]
    # Windows of 300, 300 and 100.
    assert [bin_.tokens for bin_ in result.positions] == [64 * 3, 64 * 2 + 36, 128 * 2, 44 * 2]
    nats = token_nats(model, ids, first=7, seq_len=300, batch_size=2, dtype="float32")
    by_hand = [*nats[128:256].tolist(), *nats[428:556].tolist()]
    assert result.positions[2].loss == pytest.approx(sum(by_hand) / 256, rel=1e-6)
    assert result.positions[2].perplexity == pytest.approx(math.exp(result.positions[2].loss))
    total = sum(bin_.loss * bin_.tokens for bin_ in result.positions)
    assert total == pytest.approx(result.loss * result.tokens)


def test_positions_of_several_sources() -> None:
    """They have a mean, in which every source weighs the same, where they have the same bins."""
    model = make_model("regla")
    texts = [Encoded(name, np.random.randint(0, 300, n).astype(np.int32), None) for name, n in (("a", 200), ("b", 100))]
    options = {"first": 7, "batch_size": 2, "dtype": "float32", "by_position": True}
    a, b = (score(model, text, seq_len=100, **options) for text in texts)
    mean = mean_score([a, b]).positions
    assert [(bin_.first, bin_.last, bin_.tokens) for bin_ in mean] == [(0, 63, 3 * 64), (64, 99, 3 * 36)]
    assert mean[1].loss == pytest.approx((a.positions[1].loss + b.positions[1].loss) / 2)
    assert position_table([a, b]).splitlines()[2].split() == [
        "64-99", *(f"{math.exp(bin_.loss):.2f}" for bin_ in (a.positions[1], b.positions[1], mean[1]))
    ]  # fmt: skip
    longer = score(model, texts[0], seq_len=200, **options)
    assert mean_score([longer, b]).positions == ()
    assert position_table([longer, b]).splitlines()[-1].split()[-1] == "-"


def test_long_windows_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few at a time, and their logits in slices: the same figures."""
    model = make_model("regla")
    ids = np.random.randint(0, 300, 230).astype(np.int32)
    options = {"first": 7, "seq_len": 40, "batch_size": 4, "dtype": "float32"}
    whole = token_nats(model, ids, **options)
    batches, slices = [], []
    forward, cross_entropy = model.forward, torch.nn.functional.cross_entropy

    def count_windows(input_ids, **rest):
        batches.append(len(input_ids))
        return forward(input_ids=input_ids, **rest)

    def count_logits(logits, *rest, **options):
        slices.append(logits.numel())
        return cross_entropy(logits, *rest, **options)

    monkeypatch.setattr(model, "forward", count_windows)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", count_logits)
    monkeypatch.setattr(perplexity, "_LOGITS", 2 * 40 * 300 + 299)
    monkeypatch.setattr(perplexity, "_LOGITS_OF_A_SLICE", 7 * 300)
    torch.testing.assert_close(token_nats(model, ids, **options), whole, rtol=1e-5, atol=1e-5)
    assert batches == [2, 2, 1, 1] and max(slices) == 7 * 300
    monkeypatch.setattr(perplexity, "_LOGITS", 1)
    monkeypatch.setattr(perplexity, "_LOGITS_OF_A_SLICE", 1)
    torch.testing.assert_close(token_nats(model, ids, **options), whole, rtol=1e-5, atol=1e-5)
    assert batches[4:] == [1] * 6 and slices[-1] == 300


@pytest.mark.parametrize("kind", ["hybrid", "llama"])
def test_windows_beyond_the_length_of_the_model(
    kind: str, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Allowed, the same as done by hand, and said."""
    make_model(kind).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text(embedded_text().documents[0][:180], encoding="utf-8")
    options = {"data": [tmp_path / "a.txt"], "device": "cpu", "by_position": True}
    (result,) = evaluate(tmp_path / "model", seq_len=80, json_file=tmp_path / "s.json", **options)
    note = "80 tokens of context are more than the model's max_position_embeddings, 16."
    assert capsys.readouterr().out.splitlines()[-1] == note
    assert json.loads((tmp_path / "s.json").read_text())["max_position_embeddings"] == 16
    assert [(bin_.first, bin_.last) for bin_ in result.positions] == [(0, 63), (64, 79)]
    ids = encode_source(read_source(tmp_path / "a.txt"), tokenizer).ids
    model = load_model(tmp_path / "model", torch.device("cpu"))
    assert result.loss * result.tokens == pytest.approx(nats_by_hand(model, ids, first_id(tokenizer), 80), rel=2e-6)
    evaluate(tmp_path / "model", seq_len=16, **options)
    assert "max_position_embeddings" not in capsys.readouterr().out


@pytest.mark.parametrize("tokens", [5, 64, 65])
def test_the_last_bin_of_positions_ends_with_the_text(tokens: int) -> None:
    bins = position_scores(torch.ones(tokens), 1024)
    assert bins[-1].last == tokens - 1 and sum(bin_.tokens for bin_ in bins) == tokens


@pytest.mark.parametrize("kind", ["regla", "hybrid", "llama"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_streaming_scores_as_one_window_does(kind: str, chunk: int) -> None:
    """Twice the length that the configuration names."""
    model = make_model(kind).double()
    ids = np.random.randint(0, 300, 32).astype(np.int32)
    streamed = stream_nats(model, ids, first=7, chunk=chunk, dtype="float32")
    whole = token_nats(model, ids, first=7, seq_len=32, batch_size=1, dtype="float32")
    assert streamed.shape == whole.shape
    torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)  # logits are rounded to float32
    cut_off = token_nats(model, ids, first=7, seq_len=16, batch_size=1, dtype="float32")
    assert (cut_off[17:] - whole[17:]).abs().max() > 1e-3  # so the context beyond 16 tokens did count


def test_the_stream_of_a_file(folder: Path, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = embedded_text().documents[0]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    options = {"data": [tmp_path / "a.txt"], "device": "cpu", "by_position": True}
    (part,) = evaluate(folder, stream=200, json_file=tmp_path / "s.json", **options)
    encoded = encode_source(Text("a", (text,)), tokenizer)
    start = tokenizer.decode(encoded.ids[:200])
    assert text.startswith(start)
    assert (part.tokens, part.bytes, part.words) == (200, len(start.encode()), len(start.split()))
    assert part.bits_per_byte == pytest.approx(part.loss * 200 / math.log(2) / part.bytes)
    assert [(bin_.first, bin_.last) for bin_ in part.positions] == [(0, 63), (64, 127), (128, 199)]
    printed = capsys.readouterr().out
    assert position_table([part]) in printed and "128-199" in printed
    result = json.loads((tmp_path / "s.json").read_text())
    assert result["stream"] == 200 and result["sources"][0]["positions"][2]["last"] == 199

    (whole,) = evaluate(folder, stream=10**6, **options)
    assert whole.bytes == len(text.encode()) and whole.words == len(text.split())
    (window,) = evaluate(folder, seq_len=whole.tokens, **options)
    assert whole.loss == pytest.approx(window.loss, rel=1e-5)


def test_perplexity_of_words(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("Five words,  in two\ndocuments\n<|endoftext|>\nhere.", encoding="utf-8")
    (result,) = evaluate(folder, data=[tmp_path / "a.txt"], device="cpu")
    assert result.words == 6
    assert result.word_perplexity == pytest.approx(math.exp(result.loss * result.tokens / 6))
    head, line = capsys.readouterr().out.splitlines()
    assert head.endswith("per word") and line.endswith(f"{result.word_perplexity:.2f}")
    other = score(make_model("llama"), Encoded("b", np.ones(9, np.int32), 9, 3), first=0, seq_len=16, batch_size=2,
                  dtype="float32")  # fmt: skip
    mean = mean_score([result, other])
    assert mean.words == 9
    assert mean.word_perplexity == pytest.approx(math.sqrt(result.word_perplexity * other.word_perplexity))


def test_bad_stream(folder: Path) -> None:
    with pytest.raises(ValueError, match="stream is 0, expected a number above 0"):
        evaluate(folder, stream=0)


@pytest.mark.parametrize(("kind", "said"), [("regla", False), ("hybrid", True), ("llama", True)])
@pytest.mark.parametrize("options", [{"stream": 99_999_999}, {"seq_len": 99_999}])
def test_the_context_is_what_the_text_has(
    kind: str, said: bool, options: dict, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Not what was asked for; a model without positions knows no limit."""
    make_model(kind).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("A text of more than sixteen tokens.", encoding="utf-8")
    (result,) = evaluate(tmp_path / "model", data=[tmp_path / "a.txt"], device="cpu", **options)
    note = f"{result.tokens} tokens of context are more than the model's max_position_embeddings, 16."
    printed = capsys.readouterr().out
    assert (note in printed) == said and ("max_position_embeddings" in printed) == said


def test_a_tokenizer_beyond_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(embedded_text().documents[:3], 400).save_pretrained(folder)
    (tmp_path / "a.txt").write_text(embedded_text().documents[0][:500], encoding="utf-8")
    with pytest.raises(ValueError, match=r"The tokens of .*a.txt hold id 3\d\d, but the model's vocab_size is 300; "):
        evaluate(folder, data=[tmp_path / "a.txt"], device="cpu")


def test_figures_are_not_lost_for_want_of_a_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; give the name of a file in it"):
        evaluate(folder, device="cpu", json_file=tmp_path)


def test_several_models_have_a_table_each_and_one_file(folder: Path, tmp_path: Path, capsys) -> None:
    arguments = ["eval", str(folder), f"{folder}/", "--device", "cpu", "--json", str(tmp_path / "scores.json")]
    assert main(arguments) == 0
    figures = json.loads((tmp_path / "scores.json").read_text())
    assert [each["model"] for each in figures] == [str(folder), f"{folder}/"]
    assert figures[0]["mean"] == figures[1]["mean"]
    assert capsys.readouterr().out.count(f"{folder}") == 2
