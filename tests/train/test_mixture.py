"""Batches from several sources: their shares, where they come from, and that runs on them repeat and go on exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from regla.cli import main
from regla.data.embedded import embedded_text
from regla.data.token_files import TokenFile, TokenWriter
from regla.data.tokenize import tokenize_files
from regla.data.tokens import Ids
from regla.runtime.options import with_effect
from regla.train import material, mixture, run
from regla.train.config import LoopConfig, TrainConfig
from regla.train.loop import crops, random_crops
from regla.train.mixture import Mixture, Stream

from ..ranks import in_processes

CONFIG = LoopConfig(seq_len=9, batch_size=8, accumulate=2, seed=3)


def streams(*lengths: int) -> list[Stream]:
    """Of which every token says where it is."""
    ends = np.cumsum(lengths)
    return [
        Stream(f"{number}", Ids.of(np.arange(end - length, end, dtype=np.int32)))
        for number, (length, end) in enumerate(zip(lengths, ends, strict=True))
    ]


def test_without_weights_sequences_are_crops_of_one_row() -> None:
    drawn = Mixture(streams(20, 30, 50), None, CONFIG)
    for batch in range(5):
        expected = crops(torch.arange(100), seed=3, batch=batch, batch_size=8, length=10)
        assert torch.equal(drawn(batch), expected)
    assert torch.equal(torch.from_numpy(drawn.in_memory), torch.arange(100, dtype=torch.int32))


def test_tokens_kept_on_a_gpu_give_the_same_crops() -> None:
    """Of sources that files may hold; `Text.batches` keeps those of one row there."""
    drawn = Mixture(streams(20, 30, 50), None, CONFIG)
    kept = random_crops(torch.from_numpy(drawn.ids.read()), CONFIG)
    assert drawn.is_one_row and all(torch.equal(kept(batch), drawn(batch)) for batch in range(5))
    assert not Mixture(streams(20, 30, 50), (1, 1, 1), CONFIG).is_one_row
    assert not Mixture(streams(20, 30, 50), None, CONFIG, once=True).is_one_row


def test_weights_are_shares_of_the_tokens() -> None:
    drawn = Mixture(streams(20, 1000, 50), (6, 3, 1), CONFIG)
    batches = torch.stack([drawn(batch) for batch in range(400)])
    source = torch.bucketize(batches, torch.tensor([20, 1020]), right=True)
    assert (source == source[..., :1]).all()  # no sequence runs from one into the other
    shares = source.double().flatten().long().bincount().double() / source.numel()
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1], atol=1e-3)  # of 3,200 sequences
    seen = batches.unique()
    assert torch.equal(seen[seen < 20], torch.arange(20)) and seen.max() == 1069  # both ends
    told = drawn.drawn(200)
    assert [one.weight for one in told] == [0.6, 0.3, 0.1] and [one.tokens for one in told] == [20, 1000, 50]
    counts = source[..., 1:].flatten().bincount().tolist()
    assert [one.drawn for one in told] == counts and sum(counts) == 200 * CONFIG.tokens_per_step
    assert [one.share for one in told] == [count / sum(counts) for count in counts]
    assert [one.epochs for one in told] == [count / one.tokens for one, count in zip(told, counts, strict=True)]


def test_tokens_across_files_are_counted_where_they_are() -> None:
    told = Mixture(streams(20, 30, 50), None, CONFIG).drawn(300)
    batches = [crops(torch.arange(100), seed=3, batch=batch, batch_size=8, length=10)[:, 1:] for batch in range(600)]
    source = torch.bucketize(torch.stack(batches), torch.tensor([20, 50]), right=True)
    assert [one.drawn for one in told] == source.flatten().bincount().tolist()


def test_batches_depend_on_seed_and_number_alone() -> None:
    first, second = (Mixture(streams(20, 100), (1, 1), CONFIG) for _ in range(2))
    for batch in (7, 0, 7, 3):
        assert torch.equal(first(batch), second(batch))
    assert not torch.equal(first(0), first(1))
    other = LoopConfig(seq_len=9, batch_size=8, seed=4)
    assert not torch.equal(first(0), Mixture(streams(20, 100), (1, 1), other)(0))


def test_a_source_shorter_than_a_sequence() -> None:
    with pytest.raises(ValueError, match=r"The training text 1 has 9 tokens, expected more than seq_len 9; give more"):
        Mixture(streams(20, 9), (1, 1), CONFIG)
    Mixture(streams(20, 9), None, CONFIG)


def test_files_are_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TokenWriter(tmp_path / "a.bin") as writer:
        writer.write(np.arange(1000))
    asked = []
    read = TokenFile.__getitem__
    monkeypatch.setattr(TokenFile, "__getitem__", lambda file, part: asked.append(part) or read(file, part))
    drawn = Mixture([Stream("a", Ids.of(TokenFile(tmp_path / "a.bin")))], None, CONFIG)
    assert drawn.in_memory is None
    expected = crops(torch.arange(1000), seed=3, batch=5, batch_size=8, length=10)
    assert torch.equal(drawn(5), expected)
    assert len(asked) == 8 and all(part.stop - part.start == 10 for part in asked)


SHAPE = {"hidden_size": 16, "layers": 2, "heads": 2, "seq_len": 17, "batch_size": 4, "lr": 1e-2, "device": "cpu"}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two sources, and a text to validate on."""
    folder = tmp_path_factory.mktemp("text")
    documents = embedded_text().documents
    for name, part in {"web": documents[:3], "books": documents[3:6], "valid": documents[6:7]}.items():
        (folder / f"{name}.txt").write_text("\n<|endoftext|>\n".join(part), encoding="utf-8")
    files = [folder / f"{name}.txt" for name in ("web", "books", "valid")]
    tokenize_files(files, folder / "tokens", vocab_size=280, shard_tokens=2000)
    return folder / "tokens"


def config(out: Path, tokens: Path, **arguments) -> TrainConfig:
    data = {"data": (str(tokens / "web"), str(tokens / "books")), "valid": (str(tokens / "valid"),)}
    return TrainConfig(
        out=str(out), tokenizer=str(tokens), **{"data_weights": (0.8, 0.2), "steps": 9} | data | SHAPE | arguments
    )


@pytest.fixture(scope="module")
def undisturbed(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run.train(config(out, tokens, save_every=3))
    return out


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_says_what_it_drew(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "training.json").read_text())
    web, books = summary["data"]
    assert web["name"].endswith("web") and web["weight"] == 0.8 and books["weight"] == pytest.approx(0.2)
    assert web["drawn"] + books["drawn"] == summary["tokens"] and web["drawn"] > books["drawn"]
    assert web["tokens"] + books["tokens"] == summary["text_tokens"] and summary["bad_records"] == []


def test_a_run_tells_shares_before_and_after(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run.train(config(tmp_path / "run", tokens))
    printed = capsys.readouterr().out
    web, books = json.loads((tmp_path / "run" / "training.json").read_text())["data"]
    plan = [
        f"{one['name']} {one['weight']:.1%}, {one['weight'] * 612 / one['tokens']:.2f} epochs" for one in (web, books)
    ]
    assert f"{web['tokens'] + books['tokens']:,} tokens of text ({', '.join(plan)})" in printed
    after = [f"{one['name']} {one['share']:.1%}, {one['drawn'] / one['tokens']:.2f} epochs" for one in (web, books)]
    assert f"\nTrained on {'; '.join(after)}.\n" in printed


def test_much_text_in_memory_is_told(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(material, "_LARGE", 10)
    file = str(tokens.parent / "web.txt")
    run.train(config(tmp_path / "run", tokens, data=(file,), data_weights=None, steps=1))
    assert f"{file} has 0.0 GB of text, which all goes into memory; --token-cache DIR" in capsys.readouterr().out


def test_a_mixture_goes_on_exactly(
    tokens: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    draw = Mixture.__call__

    def fail(self: Mixture, batch: int) -> torch.Tensor:
        if batch == 5:
            raise FloatingPointError("The end.")
        return draw(self, batch)

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError):
        patch.setattr(mixture.Mixture, "__call__", fail)
        run.train(config(out, tokens, save_every=3))
    run.train(config(out, tokens, save_every=3, resume="latest"))
    assert losses(out) == losses(undisturbed)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, undisturbed))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    summaries = [json.loads((folder / "training.json").read_text()) for folder in (out, undisturbed)]
    assert summaries[0]["data"] == summaries[1]["data"]
    with pytest.raises(ValueError, match=r"is of a run with --data-weights \[0.8, 0.2\], but this one has"):
        run.train(config(out, tokens, save_every=3, resume="latest", data_weights=(0.5, 0.5), steps=12))


def command(out: Path, tokens: Path, *more: str) -> list[str]:
    options = {"out": out, "tokenizer": tokens, "valid": tokens / "valid", "save-every": 3}
    options |= {name.replace("_", "-"): value for name, value in SHAPE.items()}
    words = [str(word) for name, value in options.items() for word in ("--" + name, value)]
    return ["train", *words, "--data", str(tokens / "web"), str(tokens / "books"), "--data-weights", "0.8,0.2", *more]


def test_two_processes_go_on_with_the_same_sequences(tokens: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(command(out, tokens, "--steps", "3")) == 0
    ended = in_processes(2, lambda: main(command(out, tokens, "--steps", "9", "--resume")), tmp_path / "written")
    assert [one.code for one in ended] == [0, 0], ended
    # The learning rates before step 4 were of a shorter run, so the losses differ; what was drawn does not.
    told = [json.loads((folder / "training.json").read_text())["data"] for folder in (out, undisturbed)]
    assert told[0] == told[1] and len(losses(out)) == 9


def test_text_through_the_cache_is_its_tokens(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = {"data": tuple(str(tokens.parent / f"{name}.txt") for name in ("web", "books"))}
    for name in ("first", "second"):
        run.train(config(tmp_path / name, tokens, token_cache=str(tmp_path / "cache"), **text))
        assert ("Tokenizing" in capsys.readouterr().out) == (name == "first")
    run.train(config(tmp_path / "files", tokens))
    assert losses(tmp_path / "first") == losses(tmp_path / "second") == losses(tmp_path / "files")


def test_damaged_tokens_are_found_before_the_first_step(tokens: Path, tmp_path: Path) -> None:
    copy = tmp_path / "web"
    copy.mkdir()
    for file in (tokens / "web").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    content = (copy / "00000.bin").read_bytes()
    (copy / "00000.bin").write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    arguments = {"data": (str(copy), str(tokens / "books")), "steps": 1}
    with pytest.raises(ValueError, match=r"00000.bin is damaged: its content does not have the SHA-256"):
        run.train(config(tmp_path / "run", tokens, **arguments))
    assert not (tmp_path / "run").exists()
    run.train(config(tmp_path / "believed", tokens, verify_data=False, **arguments))


def test_bad_records_are_told_and_trained_around(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "a.jsonl"
    documents = embedded_text().documents[:2]
    file.write_text("\n".join([json.dumps({"text": documents[0]}), "{", json.dumps({"text": documents[1]})]))
    data = {"data": (str(file),), "data_weights": None, "steps": 1}
    run.train(config(tmp_path / "run", tokens, **data))
    told = json.loads((tmp_path / "run" / "training.json").read_text())["bad_records"]
    assert len(told) == 1 and told[0].startswith(f"Line 2 of {file} is not JSON")
    assert f"1 bad record left out:\n  {told[0]}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"Line 2 of .* is not JSON"):
        run.train(config(tmp_path / "strict", tokens, max_bad_records=0, **data))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"data_weights": (1.0,)},
            "data_weights has 1 numbers, but data and dataset name 2 sources; give one for each",
        ),
        ({"data_weights": (1.0, 0.0)}, "data_weights is 0.0, expected a number above 0"),
        ({"sampling": "sorted"}, "sampling is 'sorted', expected one of random, epochs"),
        ({"carry_state": True}, "Both carry_state and data_weights are given"),
        (
            {"carry_state": True, "data_weights": None, "sampling": "epochs"},
            "carry_state reads all text in its order; leave it or sampling out",
        ),
        ({"max_bad_records": -1}, "max_bad_records is -1, expected 0 or more"),
        ({"tokenizer": None, "token_cache": "c"}, "token_cache is given without tokenizer"),
        ({"reset_at_documents": True, "parallel": "sequence"}, "Both reset_at_documents and parallel sequence are"),
    ],
)
def test_bad_options(arguments: dict, message: str) -> None:
    given = {"out": "o", "data": ("a.bin", "b.bin"), "data_weights": (1.0, 2.0), "tokenizer": "t"} | arguments
    with pytest.raises(ValueError, match=message):
        TrainConfig(**given)
    with pytest.raises(ValueError, match="Both task and reset_at_documents are given"):
        TrainConfig(out="o", task="mqar", reset_at_documents=True)


def test_options_that_came_later_count_only_where_they_say_something() -> None:
    later = {"data_weights": (1.0,), "sampling": "epochs", "reset_at_documents": True}
    before = with_effect(TrainConfig(out="o", data=("a.bin",)))
    assert not later.keys() & before.keys()
    assert with_effect(TrainConfig(out="o", data=("a.bin",), **later)) == before | later


def test_a_folder_that_holds_the_validation_file(tokens: Path, tmp_path: Path) -> None:
    valid = (str(tokens / "web" / "00001.bin"),)
    with pytest.raises(ValueError, match=r"web of data holds 00001.bin, which valid names; move it out, or name the"):
        run.train(config(tmp_path / "run", tokens, valid=valid))
