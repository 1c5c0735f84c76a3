"""The command `regla`: parses and calls, no logic. Libraries load inside the commands, so that `--help` is quick."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from regla.train.config import DEFAULT_STEPS, DEFAULT_VOCAB_SIZE, DEVICES, DTYPES, MIXERS, TrainConfig

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}

_MAIN = """\
ReGLA language models: linear attention with a refined gate, constant memory per generated token.

examples:
  regla train --out runs/regla                        train on the English that ships with Python
  regla eval runs/regla                               perplexity on its held-out part
  regla generate runs/regla --prompt "The statement"  continue a text

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

34M parameters, 26M tokens on a GPU, from tokens prepared by `regla tokenize`:
  regla tokenize --vocab-size 16384 --out tokens train.txt valid.txt
  regla train --out runs/34m --tokenizer tokens --data tokens/train.bin --valid tokens/valid.bin \\
    --hidden-size 512 --layers 8 --heads 8 --seq-len 1024 --batch-size 64 --steps 400 --lr 2e-3 --warmup 60 \\
    --device cuda --dtype bfloat16 --compile

Ctrl-C ends the run after the current step and saves the model as it is then (exit code 130).
"""

_EVAL = """\
Perplexity of a causal language model in a Hugging Face folder (ReGLA or any other), by file and as the mean over files.

Each file is cut into windows of --seq-len tokens that do not overlap; every token is predicted once, from those before
it in its window. `loss` is in nats per token. `bits/byte` compares models with different tokenizers.

examples:
  regla eval runs/regla                                       the held-out tenth of the embedded text
  regla eval runs/regla --data wiki.txt books.txt --json scores.json
"""

_GENERATE = """\
Continue a text with the model in a Hugging Face folder; prints it token by token.

examples:
  regla generate runs/regla --prompt "The statement"
  regla generate runs/regla --prompt "A class" --temperature 0 --max-new-tokens 200
"""

_LINEARIZE = """\
Put ReGLA into the layers of a pretrained softmax model (Llama family) and save it as a Hugging Face folder.

The pretrained projections move over, key and value heads shared as before. Before anything is written, softmax
attention run through the transferred weights must reproduce the original's logits. The gates are new: train before use.

examples:
  regla linearize HuggingFaceTB/SmolLM2-135M --out runs/smol
  regla linearize model.gguf --out runs/all-linear --keep none
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
    """Run one command; the exit code: 0 done, 1 failed on the way, 2 bad input, 130 interrupted."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers', which tell nothing about small models
    try:
        args.command(args)
    except KeyboardInterrupt:
        print("regla: interrupted", file=sys.stderr)
        return 130
    except (ValueError, FloatingPointError, OSError, MemoryError) as error:
        print(f"regla: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
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
        "--data", nargs="+", default=[], metavar="PATH", help=".txt or .bin files (default: embedded text)"
    )
    evaluate.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens of a window (default: the model's, at most 1024)"
    )
    evaluate.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="windows at a time (default: %(default)s)"
    )
    evaluate.add_argument("--json", dest="json_file", metavar="FILE", help="write the figures there, too")
    _where_arguments(evaluate)

    generate = command("generate", "continue a text", _GENERATE, _generate)
    generate.add_argument("folder", metavar="MODEL_DIR")
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="default: %(default)s")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: likeliest token (default: %(default)s)"
    )
    generate.add_argument(
        "--top-k", type=int, default=50, metavar="N", help="draw from the N likeliest (default: %(default)s)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    generate.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")

    linearize = command("linearize", "turn a softmax model into a linear one", _LINEARIZE, _linearize)
    linearize.add_argument("model", metavar="MODEL", help="name on the hub, folder or .gguf file")
    linearize.add_argument("--out", required=True, metavar="DIR", help="new folder for the model")
    linearize.add_argument(
        "--keep",
        default="every-2",
        metavar="RULE",
        help="layers that keep softmax: every-N or none (default: %(default)s)",
    )

    tokenize = command("tokenize", "turn text files into token files", _TOKENIZE, _tokenize)
    tokenize.add_argument("files", nargs="+", metavar="FILE", help=".txt files")
    tokenize.add_argument("--out", required=True, metavar="DIR", help="new folder for the tokens and the tokenizer")
    tokenize.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer to use")
    tokenize.add_argument("--vocab-size", type=int, metavar="N", help="or the size of one to train, at most 65536")
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
        "--data", nargs="+", default=[], metavar="PATH", help=".txt or .bin files (default: embedded text)"
    )
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
    run.add_argument("--compile", action="store_true", help="torch.compile the loss")
    _where_arguments(run)


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
    from regla.eval.generation import generate

    generate(**_options(args))


def _linearize(args: argparse.Namespace) -> None:
    from regla.linearize import linearize

    linearize(**_options(args))


def _tokenize(args: argparse.Namespace) -> None:
    from regla.train.tokenizer import tokenize_files

    tokenize_files(**_options(args))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name != "command"}
