"""The command `regla`: parses and calls, no logic. Libraries load inside the commands, so that `--help` is quick."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from regla.train.config import DEFAULT_STEPS, DEFAULT_VOCAB_SIZE, DEVICES, DTYPES, MIXERS, RESUME, TrainConfig

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}

_MAIN = """\
ReGLA language models: linear attention with a refined gate, constant memory per generated token.

examples:
  regla train --out runs/regla                        train on the English that ships with Python
  regla eval runs/regla                               perplexity on its held-out part
  regla generate runs/regla --prompt "The statement"  continue a text
  regla quickstart                                    see all of it in minutes: train, compare, stream, plot

`regla COMMAND --help` explains each command.
"""

_TRAIN = """\
Train a causal language model from scratch by cross-entropy and save it as a Hugging Face folder
(weights, config, tokenizer, generation config, training.json with arguments and scores).

Without --data it trains on the language reference that every CPython ships, in about a minute on two CPU cores.
All mixers compare at equal parameters: --intermediate-size is the MLP width of the softmax model; where ReGLA layers
replace softmax ones, the MLP gives up as many parameters as they add, to within 0.5 % (the exact count is printed).

examples:
  regla train --out runs/regla
  regla train --out runs/softmax --mixer softmax
  regla train --out runs/mine --data book.txt notes.txt --steps 1000
  regla train --out runs/plain --config plain.json            where plain.json holds {"linear_conv_kernel_dim": 0}
  regla train --out runs/wiki --dataset wikitext:wikitext-103-raw-v1 --steps 5000

34M parameters, 26M tokens on a GPU, from tokens prepared by `regla tokenize`:
  regla tokenize --vocab-size 16384 --out tokens train.txt valid.txt
  regla train --out runs/34m --tokenizer tokens --data tokens/train.bin --valid tokens/valid.bin \\
    --hidden-size 512 --layers 8 --heads 8 --seq-len 1024 --batch-size 64 --steps 400 --lr 2e-3 --warmup 60 \\
    --device cuda --dtype bfloat16 --compile

DIR/log.jsonl has a line per step. DIR/checkpoints keeps the last two checkpoints, one every --save-every steps.
Ctrl-C or SIGTERM ends the run after the current step and saves a checkpoint and the model as it is then (exit code 130
or 143). After that, or after a crash, the same command with --resume goes on from the newest checkpoint as if nothing
had happened (on a CPU to the same weights, bit for bit); where none was saved yet, it starts from the first step.
  regla train --out runs/mine --data book.txt notes.txt --steps 1000 --resume
"""

_EVAL = """\
Perplexity of a causal language model in a Hugging Face folder (ReGLA or any other), by file and as the mean over files.

Each file is cut into windows of --seq-len tokens that do not overlap; every token is predicted once, from those before
it in its window. `loss` is in nats per token. `bits/byte` and `per word` (the perplexity of words between spaces)
compare models with different tokenizers.

--by-position shows the perplexity of the tokens 0-63, 64-127, 128-255, ... of the windows: what context is worth.
Windows may be longer than what the model was trained on.
--stream N scores the first N tokens of each file as one sequence instead, far beyond the length trained on if you like:
it is fed in chunks of --seq-len tokens through the cache, whose size does not grow in ReGLA layers.

examples:
  regla eval runs/regla                                       the held-out tenth of the embedded text
  regla eval runs/regla --data wiki.txt books.txt --json scores.json
  regla eval runs/regla --data book.txt --seq-len 8192 --by-position
  regla eval runs/regla --data book.txt --stream 100000 --by-position
"""

_GENERATE = """\
Continue a text with the model in a Hugging Face folder; prints it token by token. Or continue many: --prompts takes a
UTF-8 file with one prompt a line (empty lines are passed over), runs --batch-size of them at a time and prints each
with its continuation, with --json as one JSON object a line: {"prompt": ..., "continuation": ...}.

examples:
  regla generate runs/regla --prompt "The statement"
  regla generate runs/regla --prompt "A class" --temperature 0 --max-new-tokens 200
  regla generate runs/regla --prompts prompts.txt --json > continuations.jsonl
"""

_QUICKSTART = """\
See ReGLA learn, in about three minutes on two CPU cores and without a download: trains a small ReGLA, a hybrid and a
softmax model on equal parameters and tokens of the English that ships with Python, compares their validation
perplexities and speeds, shows that streaming equals the full forward pass, plots the losses and the cost of the next
token against the length of the context, and generates a sample.

DIR gets the models (regla, hybrid, softmax), loss.png, decoding.png and quickstart.json with every figure. A second
quickstart replaces the first.

examples:
  regla quickstart
  regla quickstart --out runs/longer --steps 600
"""

_DOCTOR = """\
Say what this machine offers regla: versions, devices, whether bfloat16 is supported, which backend would run and why,
and which optional packages are there and what each is for. Exit code 0.

examples:
  regla doctor
  regla doctor --json
"""

_LINEARIZE = """\
Put ReGLA into layers of a pretrained softmax model (Llama, SmolLM2, Mistral, Qwen2), train it to do what the original
does, and save it as a Hugging Face folder (weights, config, tokenizer, generation config, model card, linearize.json).

The pretrained projections move over, key and value heads shared as before; softmax attention run through them must
reproduce the original's logits. Then queries and keys are fitted to the feature map on a few thousand tokens, and the
figures of each layer are printed. Training is in two stages: attention transfer (each new layer learns its original's
output), then distillation (the whole model learns the original's predictions). Without --steps it only converts.

examples:
  regla linearize HuggingFaceTB/SmolLM2-135M --out runs/smol --steps 300
  regla linearize model.gguf --out runs/smol --data wiki.txt books.txt --steps 300 --dtype bfloat16
  regla linearize models/llama --out runs/all-linear --keep none --steps 1000
  regla linearize models/llama --out runs/plan --steps 1000 --dry-run

Ctrl-C ends the training after the current step and saves the model as it is then (exit code 130).
"""

_STUDY = """\
Train a grid of runs that one short YAML file describes (what varies, learning rates, seeds), and compare them.
DIR gets a row per run (rows.jsonl), and NAME.md with tables and a plot. Every variant gets every learning rate.

STUDY is one that is shipped (gate-start, qk, mixer-parts, softmax, refined-vs-plain, final, demo) or a .yaml file.
Each run is a process of its own; its output is DIR/runs/*/log.txt. Ctrl-C or SIGTERM saves checkpoints and ends it
(exit code 130 or 143). After that, or after a crash, the same command goes on: finished runs are kept, and one that
was cut off goes on from its last checkpoint. A run that diverges is a result; where one fails, the others go on, and
the exit code is 1.

examples:
  regla study demo --out runs/demo
  regla study gate-start --dry-run
  regla study gate-start --tokenizer tokens --data tokens/train.bin --valid tokens/valid.bin --out runs/gate-start
  regla study gate-start --only 'value/*' --set steps=100 --set lr=[2e-3] --data book.txt --out runs/short --minutes 9
  regla study gate-start --report --rows benchmarks/studies/gate-start.jsonl --out docs/results
"""

_BENCH = """\
Measure speed and memory. Every measurement is printed and appended to --out FILE.jsonl as one row with its quantiles,
the hardware, the versions and the commit as soon as it is there; what it is compared with is measured in the same run.

  ops     forward and backward of the operations: backends, softmax flash attention, fla's chunk_gla where installed
  decode  tokens/s of `generate` behind contexts of 1k to 64k: a 162M-parameter model against softmax of equal size
  train   tokens/s of training such models at lengths of 2k to 32k: ReGLA, softmax, and no mixer at all
  cpu     what the CPU path promises: chunked form against the recurrence, cost of a token, memory of a forward pass

examples:
  regla bench ops --out benchmarks/gpu/h100.jsonl
  regla bench ops --only 'regla_attention/value/triton/*' 'softmax_attention/*'
  regla bench decode --only '*/batch64/*' --out rows.jsonl
  regla bench train --device cpu --quick

`regla bench WHAT --help` explains the options of each.
"""

_BENCH_OPS = """\
Time the operations at the shapes that matter and over lengths of 512 to 32768 at a fixed number of tokens, forward and
forward+backward, and single steps of decoding. `of floor` is the share of the speed that the memory allows: each input
read once, each output written once, at the rate of a plain copy; `extra memory` is beyond inputs, outputs and
gradients; `x sdpa` and `x fla` say how many times as fast as softmax flash attention and fla's chunk_gla.

A case is called OPERATION/AXIS/BACKEND/SHAPE/DIRECTION:
  regla_attention/value/triton/B8-T2048-H12-64x64/forward+backward

examples:
  regla bench ops --out benchmarks/gpu/h100.jsonl
  regla bench ops --only '*/B8-T2048-*'
  regla bench ops --device cpu --quick
"""

_BENCH_DECODE = """\
Time `generate` with a static cache that holds a context already: tokens per second of all sequences together, with the
floor (weights and cache moved once), peak memory and size of the cache. Where memory runs out, the row says so.

A case is called MODEL/batchN/contextN, such as regla/batch64/context16384.

examples:
  regla bench decode --out benchmarks/gpu/h100.jsonl
  regla bench decode --only '*/batch8/*'
  regla bench decode --device cpu --quick
"""

_BENCH_TRAIN = """\
Time whole steps of training, forward, backward and AdamW, of a softmax model, of ReGLA at equal parameters, and of that
model with every mixer replaced by the identity, all with the same number of tokens in a step. Where memory runs out,
the row says so, and another has activation checkpointing.

A case is called MODEL/lengthN, such as regla/length2048.

examples:
  regla bench train --out benchmarks/gpu/h100.jsonl
  regla bench train --only '*/length2048' --eager
  regla bench train --device cpu --quick
"""

_BENCH_CPU = """\
Measure what the CPU path promises, one after the other in about two minutes: forms, decode, memory.

examples:
  regla bench cpu --out benchmarks/cpu.jsonl
  regla bench cpu --only memory
"""

_TOKENIZE = """\
Write text files as token files (NAME.bin: little-endian uint16 ids, every document ended by the end-of-text token)
and the tokenizer beside them, for `regla train --tokenizer DIR --data DIR/NAME.bin`.

Text is UTF-8; a line <|endoftext|> separates documents. Without --tokenizer, a byte-level BPE is trained on the files.

examples:
  regla tokenize --vocab-size 16384 --out tokens train.txt valid.txt
  regla tokenize --tokenizer tokens --out more-tokens other.txt
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 failed on the way (a loss that is no number, a full memory), 2 bad input
    or a disk that is full or refuses, 130 interrupted, 143 terminated."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers', which tell nothing about small models
    try:
        args.command(args)
    except KeyboardInterrupt as error:
        print("regla: interrupted", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    except (ValueError, FloatingPointError, OSError, MemoryError) as error:
        print(f"regla: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="regla", description=_MAIN, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, summary: str, text: str, run: Callable[[argparse.Namespace], None]
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(command=run)
        return sub

    _train_arguments(command("train", "train a model from scratch", _TRAIN, _train))

    evaluate = command("eval", "score a model: perplexity", _EVAL, _evaluate)
    evaluate.add_argument("folder", metavar="MODEL_DIR")
    evaluate.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help=".txt, .jsonl, .parquet or .bin (default: embedded text)"
    )
    evaluate.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens of a window (default: the model's, at most 1024)"
    )
    evaluate.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="windows at a time (default: %(default)s)"
    )
    evaluate.add_argument("--by-position", action="store_true", help="perplexity by the position of the token, too")
    evaluate.add_argument(
        "--stream", type=int, metavar="N", help="one sequence of N tokens per file, in chunks of --seq-len"
    )
    evaluate.add_argument("--json", dest="json_file", metavar="FILE", help="write the figures there, too")
    _where_arguments(evaluate)

    generate = command("generate", "continue a text", _GENERATE, _generate)
    generate.add_argument("folder", metavar="MODEL_DIR")
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompts.add_argument("--prompts", dest="prompts_file", metavar="FILE", help="or a file of them, one a line")
    generate.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="of --prompts, at a time (default: %(default)s)"
    )
    generate.add_argument("--json", action="store_true", dest="as_json", help="with --prompts: JSON lines")
    generate.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default: %(default)s")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: likeliest token (default: %(default)s)"
    )
    generate.add_argument(
        "--top-k", type=int, default=50, metavar="N", help="draw from the N likeliest (default: %(default)s)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    generate.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")

    quickstart = command("quickstart", "train, compare, stream and plot small models", _QUICKSTART, _quickstart)
    quickstart.add_argument("--out", default="runs/quickstart", metavar="DIR", help="default: %(default)s")
    quickstart.add_argument(
        "--steps", type=int, default=250, metavar="N", help="of 1,024 tokens, for each model (default: %(default)s)"
    )

    doctor = command("doctor", "say what would run here, and why", _DOCTOR, _doctor)
    doctor.add_argument("--json", action="store_true", dest="as_json", help="as JSON")

    linearize = command("linearize", "turn a softmax model into a linear one", _LINEARIZE, _linearize)
    linearize.add_argument("model", metavar="MODEL", help="name on the hub, folder or .gguf file")
    linearize.add_argument("--out", required=True, metavar="DIR", help="new folder for the model")
    _linearize_arguments(linearize)

    _study_arguments(command("study", "train and compare a grid of models", _STUDY, _study))

    _bench_arguments(command("bench", "measure speed and memory", _BENCH, _bench))

    tokenize = command("tokenize", "turn text files into token files", _TOKENIZE, _tokenize)
    tokenize.add_argument("files", nargs="+", metavar="FILE", help=".txt, .jsonl or .parquet files")
    tokenize.add_argument("--out", required=True, metavar="DIR", help="new folder for the tokens and the tokenizer")
    tokenize.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer to use")
    tokenize.add_argument("--vocab-size", type=int, metavar="N", help="or the size of one to train, at most 65536")
    _text_field_argument(tokenize)
    return parser


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    def add(group: Any, flag: str, kind: type, text: str) -> None:
        """An option of one value that sets the field of its name in TrainConfig."""
        default = _DEFAULTS[flag.removeprefix("--").replace("-", "_")]
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, type=kind, default=default, metavar="X" if kind is float else "N", help=text + shown)

    text = parser.add_argument_group("text")
    text.add_argument("--out", required=True, metavar="DIR", help="new folder for the model")
    text.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help=".txt, .jsonl, .parquet or .bin (default: embedded text)"
    )
    text.add_argument("--dataset", metavar="NAME[:CONFIG]", help="Hugging Face data set, streamed; or a folder of one")
    _text_field_argument(text)
    text.add_argument(
        "--valid", nargs="+", default=[], metavar="PATH", help="default: the last tenth of each data file"
    )
    text.add_argument("--tokenizer", metavar="DIR", help="default: train a byte-level BPE on the data")
    add(text, "--vocab-size", int, f"tokens of the BPE to train (default: {DEFAULT_VOCAB_SIZE})")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--mixer",
        choices=MIXERS,
        default=_DEFAULTS["mixer"],
        help="regla, softmax, or hybrid: every second layer softmax (default: %(default)s)",
    )
    add(model, "--hidden-size", int, "width")
    add(model, "--layers", int, "depth")
    add(model, "--heads", int, "attention heads")
    add(model, "--kv-heads", int, "heads of keys and values (default: as many as heads)")
    add(model, "--head-dim", int, "default: hidden size / heads")
    add(model, "--intermediate-size", int, "MLP width of the softmax model (default: 8/3 of the hidden size)")
    model.add_argument("--config", metavar="FILE.json", help="ReGLAConfig arguments that win over all flags")

    run = parser.add_argument_group("run")
    add(run, "--steps", int, f"optimiser steps (default: {DEFAULT_STEPS})")
    add(run, "--tokens", int, "or tokens to train on, rounded up to whole steps")
    add(run, "--seq-len", int, "tokens of a sequence")
    add(run, "--batch-size", int, "sequences per forward pass")
    add(run, "--accumulate", int, "forward passes per step")
    add(run, "--lr", float, "peak learning rate; decays to a tenth along a cosine")
    add(run, "--warmup", int, "steps of linear warm-up (default: a tenth of all)")
    add(run, "--weight-decay", float, "of weights; norms and biases do not decay")
    add(run, "--seed", int, "of initial weights and crops")
    run.add_argument("--compile", action="store_true", help="torch.compile the blocks and the loss")
    run.add_argument(
        "--activation-checkpointing", action="store_true", help="less memory, more time: compute activations twice"
    )
    _where_arguments(run)

    keep = parser.add_argument_group("checkpoints and log")
    add(keep, "--save-every", int, "steps between checkpoints (default: a tenth of the run, but at least 50)")
    keep.add_argument(
        "--resume",
        nargs="?",
        const=RESUME[0],
        choices=RESUME,
        help="go on in --out from its latest checkpoint, or the previous one, should that be damaged",
    )
    add(keep, "--eval-every", int, "steps between validations in the log (default: at the end alone)")
    add(keep, "--eval-context", int, "at the end, score by position, too, in windows of N tokens (default: do not)")
    keep.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard, too")


def _study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name_or_file", metavar="STUDY", help="name of a shipped study, or a .yaml file")
    parser.add_argument("--out", metavar="DIR", help="where rows, page and unfinished runs are (default: runs/STUDY)")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help=".txt, .jsonl, .parquet or .bin (default: embedded text)"
    )
    parser.add_argument(
        "--valid", nargs="+", default=[], metavar="PATH", help="default: the last tenth of each data file"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="default: train a byte-level BPE on the data")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU if there is one (default)")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="GPUs to use, a run on each; on a CPU, runs at a time"
    )
    parser.add_argument(
        "--runs-per-device",
        type=int,
        default=1,
        metavar="N",
        help="at a time on each GPU: one compiles while another trains; their tokens/s then say little",
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="start no run that would not be done by then")
    parser.add_argument("--only", metavar="GLOB", help="variants whose name matches, such as 'value/*'")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="sets",
        metavar="KEY=VALUE",
        help="over the file: a field of its base, overrides.NAME, lr or seeds; may be repeated",
    )
    parser.add_argument("--rows", dest="rows_file", metavar="FILE", help="a .jsonl file of runs that are done, too")
    parser.add_argument("--keep-models", action="store_true", help="keep the models of finished runs")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the grid; write nothing")
    what.add_argument("--report", action="store_true", help="only write the page, from rows")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="benchmarks", metavar="WHAT", dest="what", required=True)
    for name, text in (
        ("ops", _BENCH_OPS),
        ("decode", _BENCH_DECODE),
        ("train", _BENCH_TRAIN),
        ("cpu", _BENCH_CPU),
    ):
        kind = kinds.add_parser(name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        kind.add_argument("--out", metavar="FILE.jsonl", help="append rows there (default: print only)")
        kind.add_argument("--only", nargs="+", default=[], metavar="GLOB", help="cases whose name matches any")
        if name == "cpu":
            kind.add_argument("--threads", type=int, default=2, metavar="N", help="of torch (default: %(default)s)")
            continue
        kind.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU if there is one (default)")
        kind.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
        kind.add_argument("--quick", action="store_true", help="tiny sizes: to see that everything runs, in seconds")
        if name != "ops":
            kind.add_argument("--eager", action="store_true", help="without torch.compile, which a CPU never uses here")


def _linearize_arguments(parser: argparse.ArgumentParser) -> None:
    def add(group: Any, flag: str, kind: type, text: str) -> None:
        """An option of one value; left out, LinearizeConfig has the default."""
        metavar = "X" if kind is float else "N"
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)

    model = parser.add_argument_group("model")
    model.add_argument(
        "--keep",
        default="every-2",
        metavar="RULE",
        help="layers that keep softmax: every-N or none (default: %(default)s)",
    )
    add(model, "--gate-bias", float, "start of the forget gates' biases (default: 3, a memory of about 20 tokens)")
    add(model, "--calibration-tokens", int, "tokens the feature map is fitted to and checked on (default: 4096)")
    model.add_argument("--dry-run", action="store_true", help="print parameters, memory and cache sizes; write nothing")

    text = parser.add_argument_group("text")
    text.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help=".txt, .jsonl, .parquet or .bin (default: embedded text)"
    )
    text.add_argument(
        "--valid", nargs="+", default=[], metavar="PATH", help="default: the last tenth of each data file"
    )
    add(text, "--valid-tokens", int, "of each validation file that are scored, at most (default: 100000)")

    run = parser.add_argument_group("run")
    add(run, "--steps", int, "optimiser steps of both stages together (default: 0, convert only)")
    add(run, "--transfer-steps", int, "how many of them are attention transfer (default: a third)")
    add(run, "--seq-len", int, "tokens of a sequence (default: 512)")
    add(run, "--batch-size", int, "sequences per step (default: 16)")
    add(run, "--lr", float, "peak learning rate of the new layers; all else learns at a tenth (default: 1e-3)")
    add(run, "--seed", int, "of new weights and crops (default: 0)")
    run.add_argument("--compile", action="store_true", help="torch.compile the distillation")
    _where_arguments(run)


def _text_field_argument(group: Any) -> None:
    group.add_argument(
        "--text-field",
        default=_DEFAULTS["text_field"],
        metavar="NAME",
        help="of the text in .jsonl, .parquet and data sets (default: %(default)s)",
    )


def _where_arguments(group: Any) -> None:
    group.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU if there is one (default)")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of matrix products (default: %(default)s)")


def _train(args: argparse.Namespace) -> None:
    from regla.train.model import read_overrides
    from regla.train.run import train

    options = {name: value for name, value in vars(args).items() if name in _DEFAULTS}
    options["overrides"] = read_overrides(args.config) if args.config else {}
    train(TrainConfig(**options | {"data": tuple(args.data), "valid": tuple(args.valid)}))


def _evaluate(args: argparse.Namespace) -> None:
    from regla.eval.perplexity import evaluate

    evaluate(**_options(args))


def _generate(args: argparse.Namespace) -> None:
    from regla.eval.generation import generate, generate_batch

    options = _options(args)
    of_a_batch = {name: options.pop(name) for name in ("prompts_file", "batch_size", "as_json")}
    if args.prompts_file is not None:
        del options["prompt"]
        generate_batch(**options, **of_a_batch)
    elif args.as_json:
        raise ValueError("--json goes with --prompts FILE; leave it out or put the prompt into a file.")
    else:
        generate(**options)


def _quickstart(args: argparse.Namespace) -> None:
    from regla.quickstart import quickstart

    quickstart(**_options(args))


def _doctor(args: argparse.Namespace) -> None:
    from regla.doctor import doctor

    doctor(**_options(args))


def _linearize(args: argparse.Namespace) -> None:
    from regla.train.recipes import LinearizeConfig, linearize

    linearize(LinearizeConfig(**_options(args) | {"data": tuple(args.data), "valid": tuple(args.valid)}))


def _study(args: argparse.Namespace) -> None:
    from regla.study import study

    if study(**_options(args)):
        raise SystemExit(1)


def _bench(args: argparse.Namespace) -> None:
    from regla.bench import run

    options = _options(args)
    getattr(run, f"bench_{options.pop('what')}")(**options)


def _tokenize(args: argparse.Namespace) -> None:
    from regla.train.tokenizer import tokenize_files

    tokenize_files(**_options(args))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name != "command"}
