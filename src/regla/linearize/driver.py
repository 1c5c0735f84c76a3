"""Recipes: what to train on which loss in which order. Here: from a pretrained softmax model to a linear one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

import regla
from regla.data.selection import read_sources, split_validation
from regla.data.sources import Encoded, Source, encode_source, end_of_text_id
from regla.eval.perplexity import Score, first_id, mean_score, score
from regla.linearize.budget import budget, seconds_per_sequence
from regla.linearize.calibration import LayerCalibration, calibrate, calibration_table
from regla.linearize.card import model_card
from regla.linearize.convert import GATE_BIAS, convert, converted_config
from regla.linearize.load import load_config, load_original
from regla.linearize.losses import distillation_loss, transfer_loss
from regla.linearize.transfer import check_transfer, linear_layers
from regla.runtime.checkpoint import FOLDER as CHECKPOINTS
from regla.runtime.checkpoint import Checkpoints, found_in
from regla.runtime.device import autocast, pick_device
from regla.runtime.files import check_new, new_folder
from regla.runtime.log import TrainingLog, read_log
from regla.runtime.progress import Progress
from regla.runtime.signals import Interrupted, Signals
from regla.train.config import TrainConfig
from regla.train.loop import Group, Loss, crops, optimise
from regla.train.regions import compiled_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from regla.models import ReGLAForCausalLM

SUMMARY = "linearize.json"
CALIBRATION_LENGTH = 512
TRANSFER_SHARE = 1 / 3  # of the steps go to attention transfer, unless told otherwise
_WITHOUT_EFFECT = {  # options that do not change what a step computes; the data count by their tokens
    *("model", "out", "data", "valid", "valid_tokens", "device", "compile", "dry_run", "save_every", "resume"),
}
REST_LR = 0.1  # learning rate of everything but the mixers, in relation to theirs


@dataclass(frozen=True, kw_only=True)
class LinearizeConfig:
    """One conversion by `linearize`; the defaults are the command's."""

    model: str
    """A name on the Hugging Face hub, a folder or a .gguf file."""
    out: str
    """Folder for the converted model; must be new or empty, unless `resume`."""
    keep: str = "every-2"
    """Layers that keep softmax attention, see `regla.linearize.layer_types`."""
    gate_bias: float = GATE_BIAS
    """Where the biases of the new forget gates start."""
    data: tuple[str, ...] = ()
    """Text or token files to calibrate and train on; none: the embedded text."""
    valid: tuple[str, ...] = ()
    """Files to validate on; none: the last tenth of every data file, which is then not trained on."""
    valid_tokens: int = 100_000
    """Tokens of each validation source that are scored, at most."""
    calibration_tokens: int = 4096
    steps: int = 0
    """Of both stages together; 0 converts and calibrates only."""
    transfer_steps: int | None = None
    """How many of them are attention transfer; None: a third."""
    seq_len: int = 512
    batch_size: int = 16
    lr: float = 1e-3
    """Peak learning rate of the mixers in both stages; all other parameters learn at a tenth of it."""
    seed: int = 0
    device: str = "auto"
    dtype: str = "float32"
    """Of matrix products in training and scoring; weights, states and losses stay float32."""
    compile: bool = False
    dry_run: bool = False
    save_every: int | None = None
    """Steps between checkpoints; None: a tenth of a stage, but at least 50."""
    resume: str | None = None
    """Go on in `out`, from the newest checkpoint of its stage (`latest`) or the one before that (`previous`)."""

    def __post_init__(self) -> None:
        for name in ("valid_tokens", "seq_len", "batch_size", "lr", "save_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{_flag(name)} is {getattr(self, name)}, expected a number above 0.")
        if self.steps < 0 or self.seed < 0:
            name = "steps" if self.steps < 0 else "seed"
            raise ValueError(f"--{name} is {getattr(self, name)}, expected 0 or more.")
        if self.calibration_tokens < 2 * CALIBRATION_LENGTH:
            raise ValueError(
                f"--calibration-tokens is {self.calibration_tokens}, expected at least {2 * CALIBRATION_LENGTH}: "
                f"a sequence of {CALIBRATION_LENGTH} to calibrate on, and one to check it."
            )
        if self.transfer_steps is not None and not 0 <= self.transfer_steps <= self.steps:
            raise ValueError(
                f"--transfer-steps is {self.transfer_steps}, expected 0 to {self.steps}, since --steps counts them."
            )

    @property
    def stages(self) -> dict[str, int]:
        """Steps of each stage that has any."""
        transfer = round(self.steps * TRANSFER_SHARE) if self.transfer_steps is None else self.transfer_steps
        stages = {"attention transfer": transfer, "distillation": self.steps - transfer}
        return {name: steps for name, steps in stages.items() if steps}


def linearize(config: LinearizeConfig) -> dict[str, Any] | None:
    """Convert a pretrained model, prove it, calibrate it, train it, and save it with everything that belongs to it.

    1. Weights move over; softmax through them must reproduce the original's logits (`check_transfer`).
    2. The feature map and the output norms are fitted to the original's attention (`calibrate`).
    3. Attention transfer: each mixer learns to give what the original's attention gives for the same input.
    4. Distillation: the whole model learns the original's next-token distribution.

    The converted model is saved before training, too. Ctrl-C and SIGTERM end the training after the current step; a
    checkpoint and the model as it is then are saved, and Interrupted is raised. With `config.resume` steps 1 and 2 are
    repeated, which takes moments, and 3 and 4 go on from the last checkpoint. Returns what `linearize.json` in the
    folder holds.

    Raises:
        ValueError: whatever can be wrong with the input, before anything is written.
        FloatingPointError: a loss that is no longer finite; the folder then holds the model as it was saved before.
        MemoryError: the GPU's is too small; likewise.
        OSError: a checkpoint cannot be written; those before it are untouched.
    """
    _check_out(config)
    device = pick_device(config.device)
    before = load_config(config.model)
    planned = converted_config(before, config.keep, gate_bias=config.gate_bias)
    if config.dry_run:
        sizes = {"steps": config.steps, "batch_size": config.batch_size, "seq_len": config.seq_len}
        print(budget(before, planned, **sizes))
        if config.steps:
            with autocast(device, config.dtype):
                seconds = seconds_per_sequence(
                    planned, batch_size=config.batch_size, seq_len=config.seq_len, device=device
                )
            sequences = config.steps * config.batch_size
            # The original runs forward only: a third of forward and backward.
            print(
                f"estimated time    {sequences * seconds * 4 / 3 / 60:,.1f} minutes on {device.type}: {sequences:,} "
                f"sequences of {seconds:.3g} s, forward and backward (measured), and a third more for the original"
            )
        return None
    train_sources, valid_sources = _sources(config)
    original, tokenizer = load_original(config.model)
    ids_N = _training_ids(train_sources, tokenizer, max(config.seq_len, CALIBRATION_LENGTH))
    stages = _stages(config, ids_N)
    texts = [_start(encode_source(source, tokenizer), config.valid_tokens) for source in valid_sources]
    torch.manual_seed(config.seed)
    model = convert(original, config.keep, check=False, gate_bias=config.gate_bias)
    error = check_transfer(original, model)
    linear = sorted(linear_layers(model))
    print(
        f"{config.model}: {len(model.model.layers)} layers, {len(linear)} of them now ReGLA; softmax through the "
        f"transferred weights reproduces the original's logits to {error:.1e} of the largest"
    )
    original, model = original.to(device), model.to(device)
    tokens_N = torch.from_numpy(ids_N).to(device)
    sequences = config.calibration_tokens // CALIBRATION_LENGTH
    rows = calibrate(
        original,
        model,
        crops(tokens_N, seed=config.seed, batch=0, batch_size=sequences, length=CALIBRATION_LENGTH),
    )
    print(calibration_table(rows))
    failing = [row.layer for row in rows if not row.holds]
    print(
        f"Calibrated on {sequences // 2 * CALIBRATION_LENGTH:,} tokens and checked on others; "
        + (f"the contract FAILS in layers {', '.join(map(str, failing))}" if failing else "the contract holds")
        + " (a quarter of the features effective, KL below that of uniform attention)"
    )
    scores = {"original": _scores(original, texts, tokenizer, config)}
    scores["converted"] = _scores(model, texts, tokenizer, config)

    out = Path(config.out) if config.resume is not None and Path(config.out).is_dir() else new_folder(config.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    summary = _summary(config, error, rows, scores, parameters=parameters, device=device)
    if any(stage.checkpoints.resumed for stage in stages):
        summary["stages"] = _read_summary(out).get("stages", {})
    else:
        _save(out, model, tokenizer, summary)
    if config.steps:
        try:
            signal = _train(original, model, tokens_N, config, out, summary, stages)
        except torch.OutOfMemoryError as full:
            raise MemoryError("The memory of the GPU is full; lower --batch-size.") from full
        scores["trained"] = _scores(model, texts, tokenizer, config) if signal is None else []
        summary["scores"] = {name: [asdict(row) for row in found] for name, found in scores.items() if found}
        _save(out, model, tokenizer, summary)
        if signal is not None:
            print(f"Interrupted; the model as it is now is in {out}. --resume goes on from the last checkpoint.")
            raise Interrupted(signal)
        for stage in stages:
            shutil.rmtree(stage.checkpoints.folder.parent, ignore_errors=True)
    print(score_table(scores))
    untrained = "" if config.steps else "; its gates are untrained: add --steps, or train it further"
    print(f"Saved to {out}{untrained}.")
    return summary


def score_table(scores: dict[str, list[Score]]) -> str:
    """Perplexity by source (rows) and state of the model (columns)."""
    states = list(scores)
    names = [row.name for row in scores[states[0]]]
    columns = {state: [row.perplexity for row in found] for state, found in scores.items()}
    if len(names) > 1:
        names.append("mean")
        for state, found in scores.items():
            columns[state].append(mean_score(found).perplexity)
    width = max(map(len, ["perplexity", *names]))
    lines = [f"{'perplexity':<{width}}" + "".join(f"  {state:>10}" for state in states)]
    for index, name in enumerate(names):
        lines.append(f"{name:<{width}}" + "".join(f"  {columns[state][index]:>10.2f}" for state in states))
    return "\n".join(lines)


@dataclass(frozen=True)
class _Stage:
    name: str
    config: TrainConfig
    checkpoints: Checkpoints
    complete: bool
    """A later stage has checkpoints, which hold what this one has left."""


def _stages(config: LinearizeConfig, ids_N: np.ndarray) -> list[_Stage]:
    settings = _settings(asdict(config)) | {"--data (SHA-256 of its tokens)": hashlib.sha256(ids_N.data).hexdigest()}
    stages: list[_Stage] = []
    for number, (name, steps) in reversed(list(enumerate(config.stages.items(), 1))):
        folder = Path(config.out) / f"stage-{number}"
        complete = any(stage.complete or found_in(stage.checkpoints.folder) for stage in stages)
        resume = None if complete else config.resume
        if resume == "previous" and not found_in(folder / CHECKPOINTS):
            resume = "latest"  # there is none yet; the one that is damaged is of the stage before
        run = TrainConfig(
            out=str(folder),
            steps=steps,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            lr=config.lr,
            weight_decay=0.0,
            seed=config.seed + number,  # other crops than calibration and the stage before
            dtype=config.dtype,
            compile=config.compile and name == "distillation",  # hooks do not survive compilation
            save_every=config.save_every,
        )
        checkpoints = Checkpoints(folder, settings, resume=resume, completed=True)
        stages.insert(0, _Stage(name, run, checkpoints, config.resume is not None and complete))
    return stages


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights depend on, by option."""
    options = {_flag(name): value for name, value in arguments.items() if name not in _WITHOUT_EFFECT}
    return options | {"MODEL": arguments.get("model")}


def _steps_before(stages: Sequence[_Stage]) -> int:
    return sum(stage.config.total_steps if stage.complete else stage.checkpoints.step for stage in stages)


def _check_out(config: LinearizeConfig) -> None:
    """Raise ValueError unless `config.out` is new, or is to be resumed and holds the same conversion, not finished."""
    out = Path(config.out)
    folders = [out / f"stage-{number}" for number in (1, 2)]
    begun = any(found_in(folder / CHECKPOINTS) for folder in folders)
    summary = _read_summary(out)
    finished = "trained" in summary.get("scores", {})
    if config.resume is None:
        if begun and not finished:
            raise ValueError(f"{out} is not empty; give --out a new folder, or --resume to go on with its conversion.")
        check_new(out)
        return
    if config.steps == 0:
        raise ValueError("--resume without --steps has nothing to go on with; repeat the --steps of the conversion.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if finished:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(f"The conversion in {out} is finished; there is nothing to resume.")
    if not begun and not summary:
        raise ValueError(f"{out} holds no conversion to resume; give --out the folder of one.")
    ours = _settings(json.loads(json.dumps(asdict(config))))
    theirs = _settings(summary.get("arguments", {})) if summary else ours
    for key in ours:
        if theirs.get(key) != ours[key]:
            raise ValueError(
                f"{out} is of a conversion with {key} {theirs.get(key)}, but this one has {key} {ours[key]}; repeat "
                "the options of that conversion, or give --out a new folder."
            )


def _read_summary(out: Path) -> dict[str, Any]:
    """What `linearize.json` in the folder holds; empty where it is missing or damaged."""
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _train(
    original: transformers.PreTrainedModel,
    model: ReGLAForCausalLM,
    tokens_N: torch.Tensor,
    config: LinearizeConfig,
    out: Path,
    summary: dict[str, Any],
    stages: Sequence[_Stage],
) -> int | None:
    """Run the stages; the signal that ended them early, or None."""
    mixers = [p for layer in linear_layers(model).values() for p in layer.get_submodule("self_attn").parameters()]
    own = set(mixers)
    groups = [Group(params=mixers, lr_scale=1.0)]
    rest = Group(params=[p for p in model.parameters() if p not in own], lr_scale=REST_LR)
    recipes: dict[str, tuple[Loss, list[Group]]] = {
        "attention transfer": (transfer_loss(original), groups),
        "distillation": (distillation_loss(original), [*groups, rest]),
    }
    before = 0
    with Signals() as signals, TrainingLog(out, after=_steps_before(stages)) as log:
        for number, stage in enumerate(stages, 1):
            loss, trained = recipes[stage.name]
            steps, resumed = stage.config.total_steps, stage.checkpoints.resumed
            if stage.complete:
                print(f"Stage {number}, {stage.name}: done before")
                before += steps
                continue
            print(
                f"Stage {number}, {stage.name}: {steps:,} steps of {config.batch_size} x {config.seq_len} tokens"
                + (f"; goes on from {resumed}" if resumed is not None else "")
            )
            progress = Progress()

            def write(record: dict[str, Any], stage: str = stage.name, before: int = before) -> None:
                log(record | {"step": before + record["step"], "stage": stage})

            with compiled_blocks(original) if stage.config.compile else nullcontext():
                optimise(
                    model,
                    tokens_N,
                    stage.config,
                    progress=progress,
                    stop=lambda: signals.received is not None,
                    checkpoints=stage.checkpoints,
                    loss=loss,
                    groups=trained,
                    log=write,
                )
            before += progress.steps
            logged = [record["loss"] for record in read_log(out) if record.get("stage") == stage.name]
            first = logged[0] if resumed is not None and logged else progress.losses[0]
            summary["stages"][stage.name] = {
                "steps": progress.steps,
                "seconds": progress.total_seconds,
                "first_loss": first,
                "last_loss": progress.train_loss,
            }
            print(f"{stage.name}: loss {first:.3f} at first, {progress.train_loss:.3f} over the last steps")
            _write_summary(out, summary)
            if signals.received is not None:
                break
    return signals.received


def _sources(config: LinearizeConfig) -> tuple[list[Source], list[Source]]:
    return split_validation(read_sources(config.data), config.valid)


def _training_ids(sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase, length: int) -> np.ndarray:
    end_of_text_id(tokenizer)  # says what is wrong with a tokenizer that has none
    ids_N = np.concatenate([source.tokens(tokenizer) for source in sources])
    if len(ids_N) <= length:
        raise ValueError(
            f"The training text has {len(ids_N)} tokens, expected more than one sequence of {length}; give more text."
        )
    return ids_N


def _start(text: Encoded, tokens: int) -> Encoded:
    """The first `tokens` of a text; how many bytes that is, only the whole text knows."""
    return text if len(text.ids) <= tokens else Encoded(text.name, text.ids[:tokens], None)


def _scores(
    model: transformers.PreTrainedModel,
    texts: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    config: LinearizeConfig,
) -> list[Score]:
    first = first_id(tokenizer)
    return [
        score(model, text, first=first, seq_len=config.seq_len, batch_size=config.batch_size, dtype=config.dtype)
        for text in texts
    ]


def _summary(
    config: LinearizeConfig,
    error: float,
    rows: Sequence[LayerCalibration],
    scores: dict[str, list[Score]],
    *,
    parameters: int,
    device: torch.device,
) -> dict[str, Any]:
    return {
        "arguments": asdict(config),
        "parameters": parameters,
        "linear_layers": [row.layer for row in rows],
        "transfer_error": error,
        "calibration": [asdict(row) | {"holds": row.holds} for row in rows],
        "stages": {},
        "scores": {name: [asdict(row) for row in found] for name, found in scores.items()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {
            "regla": regla.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _save(out: Path, model: ReGLAForCausalLM, tokenizer: PreTrainedTokenizerBase, summary: dict[str, Any]) -> None:
    """Weights, config, generation config, tokenizer with its chat template, summary and model card."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(model_card(summary), encoding="utf-8")
    _write_summary(out, summary)


def _write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Last of all: a summary with the scores of the trained model says that everything is there."""
    unfinished = out / f".unfinished-{SUMMARY}"
    unfinished.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, out / SUMMARY)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
