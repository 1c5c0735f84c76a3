"""The command line: what it says, how it ends, and that its help costs nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regla.cli import main

TINY = [
    "--vocab-size",
    "300",
    "--hidden-size",
    "32",
    "--layers",
    "2",
    "--heads",
    "2",
    "--seq-len",
    "32",
    "--batch-size",
    "4",
    "--steps",
    "5",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("".join(f"Line {number} of the text says {number % 7}.\n" for number in range(300)))
    return file


def test_train_eval_generate(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "runs" / "model")
    assert main(["train", "--out", out, "--data", str(corpus), *TINY]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("regla: ") and "% against softmax)" in printed
    assert f"Saved to {out}." in printed and "perplexity" in printed

    assert main(["eval", out, "--data", str(corpus), "--device", "cpu", "--json", str(tmp_path / "s.json")]) == 0
    assert str(corpus) in capsys.readouterr().out and (tmp_path / "s.json").is_file()

    assert main(["generate", out, "--prompt", "Line", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("Line")


def test_tokenize_and_train_on_the_tokens(corpus: Path, tmp_path: Path) -> None:
    tokens, (_, _, *tiny) = str(tmp_path / "tokens"), TINY
    assert main(["tokenize", "--vocab-size", "300", "--out", tokens, str(corpus)]) == 0
    data = ["--tokenizer", tokens, "--data", f"{tokens}/corpus.bin"]
    assert main(["train", "--out", str(tmp_path / "run"), *data, *tiny, "--mixer", "softmax"]) == 0


def test_every_option_reaches_the_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regla.train import run
    from regla.train.config import TrainConfig

    seen = []
    monkeypatch.setattr(run, "train", seen.append)
    (tmp_path / "c.json").write_text('{"qk_norm": true}')
    line = (
        "train --out o --data a.txt b.txt --valid c.txt --vocab-size 500 --mixer hybrid --hidden-size 96 --layers 3 "
        "--heads 6 --kv-heads 2 --head-dim 8 --intermediate-size 200 --tokens 1000 --seq-len 64 --batch-size 2 "
        "--accumulate 3 --lr 0.5 --warmup 7 --weight-decay 0.2 --seed 9 --device cpu --dtype bfloat16 --compile "
        "--activation-checkpointing --save-every 4 --eval-every 5 --eval-context 6 --resume --tensorboard "
        "--dataset d:e --text-field body"
    )
    assert main([*line.split(), "--config", str(tmp_path / "c.json")]) == 0
    assert main(["train", "--out", "o", "--steps", "11", "--tokenizer", "t", "--resume", "previous"]) == 0
    assert seen[0] == TrainConfig(
        out="o",
        data=("a.txt", "b.txt"),
        valid=("c.txt",),
        vocab_size=500,
        mixer="hybrid",
        hidden_size=96,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=8,
        intermediate_size=200,
        overrides={"qk_norm": True},
        tokens=1000,
        seq_len=64,
        batch_size=2,
        accumulate=3,
        lr=0.5,
        warmup=7,
        weight_decay=0.2,
        seed=9,
        device="cpu",
        dtype="bfloat16",
        compile=True,
        activation_checkpointing=True,
        save_every=4,
        eval_every=5,
        eval_context=6,
        resume="latest",
        tensorboard=True,
        dataset="d:e",
        text_field="body",
    )
    assert seen[1] == TrainConfig(out="o", steps=11, tokenizer="t", resume="previous")


BAD = {
    "no command": ("", "the following arguments are required: COMMAND"),
    "unknown option": ("train --out o --stepps 3", "unrecognized arguments: --stepps 3"),
    "no number": ("train --out o --steps many", "argument --steps: invalid int value: 'many'"),
    "unknown mixer": ("train --out o --mixer mamba", "invalid choice: 'mamba'"),
    "negative": ("train --out o --steps -3", "--steps is -3, expected a number above 0."),
    "missing data": ("train --out o --data none.txt", "There is no file none.txt"),
    "empty data": ("train --out o --data empty.txt", "empty.txt holds no text"),
    "short text": ("train --out o --data short.txt", "expected more than --seq-len 256"),
    "unknown kind": ("train --out o --data c.json", "c.json is of an unknown kind '.json'"),
    "unknown key": (
        "train --out o --data corpus.txt --vocab-size 300 --config c.json",
        "the nearest known one is 'qk_norm'",
    ),
    "no field": ("train --out o --data r.jsonl", "Line 1 of r.jsonl has no field 'text' (it has body)"),
    "broken record": (
        "train --out o --data r.jsonl --text-field body --max-bad-records 0",
        "Line 2 of r.jsonl is not JSON",
    ),
    "resume what": ("train --out o --resume newest", "invalid choice: 'newest'"),
    "resume nothing": ("train --out full --data corpus.txt --resume", "full holds no checkpoint to resume from"),
    "save never": ("train --out o --save-every 0", "--save-every is 0, expected a number above 0."),
    "no context": ("train --out o --eval-context 0", "--eval-context is 0, expected a number above 0."),
    "long context": ("train --out o --data corpus.txt --vocab-size 300 --eval-context 10000000", "fewer than --eval-c"),
    "full folder": ("train --out full --data corpus.txt", "full is not empty; give --out a new folder"),
    "file for folder": ("train --out short.txt --data corpus.txt", "short.txt is a file"),
    "tokenizer": (
        "train --out o --data corpus.txt --tokenizer none",
        "There is no tokenizer folder none, and the hub has no such tokenizer",
    ),
    "large vocabulary": ("tokenize --vocab-size 70000 --out o short.txt", "does not fit token files of uint16"),
    "no model": ("eval full", "full is no model folder"),
    "broken model": ("generate broken --prompt a", "broken holds no readable model"),
    "no prompt": ("generate broken", "no text to continue; give --prompt, --prompts or --load-state"),
    "two kinds of prompt": ("generate broken --prompt a --prompts p.txt", "not allowed with argument --prompt"),
    "missing prompts": ("generate broken --prompts none.txt", "none.txt cannot be read"),
    "no prompt in the file": ("generate broken --prompts empty.txt", "empty.txt holds no prompt"),
    "JSON of one prompt": ("generate broken --prompt a --json", "--json goes with --prompts FILE"),
    "state of a batch": ("generate broken --prompts p.txt --save-state s", "--save-state go with --prompt TEXT"),
    "state over a file": ("generate broken --prompt a --save-state short.txt", "short.txt exists already"),
    "state in no folder": ("generate broken --prompt a --save-state none/s", "There is no folder for none/s"),
    "empty stream": ("eval full --stream 0", "--stream is 0, expected a number above 0."),
    "quickstart elsewhere": ("quickstart --out full", "full holds something else than a quickstart"),
    "window": ("eval full --seq-len 0", "--seq-len is 0, expected a number above 0."),
    "bytes that are no text": ("generate broken --prompt a\udcff", "is no valid Unicode text (a lone surrogate"),
    "large seed": (f"generate broken --prompt a --seed {2**70}", "--seed is 1180591620717411303424, expected at most"),
    "negative seed": ("generate broken --prompt a --seed -1", "--seed is -1, expected 0 or more"),
    "no temperature": ("generate broken --prompt a --temperature nan", "--temperature is nan, expected 0 or more"),
    "half a character": (
        "train --out o --data h.jsonl --max-bad-records 0",
        "Field 'text' in line 2 of h.jsonl is no valid Unicode text",
    ),
    "half a character to tokenize": (
        "tokenize --out o --vocab-size 300 h.jsonl --max-bad-records 0",
        "in line 2 of h.jsonl is no valid",
    ),
    "half a character to score": ("eval full --data h.jsonl", "in line 2 of h.jsonl is no valid Unicode text"),
    "half a character in a study": ("study h.yaml --dry-run", "Line 1 is no valid Unicode text"),
    "no such field in a study": ("study demo --out so --data r.jsonl --text-field none", "has no field 'none'"),
    "deep records": ("train --out o --data deep.jsonl", "Line 1 of deep.jsonl is nested too deeply"),
    "deep configuration": ("train --out o --data corpus.txt --config deep.json", "deep.json is nested too deeply"),
    "deep study": ("study deep.yaml --dry-run", "The study deep is nested too deeply"),
    "date that there is not": ("study date.yaml --dry-run", "The study date is no valid YAML"),
    "character that YAML has not": (
        "study nul.yaml --dry-run",
        "The study nul is no valid YAML (unacceptable character",
    ),
    "unknown activation": (
        "train --out o --data corpus.txt --vocab-size 300 --config act.json",
        "hidden_act is 'nope'; expected an activation",
    ),
    "unknown rotation": (
        "train --out o --data corpus.txt --vocab-size 300 --config rope.json",
        "no model can be built from it (KeyError: 'nope')",
    ),
    "folder for figures": ("eval broken --json full", "full is a folder; give the name of a file in it"),
    "rows that are none": ("study demo --report --rows deep.jsonl", "Line 1 of deep.jsonl is no row of a study"),
    "two kinds of tokenizer": ("tokenize --out o short.txt", "Give either --tokenizer or --vocab-size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    case: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_bytes(corpus.read_bytes())
    Path("empty.txt").touch()
    Path("short.txt").write_text("Too short.")
    Path("c.json").write_text('{"qk_nrom": true}')
    Path("r.jsonl").write_text('{"body": "A text."}\n{"body": "Ano\n')
    Path("h.jsonl").write_text('{"text": "A text."}\n{"text": "half \\ud83d emoji"}\n')
    Path("h.yaml").write_text('title: "half \\ud83d"\nlr: [1e-3]\n')
    Path("date.yaml").write_text("title: 2020-13-45\nlr: [1e-3]\n")
    Path("nul.yaml").write_text("title: a\0b\n")
    Path("act.json").write_text('{"hidden_act": "nope"}')
    Path("rope.json").write_text('{"rope_parameters": {"rope_type": "nope"}}')
    for suffix in ("jsonl", "json", "yaml"):
        Path(f"deep.{suffix}").write_text("[" * 100_000 if suffix != "yaml" else "[" * 5_000)
    for name, content in (("full", "notes.md"), ("broken", "config.json")):
        Path(name).mkdir()
        Path(name, content).write_text("{}")
    line, message = BAD[case]
    assert exit_code(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1 and error.startswith("regla") and "Traceback" not in error
    assert not Path("o").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("line", ["train --out o", "eval o", "generate o --prompt a"])
def test_cuda_asked_for_and_absent(line: str, capsys: pytest.CaptureFixture) -> None:
    assert exit_code([*line.split(), "--device", "cuda"]) == 2
    assert "CUDA was asked for, but this PyTorch sees no GPU" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from regla.train import run

    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupt)
    assert main(["train", "--out", "o"]) == 130
    assert capsys.readouterr().err == "regla: interrupted\n"


def test_failure_on_the_way_ends_with_1(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--out", str(tmp_path / "o"), "--data", str(corpus), *TINY, "--lr", "1e30"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("regla: error: ") and "lower --lr or lengthen --warmup" in last


@pytest.mark.parametrize(
    "command", ["", "train", "eval", "generate", "quickstart", "doctor", "linearize", "tokenize", "study"]
)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture) -> None:
    assert exit_code([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text and f"regla {command}".strip() in text


def test_help_loads_no_library() -> None:
    code = """
import sys
from regla.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    pass
sys.exit(", ".join({"torch", "numpy", "transformers", "tokenizers"} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("line", "code"), [("doctor", 141), ("train --help", 0)])
def test_a_reader_who_leaves_is_no_error(line: str, code: int) -> None:
    """`regla doctor | head`."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "regla", *line.split()]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writes)
    assert (done.returncode, done.stderr) == (code, "")


def test_full_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from regla.eval import measure

    def ask_for_too_much(*args: object, **options: object) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(measure, "measure", ask_for_too_much)
    assert main(["eval", "m"]) == 1
    assert capsys.readouterr().err.startswith("regla: error: The memory is full; ask for less")


def test_python_m_regla() -> None:
    done = subprocess.run([sys.executable, "-m", "regla", "train"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "regla train: error: the following arguments are required: --out (see regla train --help)\n"


def exit_code(line: list[str]) -> int:
    """argparse leaves by SystemExit, everything else returns."""
    try:
        return main(line)
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
