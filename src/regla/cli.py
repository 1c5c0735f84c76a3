"""The command `regla`: parses and calls, no logic. Libraries load inside the commands, so that `--help` is quick."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from regla import help_texts
from regla.arguments import (
    bench_arguments,
    eval_arguments,
    linearize_arguments,
    study_arguments,
    text_field_argument,
    tokenize_arguments,
    train_arguments,
    where_arguments,
)
from regla.runtime.errors import LostProcessError, OtherProcessError, is_out_of_memory, told_in_flags
from regla.runtime.reading import check_text
from regla.train.config import DEVICES, TrainConfig

_BROKEN_PIPE = 141  # as a shell says of a process that SIGPIPE ended


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 failed on the way (a loss that is no number, a full memory), 2 bad input
    or a disk that is full or refuses, 130 interrupted, 141 nobody reads the output, 143 terminated."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not end a command
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `regla ... | head`: nobody reads on
        return _BROKEN_PIPE
    finally:
        _flush()


def _run(argv: Sequence[str]) -> int:
    try:
        for argument in argv:
            check_text(argument, f"The argument {argument!a}")
        args = _parser().parse_args(argv)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they tell nothing about small models
        args.command(args)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as error:
        print("regla: interrupted", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    except OtherProcessError:  # which says why
        return 1
    except (ValueError, FloatingPointError, OSError, MemoryError, LostProcessError) as error:
        print(f"regla: error: {told_in_flags(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError) else 1
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print("regla: error: The memory is full; ask for less: a smaller batch, window or model.", file=sys.stderr)
        return 1
    return 0


def _flush() -> None:
    """Write what is buffered, or drop it where nobody reads it, so that the interpreter does not try and complain."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="regla", description=help_texts.MAIN, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, summary: str, text: str, run: Callable[[argparse.Namespace], None]
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(command=run)
        return sub

    train_arguments(command("train", "train a model from scratch", help_texts.TRAIN, _train))

    eval_arguments(command("eval", "score models: tasks, probes of memory, perplexity", help_texts.EVAL, _evaluate))

    inspect = command(
        "inspect", "say what a model does inside: gates, memory, features, states", help_texts.INSPECT, _inspect
    )
    inspect.add_argument("model", metavar="MODEL", help="folder, .gguf file or name on the hub, with ReGLA layers")
    inspect.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help=".txt, .jsonl, .parquet or .bin (default: embedded text)"
    )
    text_field_argument(inspect)
    inspect.add_argument("--tokens", type=int, default=8192, metavar="N", help="of the text (default: %(default)s)")
    inspect.add_argument("--out", metavar="DIR", help="new folder for page, JSON and plot")
    where_arguments(inspect)

    generate = command("generate", "continue a text", help_texts.GENERATE, _generate)
    generate.add_argument("model", metavar="MODEL", help="folder, .gguf file or name on the hub")
    prompts = generate.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompts.add_argument("--prompts", dest="prompts_file", metavar="FILE", help="or a file of them, one a line")
    generate.add_argument(
        "--load-state", metavar="FILE", help="continue the text of a saved state, with --prompt or not"
    )
    generate.add_argument("--save-state", metavar="FILE", help="new file for the state at the end of the text")
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

    quickstart = command(
        "quickstart", "train, compare, stream and plot small models", help_texts.QUICKSTART, _quickstart
    )
    quickstart.add_argument("--out", default="runs/quickstart", metavar="DIR", help="default: %(default)s")
    quickstart.add_argument(
        "--steps", type=int, default=250, metavar="N", help="of 1,024 tokens, for each model (default: %(default)s)"
    )

    doctor = command("doctor", "say what would run here, and why", help_texts.DOCTOR, _doctor)
    doctor.add_argument("--json", action="store_true", dest="as_json", help="as JSON")

    linearize = command("linearize", "turn a softmax model into a linear one", help_texts.LINEARIZE, _linearize)
    linearize.add_argument("model", metavar="MODEL", help="name on the hub, folder or .gguf file")
    linearize.add_argument("--out", default=argparse.SUPPRESS, metavar="DIR", help="new folder for the model")
    linearize_arguments(linearize)

    page = command("report", "write a page about a linearized model", help_texts.REPORT, _report)
    page.add_argument("folder", metavar="DIR", help="folder that `regla linearize` wrote")
    page.add_argument("--teacher", metavar="MODEL", help="the original (default: the one that DIR names)")
    page.add_argument("--out", metavar="FILE.html", help="the page (default: DIR/report.html)")
    page.add_argument(
        "--skip-measurements", action="store_true", help="only what the folder holds; no model is loaded, in seconds"
    )
    page.add_argument("--device", choices=DEVICES, default="auto", help="default: %(default)s")

    study_arguments(command("study", "train and compare a grid of models", help_texts.STUDY, _study))

    bench_arguments(command("bench", "measure speed and memory", help_texts.BENCH, _bench))

    tokenize = command("tokenize", "turn text files into token files", help_texts.TOKENIZE, _tokenize)
    tokenize_arguments(tokenize)
    return parser


def _train(args: argparse.Namespace) -> None:
    from regla.train.model import read_overrides
    from regla.train.run import train

    known = {field.name for field in dataclasses.fields(TrainConfig)}
    options = {name: value for name, value in vars(args).items() if name in known}
    options["overrides"] = read_overrides(args.config) if args.config else {}
    train(TrainConfig(**options | {"data": tuple(args.data), "valid": tuple(args.valid)}))


def _evaluate(args: argparse.Namespace) -> None:
    from regla.eval.run import evaluate_models

    evaluate_models(**_options(args))


def _inspect(args: argparse.Namespace) -> None:
    from regla.eval.inspection import inspect_model

    inspect_model(**_options(args))


def _generate(args: argparse.Namespace) -> None:
    from regla.eval.generation import generate, generate_batch

    options = _options(args)
    of_a_batch = {name: options.pop(name) for name in ("prompts_file", "batch_size", "as_json")}
    if args.prompts_file is not None:
        if args.load_state is not None or args.save_state is not None:
            raise ValueError("--load-state and --save-state go with --prompt TEXT, not with --prompts; leave one out.")
        for name in ("prompt", "load_state", "save_state"):
            del options[name]
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
    from regla.linearize.driver import linearize
    from regla.train.model import read_overrides

    options = _options(args) | {"data": tuple(args.data), "valid": tuple(args.valid)}
    if "overrides" in options:
        options["overrides"] = read_overrides(options["overrides"])
    linearize(**options)


def _report(args: argparse.Namespace) -> None:
    from regla.page import report

    report(**_options(args))


def _study(args: argparse.Namespace) -> None:
    from regla.study import study

    if study(**_options(args)):
        raise SystemExit(1)


def _bench(args: argparse.Namespace) -> None:
    from regla.bench import run

    options = _options(args)
    getattr(run, f"bench_{options.pop('what')}")(**options)


def _tokenize(args: argparse.Namespace) -> None:
    from regla.data.tokenize import tokenize_files

    tokenize_files(**_options(args))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name != "command"}
