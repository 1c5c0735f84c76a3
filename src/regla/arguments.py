"""The arguments of the commands: flags, their defaults and their help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from regla import help_texts
from regla.data.bad import MAX_BAD_RECORDS
from regla.train.config import (
    DEFAULT_PAIRS,
    DEFAULT_SOFTMAX_EVERY,
    DEFAULT_STEPS,
    DEFAULT_VOCAB_SIZE,
    DEFAULT_WINDOW,
    DEVICES,
    DTYPES,
    MIXERS,
    MOST_SKIPPED,
    PARALLEL,
    RESUME,
    SAMPLING,
    TASKS,
    TrainConfig,
)

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    def add(group: Any, flag: str, kind: type, text: str) -> None:
        """Numbers with commas between them; left out, `Plan` has the default."""
        group.add_argument(flag, type=_list_of(kind), default=argparse.SUPPRESS, metavar="N,...", help=text)

    probes = parser.add_argument_group("probes of memory")
    probes.add_argument(
        "--probes",
        type=_list_of(str),
        metavar="NAME,...",
        help="mqar, induction, copy (token ids); passkey, needle, kv (text): instead of perplexity",
    )
    add(probes, "--lengths", int, "tokens of a sequence (default: 256)")
    add(probes, "--depths", float, "places of the fact, 0 to 1 (default: 0,0.25,0.5,0.75,1)")
    add(probes, "--pairs", int, "pairs of mqar and kv (default: 4,16)")
    add(probes, "--gaps", int, "noise between the pairs of mqar and its queries (default: 0)")
    probes.add_argument(
        "--seed", type=int, default=argparse.SUPPRESS, metavar="N", help="of the questions (default: 0)"
    )


def _list_of(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def read(text: str) -> tuple[Any, ...]:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    read.__name__ = f"list of {kind.__name__}"  # argparse says "invalid list of int value"
    return read


def train_arguments(parser: argparse.ArgumentParser) -> None:
    def add(group: Any, flag: str, kind: type, text: str) -> None:
        """An option of one value that sets the field of its name in TrainConfig."""
        default = _DEFAULTS[flag.removeprefix("--").replace("-", "_")]
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(flag, type=kind, default=default, metavar="X" if kind is float else "N", help=text + shown)

    text = parser.add_argument_group("text")
    text.add_argument("--out", required=True, metavar="DIR", help="new folder for the model")
    text.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help=".txt, .jsonl, .parquet or .bin, or folders of such files (default: embedded text)",
    )
    text.add_argument(
        "--data-weights",
        type=_list_of(float),
        metavar="X,...",
        help="shares of the training tokens, one for each PATH of --data and then --dataset (default: by their tokens)",
    )
    text.add_argument("--dataset", metavar="NAME[:CONFIG]", help="Hugging Face data set, streamed; or a folder of one")
    text_field_argument(text)
    text.add_argument(
        "--valid", nargs="+", default=[], metavar="PATH", help="default: the last tenth of each data file"
    )
    text.add_argument(
        "--sampling",
        choices=SAMPLING,
        default=_DEFAULTS["sampling"],
        help="sequences from random places, or, epochs, each once before any comes again (default: %(default)s)",
    )
    text.add_argument(
        "--reset-at-documents",
        action="store_true",
        help="tokens see nothing of the documents before theirs (default: all of their sequence)",
    )
    text.add_argument(
        "--token-cache", metavar="DIR", help="keep the tokens of text files there and stream them (default: in memory)"
    )
    text.add_argument(
        "--verify-data",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS["verify_data"],
        help="compare all of each token file with its checksum before the first step (default: do)",
    )
    max_bad_records_argument(text)
    text.add_argument("--tokenizer", metavar="DIR", help="default: train a byte-level BPE on the data")
    add(text, "--vocab-size", int, f"tokens of the BPE to train, or ids of the task (default: {DEFAULT_VOCAB_SIZE})")
    text.add_argument("--task", choices=TASKS, help="mqar: train on associative recall instead of text")
    shown = ",".join(map(str, DEFAULT_PAIRS))
    text.add_argument(
        "--pairs", type=_list_of(int), metavar="N,...", help=f"of mqar: pairs in a sequence (default: {shown})"
    )
    text.add_argument(
        "--gaps", type=_list_of(int), metavar="N,...", help="of mqar: noise between pairs and queries (default: 0)"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--mixer",
        choices=MIXERS,
        default=_DEFAULTS["mixer"],
        help="regla, softmax, hybrid: ReGLA, every --softmax-every-th layer softmax, or window: softmax over the last "
        "--window tokens; paper: ReGLA in the paper's own form (default: %(default)s)",
    )
    add(
        model,
        "--softmax-every",
        int,
        f"layers of --mixer hybrid, of which one is softmax (default: {DEFAULT_SOFTMAX_EVERY})",
    )
    add(
        model,
        "--window",
        int,
        f"tokens that softmax layers of --mixer window and hybrid attend to (default: {DEFAULT_WINDOW}, hybrid: all)",
    )
    add(model, "--hidden-size", int, "width")
    add(model, "--layers", int, "depth")
    add(model, "--heads", int, "attention heads")
    add(model, "--kv-heads", int, "heads of keys and values (default: as many as heads)")
    add(model, "--head-dim", int, "default: hidden size / heads")
    add(model, "--intermediate-size", int, "MLP width of the softmax model (default: 8/3 of the hidden size)")
    model.add_argument("--config", metavar="FILE.json", help="ReGLAConfig arguments that win over all flags")

    run = parser.add_argument_group("run")
    run.add_argument("--init", metavar="DIR", help="start from the weights, config and tokenizer of this model")
    add(run, "--steps", int, f"optimiser steps (default: {DEFAULT_STEPS})")
    add(run, "--tokens", int, "or tokens to train on, rounded up to whole steps")
    add(run, "--seq-len", int, "tokens of a sequence")
    add(run, "--batch-size", int, "sequences per forward pass, of all processes")
    run.add_argument(
        "--carry-state",
        action="store_true",
        help="read the text in order and take the states of linear layers on from step to step, without gradients",
    )
    add(run, "--accumulate", int, "forward passes per step")
    add(run, "--lr", float, "peak learning rate; decays to a tenth along a cosine")
    add(run, "--warmup", int, "steps of linear warm-up (default: a tenth of all)")
    add(run, "--weight-decay", float, "of linear maps, embeddings and convolutions; norms and biases do not decay")
    add(run, "--seed", int, "of initial weights and crops")
    add(
        run,
        "--max-skipped-steps",
        int,
        "of the last 100, whose loss or gradient is not finite; one more ends the run (default: a tenth of the run, at "
        f"most {MOST_SKIPPED})",
    )
    run.add_argument("--compile", action="store_true", help="torch.compile the blocks and the loss")
    run.add_argument(
        "--activation-checkpointing", action="store_true", help="less memory, more time: compute activations twice"
    )
    run.add_argument(
        "--parallel",
        choices=PARALLEL,
        default=_DEFAULTS["parallel"],
        help="how processes that torchrun started share a step (default: %(default)s)",
    )
    add(run, "--sequence-parallel-size", int, "of --parallel sequence: processes that share a sequence (default: all)")
    where_arguments(run)

    keep = parser.add_argument_group("checkpoints and log")
    add(keep, "--save-every", int, "steps between checkpoints (default: a tenth of the run, but at least 50)")
    _resume_argument(keep)
    add(keep, "--eval-every", int, "steps between validations in the log (default: at the end alone)")
    add(
        keep,
        "--inspect-every",
        int,
        "steps between looks at gates and states of linear layers in the log (default: as --eval-every)",
    )
    add(keep, "--eval-context", int, "at the end, score by position, too, in windows of N tokens (default: do not)")
    keep.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard, too")


def study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name_or_file", metavar="STUDY", help="name of a shipped study, or a .yaml file")
    parser.add_argument("--out", metavar="DIR", help="where rows, page and unfinished runs are (default: runs/STUDY)")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help=".txt, .jsonl, .parquet or .bin (default: embedded text)"
    )
    text_field_argument(parser)
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
        help="at a time on each GPU; their tokens/s then say little",
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="start no run that would not be done by then")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="GLOB", help="variants whose name matches any, such as 'value/*'"
    )
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


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="benchmarks", metavar="WHAT", dest="what", required=True)
    for name, text in (
        ("ops", help_texts.BENCH_OPS),
        ("decode", help_texts.BENCH_DECODE),
        ("train", help_texts.BENCH_TRAIN),
        ("distributed", help_texts.BENCH_DISTRIBUTED),
        ("eval", help_texts.BENCH_EVAL),
        ("cpu", help_texts.BENCH_CPU),
        ("data", help_texts.BENCH_DATA),
        ("students", help_texts.BENCH_STUDENTS),
    ):
        kind = kinds.add_parser(name, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        kind.add_argument("--out", metavar="FILE.jsonl", help="append rows there (default: print only)")
        kind.add_argument("--only", nargs="+", default=[], metavar="GLOB", help="cases whose name matches any")
        if name == "cpu":
            kind.add_argument("--threads", type=int, default=2, metavar="N", help="of torch (default: %(default)s)")
            continue
        if name == "data":
            kind.add_argument(
                "--gigabytes", type=float, default=1.0, metavar="X", help="of text or tokens (default: %(default)s)"
            )
            kind.add_argument("--dir", dest="folder", metavar="DIR", help="where they are written (default: /tmp)")
            continue
        kind.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU if there is one (default)")
        kind.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
        kind.add_argument("--quick", action="store_true", help="tiny sizes: to see that everything runs, in seconds")
        if name in ("decode", "train", "distributed"):
            kind.add_argument("--eager", action="store_true", help="without torch.compile, which a CPU never uses here")
        if name in ("decode", "train"):
            kind.add_argument("--config", metavar="FILE.json", help="ReGLAConfig arguments for the ReGLA model")
        if name == "train":
            text = "tokens of a sequence (default: 2048 8192 32768; a step has 32768 tokens, or one sequence)"
            kind.add_argument("--lengths", nargs="+", type=int, default=[], metavar="N", help=text)
            kind.add_argument("--profile", action="store_true", help="say which kernels take the time of a step, too")
        if name == "students":
            _students_arguments(kind)


def _students_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the original: name on the hub, folder or .gguf file")
    text = parser.add_argument_group("text (.txt, .jsonl, .parquet or .bin)")
    text.add_argument("--data", nargs="+", required=True, metavar="PATH", help="to train on")
    text.add_argument("--valid", nargs="+", required=True, metavar="PATH", help="to score, of the kinds trained on")
    text.add_argument("--unseen", nargs="+", default=[], metavar="PATH", help="to score, of other kinds")
    training = parser.add_argument_group("training, the same for all cases")
    training.add_argument("--tokens", metavar="N", help="of every case, such as 60M (default: 10M)")
    training.add_argument("--seq-len", type=int, metavar="N", help="tokens of a sequence (default: 512)")
    training.add_argument("--batch-size", type=int, metavar="N", help="sequences of a step (default: 16)")
    training.add_argument(
        "--lr", type=float, default=1e-3, metavar="X", help="peak learning rate of the mixers (default: %(default)s)"
    )
    training.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    tasks = parser.add_argument_group("tasks of lm-eval")
    tasks.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="boolq piqa ... (default: none)")
    tasks.add_argument("--data-dir", metavar="DIR", help="original data files (default: data sets of the hub)")
    tasks.add_argument("--limit", type=int, metavar="N", help="the first N items of a task (default: all)")
    parser.add_argument(
        "--work", metavar="DIR", help="keep models and logs there, and go on with them (default: delete them)"
    )


def linearize_arguments(parser: argparse.ArgumentParser) -> None:
    def add(group: Any, flag: str, kind: type, text: str) -> None:
        """An option of one value; left out, LinearizeConfig has the default."""
        metavar = "X" if kind is float else "N"
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=text)

    model = parser.add_argument_group("model")

    def tokens(group: Any, flag: str, text: str) -> None:
        group.add_argument(flag, default=argparse.SUPPRESS, metavar="N", help=text)

    model.add_argument(
        "--keep",
        default=argparse.SUPPRESS,
        metavar="RULE",
        help="layers that keep softmax: none, every-N, sliding (those with a window), numbers from 0 such as 0,7,14, "
        "or auto:25%% or auto:7 for the best so many (default: every-2; with --init those of DIR)",
    )
    model.add_argument(
        "--mixer",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="what the others become: additive or delta, linear attention by that rule; relu, hedgehog, scalar, "
        "fast_decay or paper, baselines and ReGLA as in the paper; window, softmax over the last --window tokens and "
        "the first four, without training (default: additive)",
    )
    model.add_argument(
        "--config",
        dest="overrides",
        metavar="FILE.json",
        default=argparse.SUPPRESS,
        help="options of the mixer over it",
    )
    add(model, "--window", int, "tokens that --mixer window attends to (default: 64)")
    add(model, "--window-branch", int, "softmax over the last N tokens beside the recurrence (default: none)")
    add(model, "--window-sinks", int, "first tokens that it sees, too (default: 4)")
    add(model, "--window-dropout", float, "share of training sequences that go without it (default: 0.1)")
    model.add_argument(
        "--init",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="go on from this converted folder, with MODEL as the teacher (default: convert MODEL itself)",
    )
    model.add_argument(
        "--gate-start",
        default=argparse.SUPPRESS,
        metavar="START",
        help="forget gates: teacher or distance, from the original's attention, or a half-life in tokens such as 14 "
        "(default: teacher)",
    )
    add(model, "--calibration-tokens", int, "tokens that layers are calibrated and checked on, 0: none (default: 8192)")
    model.add_argument("--dry-run", action="store_true", help="check every input, print sizes and costs; write nothing")

    text = parser.add_argument_group("text")
    text.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help=".txt, .jsonl, .parquet or .bin (default: embedded text)"
    )
    text_field_argument(text)
    text.add_argument(
        "--valid", nargs="+", default=[], metavar="PATH", help="default: the last tenth of each data file"
    )
    add(text, "--valid-tokens", int, "of each validation file that are scored, at most (default: 100000)")

    run = parser.add_argument_group("run")
    run.add_argument(
        "--preset",
        default=argparse.SUPPRESS,
        metavar="NAME",
        help="distill; paper, cross-entropy alone without calibration; lora, distill by adapters (default: distill)",
    )
    tokens(run, "--tokens", "to train on in all stages, such as 60M (default: 0, convert only)")
    tokens(
        run, "--transfer-tokens", "how many of them for attention transfer (default: a third; none if no layer is new)"
    )
    tokens(run, "--long-tokens", "how many of them for long-context tuning (default: 0)")
    add(run, "--long-seq-len", int, "tokens of its sequences (default: 2048)")
    add(run, "--seq-len", int, "tokens of a sequence (default: 512)")
    add(run, "--batch-size", int, "sequences per step (default: 16)")
    add(run, "--lr", float, "peak learning rate of the mixers (default: 1e-3)")
    add(run, "--original-lr", float, "of all other weights, in distillation (default: a tenth of --lr)")
    add(run, "--seed", int, "of new weights and crops (default: 0)")
    run.add_argument("--compile", action="store_true", help="torch.compile the distillation")
    add(run, "--save-every", int, "steps between checkpoints (default: a tenth of a stage, but at least 50)")
    _resume_argument(run)
    where_arguments(run)


def tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="PATH", help=".txt, .jsonl or .parquet files, or folders of such")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the tokens and the tokenizer")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer to use")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="or the size of one to train, at most 65536")
    text_field_argument(parser)
    parser.add_argument(
        "--shard-tokens", type=int, metavar="N", help="write NAME/00000.bin, ... of N tokens and the rest of a document"
    )
    max_bad_records_argument(parser)
    parser.add_argument("--resume", action="store_true", help="go on behind the last whole token file in --out")


def max_bad_records_argument(group: Any) -> None:
    group.add_argument(
        "--max-bad-records",
        type=int,
        default=MAX_BAD_RECORDS,
        metavar="N",
        help="records that may be left out, counted and named, because they cannot be used (default: %(default)s)",
    )


def text_field_argument(group: Any) -> None:
    group.add_argument(
        "--text-field",
        default=_DEFAULTS["text_field"],
        metavar="NAME",
        help="of the text in .jsonl, .parquet and data sets (default: %(default)s)",
    )


def _resume_argument(group: Any) -> None:
    group.add_argument(
        "--resume",
        nargs="?",
        const=RESUME[0],
        choices=RESUME,
        help="go on in --out from its latest checkpoint, or the previous one, should that be damaged",
    )


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder, .gguf file or name on the hub")
    tasks = parser.add_argument_group("tasks of lm-eval")
    tasks.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="boolq piqa hellaswag ...")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's own)")
    tasks.add_argument("--data-dir", metavar="DIR", help="original data files (default: data sets of the hub)")
    tasks.add_argument(
        "--compare-lm-eval", action="store_true", help="score with lm-eval's own model class, too, and say what differs"
    )
    _probe_arguments(parser)
    both = parser.add_argument_group("tasks and probes")
    both.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="the first N items of a task (default: all); sequences of a probe's cell (default: 100)",
    )
    both.add_argument(
        "--out", metavar="DIR", help="tables, plots and what they rest on; the same command goes on there"
    )
    perplexity = parser.add_argument_group("perplexity (without tasks and probes, or with --tasks and --data)")
    perplexity.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help=".txt, .jsonl, .parquet or .bin (default: embedded text)"
    )
    text_field_argument(perplexity)
    perplexity.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens of a window (default: the model's, at most 1024)"
    )
    perplexity.add_argument("--by-position", action="store_true", help="perplexity by the position of the token, too")
    perplexity.add_argument(
        "--stream", type=int, metavar="N", help="one sequence of N tokens per file, in chunks of --seq-len"
    )
    perplexity.add_argument(
        "--effective-context",
        action="store_true",
        help="how far back the text helps: loss by position with its noise, and with the context cut",
    )
    perplexity.add_argument(
        "--reset-at-documents", action="store_true", help="tokens see nothing of the documents before theirs"
    )
    perplexity.add_argument("--json", dest="json_file", metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="sequences at a time (default: %(default)s)"
    )
    where_arguments(parser)


def where_arguments(group: Any) -> None:
    group.add_argument("--device", choices=DEVICES, default="auto", help="auto: the GPU if there is one (default)")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of matrix products (default: %(default)s)")
