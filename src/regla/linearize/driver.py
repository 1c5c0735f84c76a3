"""`regla linearize`: from a pretrained softmax model to a linear one, in the order of its stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from regla.data.sources import Source
from regla.linearize.adapters import add_adapters, check_adapters, merge_adapters
from regla.linearize.budget import budget, seconds_per_sequence, training_time
from regla.linearize.calibration import calibrate, calibration_table
from regla.linearize.choice import choice_table, keep_softmax, known_choice, rank_layers
from regla.linearize.config import CALIBRATION_LENGTH, TRANSFER, LinearizeConfig
from regla.linearize.convert import chosen_count
from regla.linearize.divergence import divergence
from regla.linearize.load import check_original, load_config, load_original, load_tokenizer
from regla.linearize.origin import origin_of
from regla.linearize.resume import check_out
from regla.linearize.stages import Stage, plan_stages, remove_checkpoints, resumed, run_stages
from regla.linearize.student import Student, make_student, student_config
from regla.linearize.summary import divergence_line, new_summary, read_summary, save, score_table, write_summary
from regla.linearize.texts import Texts, encode_texts, read_texts
from regla.linearize.transfer import check_transfer
from regla.models.families import last_position
from regla.models.student import linear_attention
from regla.runtime.device import autocast, float32_products, out_of_memory, pick_device
from regla.runtime.errors import OptionError, OptionMemoryError
from regla.runtime.files import alone_in, new_folder_alone, remove_unfinished
from regla.runtime.processes import check_one_process
from regla.runtime.progress import CALMER
from regla.runtime.signals import Interrupted
from regla.train.loop import crops

_DIVERGENCE_SEQUENCES = 64  # of validation text, on which predictions are compared


@float32_products()
def linearize(model: str, **options: Any) -> dict[str, Any] | None:
    """Convert a pretrained model, prove it, calibrate it, train it, and save it with everything that belongs to it.

    1. Weights move over; softmax through them must reproduce the original's logits (`check_transfer`).
    2. The feature map, the gates and the output norms are fitted to the original's attention (`calibrate`).
    3. Attention transfer: each new mixer learns to give what the original's attention gives for the same input. With
       keep="auto:N" the N layers are then chosen that win most as softmax attention (`regla.linearize.choice`).
    4. Distillation: the whole model learns the original's next-token distribution.
    5. With `long_tokens` it goes on learning that from longer sequences.

    With `init` a converted model takes the place of the weights that move over, and only layers that become linear now
    go through 1 to 3.

    The converted model is saved before training, too. Ctrl-C and SIGTERM end the training after the current step; a
    checkpoint and the model as it is then are saved, and Interrupted is raised. With resume="latest" training goes on
    from the last checkpoint, and the figures of 1 and 2 are those in the folder.

    >>> linearize("HuggingFaceTB/SmolLM2-135M", out="runs/smol", keep="every-4", tokens="60M")  # doctest: +SKIP

    Args:
        model: a name on the Hugging Face hub, a folder or a .gguf file.
        options: by the names of `regla.linearize.config.LinearizeConfig`, which describes each; such as `out`, `keep`,
            `mixer`, `preset`, `tokens`, `data` and `resume`.

    Returns:
        What `linearize.json` in the folder holds; None after a dry run.

    Raises:
        ValueError: whatever can be wrong with the input, before anything is written.
        FloatingPointError: a loss or gradient that is not finite; the folder holds the model as it was saved before.
        MemoryError: there is too little memory; likewise.
        OSError: a checkpoint cannot be written; those before it are untouched.
    """
    config = LinearizeConfig(model=model, **options)
    check_one_process("linearize")
    with ExitStack() as held:
        try:
            return _linearize(config, held)
        except BaseException as error:
            if not out_of_memory(error):
                raise
            raise OptionMemoryError(
                "The memory of the device is full; lower {batch_size}, {seq_len} or {calibration_tokens}, or give "
                "{preset} lora, which trains fewer weights."
            ) from error


def _linearize(config: LinearizeConfig, held: ExitStack) -> dict[str, Any] | None:
    """Check the inputs, then plan or run; `held` keeps the folder."""
    if config.out is not None and config.resume is not None and Path(config.out).is_dir():
        held.enter_context(alone_in(config.out, "conversion"))
    check_out(config)
    device = pick_device(config.device)
    if config.preset == "lora":
        check_adapters()
    original_config = load_config(config.model)
    check_original(config.model, original_config)
    planned = student_config(config, original_config)
    limit = last_position(original_config)
    lengths = {"seq_len": config.seq_len, "long_seq_len": max((stage.seq_len for stage in config.stages), default=0)}
    for name, length in lengths.items():
        if limit is not None and length > limit:
            raise OptionError(
                f"{{{name}}} is {{value}}, but {{model}} has learnt positions for {{limit}} tokens; lower {{{name}}}.",
                value=length,
                model=config.model,
                limit=limit,
            )
    sources = read_texts(config)
    if config.dry_run:
        texts = encode_texts(config, sources, load_tokenizer(config.model, original_config))
        _print_plan(config, original_config, planned, texts, device)
        return None
    return _convert(config, sources, device, held)


def _convert(
    config: LinearizeConfig,
    sources: tuple[Sequence[Source], Sequence[Source]],
    device: torch.device,
    held: ExitStack,
) -> dict[str, Any]:
    """The run itself, its inputs checked."""
    original, tokenizer = load_original(config.model)
    texts = encode_texts(config, sources, tokenizer)
    stages = plan_stages(config, texts.train_hash)
    student = make_student(config, original)
    assert config.out is not None
    out = Path(config.out)
    known = _known(out, texts)
    goes_on = resumed(stages)
    reused = goes_on and {"original", "converted"} <= known["scores"].keys()
    error = known["transfer_error"] if reused else _prove(config, student)
    model, new = student.model.to(device), student.new
    del student  # the weights that it came from
    original, tokens_N = original.to(device), torch.from_numpy(texts.train_N).to(device)
    rows = known["calibration"] if reused else _calibrate(config, original, model, new, tokens_N)
    if out.is_dir() and config.resume is not None:
        remove_unfinished(out)
    else:
        held.enter_context(new_folder_alone(out, "conversion"))
    summary = new_summary(config, texts=texts.hash, device=device, origin=origin_of(config.model)) | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "linear_layers": sorted(linear_attention(model)),
        "transfer_error": error,
        "calibration": rows,
        "stages": known["stages"] if goes_on else {},
        "divergence": {},
    }
    if goes_on and "layer_choice" in known:
        summary["layer_choice"] = known["layer_choice"]
    for state, scored in (("original", original), ("converted", model)):
        stored = known["scores"].get(state)
        summary["scores"][state] = stored or [asdict(row) for row in texts.scores(scored, config)]
        if state == "converted":
            summary["divergence"][state] = known.get("divergence", {}).get(state) or _divergence(
                config, original, model, texts
            )
        write_summary(out, summary)
    if not goes_on:
        save(out, model, tokenizer, summary)
    if stages:
        _train(config, original, model, new, tokens_N, stages, texts, summary, tokenizer)
    print(score_table(summary["scores"]))
    print(divergence_line(summary["divergence"]))
    untrained = "; its gates are untrained: add --tokens, or train it further" if new and not stages else ""
    print(f"Saved to {out}{untrained}.")
    return summary


def _train(
    config: LinearizeConfig,
    original: PreTrainedModel,
    model: PreTrainedModel,
    new: Sequence[int],
    tokens_N: Tensor,
    stages: Sequence[Stage],
    texts: Texts,
    summary: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The stages, the figures of the trained model, and the folder."""
    assert config.out is not None
    out = Path(config.out)
    if config.preset == "lora":
        add_adapters(original, model, seed=config.seed)

    def after_transfer() -> None:
        if config.chooses_layers:
            begun = any(stage.checkpoints.resumed or stage.complete for stage in stages if stage.name != TRANSFER)
            _choose_layers(config, original, model, texts, summary, known=begun or "layer_choice" in summary)

    signal = run_stages(
        original, model, new, tokens_N, stages, config=config, summary=summary, after_transfer=after_transfer
    )
    if config.preset == "lora":
        merge_adapters(model)
    if signal is None:
        summary["scores"]["trained"] = [asdict(row) for row in texts.scores(model, config)]
        if not all(math.isfinite(row["loss"]) for row in summary["scores"]["trained"]):
            raise FloatingPointError(f"The validation loss of the trained model is not finite; {CALMER}.")
        summary["divergence"]["trained"] = _divergence(config, original, model, texts)
    save(out, model, tokenizer, summary)
    if signal is not None:
        print(f"Interrupted; the model as it is now is in {out}. --resume goes on from the last checkpoint.")
        raise Interrupted(signal)
    remove_checkpoints(stages)


def _choose_layers(
    config: LinearizeConfig,
    original: PreTrainedModel,
    model: PreTrainedModel,
    texts: Texts,
    summary: dict[str, Any],
    *,
    known: bool,
) -> None:
    """Give the layers that win most their softmax attention back: those that a run chose before, if it did."""
    assert config.out is not None and isinstance(config.keep, str)
    if not known:
        windows_BT = texts.windows(_DIVERGENCE_SEQUENCES, _scored_length(config, original))
        rows = rank_layers(
            original, model, windows_BT, batch_size=config.batch_size, dtype=config.dtype, seed=config.seed
        )
        count = chosen_count(config.keep, original.config.num_hidden_layers)
        print(choice_table(rows, count))
        summary["layer_choice"] = {
            "kept": sorted(row.layer for row in rows[:count]),
            "ranking": [asdict(row) for row in rows],
        }
    keep_softmax(original, model, known_choice(summary))
    summary["linear_layers"] = sorted(linear_attention(model))
    summary["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    write_summary(Path(config.out), summary)


def _divergence(
    config: LinearizeConfig, original: PreTrainedModel, model: PreTrainedModel, texts: Texts
) -> dict[str, Any]:
    windows_BT = texts.windows(_DIVERGENCE_SEQUENCES, _scored_length(config, original))
    return asdict(divergence(original, model, windows_BT, batch_size=config.batch_size, dtype=config.dtype))


def _scored_length(config: LinearizeConfig, original: PreTrainedModel) -> int:
    return min(config.seq_len, last_position(original.config) or config.seq_len)


def _known(out: Path, texts: Texts) -> dict[str, Any]:
    """The summary in the folder, without figures unless they are of these texts; `check_out` compared the options."""
    summary = read_summary(out)
    if summary.get("texts") != texts.hash:
        return {"scores": {}, "stages": summary.get("stages", {})}
    return summary


def _prove(config: LinearizeConfig, student: Student) -> float | None:
    """Check the transfer and say what came out; None where no layer is new, so that nothing was transferred."""
    layers, linear = student.model.config.num_hidden_layers, len(linear_attention(student.model))
    if not student.new:
        windowed = student.model.config.windowed
        what = f"{len(windowed['layers'])} of them cut to a window" if windowed else "none is new"
        print(f"{config.init or config.model}: {layers} layers, {linear} of them ReGLA; {what}")
        return None
    error = check_transfer(student.before, student.model, layers=student.new)
    print(
        f"{config.init or config.model}: {layers} layers, {linear} of them now ReGLA; softmax through the "
        f"transferred weights reproduces the original's logits to {error:.1e} of the largest"
    )
    return error


def _calibrate(
    config: LinearizeConfig, original: PreTrainedModel, model: PreTrainedModel, new: Sequence[int], tokens_N: Tensor
) -> list[dict[str, Any]]:
    """Calibrate the new layers and print their figures, which are returned."""
    if not new or not config.calibration_tokens:
        return []
    length = min(CALIBRATION_LENGTH, last_position(original.config) or CALIBRATION_LENGTH)
    sequences = config.calibration_tokens // length
    crops_BT = crops(tokens_N, seed=config.seed, batch=0, batch_size=sequences, length=length)
    gates = config.gate_start if isinstance(config.gate_start, str) else None
    rows = calibrate(original, model, crops_BT, layers=new, gates=gates)
    print(calibration_table(rows))
    failing = [row for row in rows if not row.holds]
    if failing:
        raise OptionError(
            "The calibration contract fails in {count} of {layers} layers, first in layer {layer}: {failure}; name "
            "such layers in {keep}, give more {calibration_tokens}, or do not calibrate ({calibration_tokens} 0).",
            count=len(failing),
            layers=len(rows),
            layer=failing[0].layer,
            failure=failing[0].failure,
        )
    print(
        f"Calibrated on {sequences // 2 * length:,} tokens and checked on others; the contract holds (a quarter of the "
        "features effective, KL below that of uniform attention)"
    )
    return [asdict(row) | {"holds": row.holds} for row in rows]


def _print_plan(
    config: LinearizeConfig, original: PreTrainedConfig, planned: PreTrainedConfig, texts: Texts, device: torch.device
) -> None:
    """Sizes and costs of a run whose inputs were all found."""
    stages = config.stages
    print(budget(original, planned, stages, batch_size=config.batch_size, seq_len=config.seq_len))
    scored = sum(len(text.ids) for text in texts.valid)
    print(f"text              {len(texts.train_N):,} tokens to train on, {scored:,} to score")
    if stages:
        tokens = sum(stage.tokens for stage in stages)
        print(f"epochs            {tokens / len(texts.train_N):.2g} of that text")
        with autocast(device, config.dtype):
            seconds = seconds_per_sequence(planned, device=device, batch_size=config.batch_size, seq_len=config.seq_len)
        print(training_time(seconds, sequences=tokens // config.seq_len, device=device))
