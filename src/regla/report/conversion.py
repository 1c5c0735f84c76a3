"""The page of `regla report`: one HTML document without scripts, styles or pictures from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from regla.report import conversion_plots as plots

_STATES = {"original": "original", "converted": "after conversion", "trained": "after training"}
_KINDS = {"linear": "linear attention", "softmax": "softmax attention", "window": "softmax attention over a window"}
_MOST_LAYERS = 10_000  # of a strip of boxes
_NOT_MEASURED = "Not measured: the page was made with --skip-measurements."

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #f4f5f7; margin: 0; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.7em; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2em; margin: 0 0 8px; }
section { background: #fff; border: 1px solid #dfe2e8; border-radius: 8px; padding: 16px 20px; margin: 16px 0; }
p { margin: 8px 0; } .note { color: #596170; font-size: .9em; } .absent { color: #596170; font-style: italic; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.card { background: #fff; border: 1px solid #dfe2e8; border-radius: 8px; padding: 10px 16px; flex: 1 1 150px; }
.card b { display: block; font-size: 1.35em; } .card small { font-size: .6em; font-weight: normal; color: #596170; }
.card span { color: #596170; font-size: .85em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .92em; margin: 8px 0; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid #e6e8ed; text-align: left; vertical-align: top; }
th { color: #596170; font-weight: 600; } .num { text-align: right; font-variant-numeric: tabular-nums; }
svg { display: block; max-width: 100%; height: auto; margin: 8px auto; }
.layers { display: flex; flex-wrap: wrap; gap: 4px; margin: 8px 0; }
.layers span { min-width: 2.1em; padding: 3px 0; text-align: center; border-radius: 4px; font-size: .85em; }
.window { background: #56b4e9; color: #000; }
.linear { background: #d55e00; color: #fff; } .softmax { background: #0072b2; color: #fff; }
.key span { padding: 3px 10px; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; margin: 4px 0 20px; }
.samples div { border-left: 3px solid #dfe2e8; padding-left: 10px; overflow-wrap: anywhere; white-space: pre-wrap; }
.samples b { display: block; color: #596170; font-size: .85em; }
.prompt { background: #f4f5f7; border-radius: 4px; padding: 6px 10px; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: #f4f5f7; border-radius: 4px; padding: 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #596170; }
"""


def conversion_page(
    name: str,
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any] | None,
    command: str | None,
) -> str:
    """The whole document. A part whose figures are missing or of another form says so.

    Args:
        name: of the folder.
        summary: linearize.json.
        config: config.json of the converted model.
        log: records of the training log.
        measured: what `regla.page.measure.measure` found; None: nothing was measured.
        command: what repeats the conversion, if known.
    """
    model, config = _model(summary), {**_as_dict(config.get("original")), **config}
    sections = [
        _section("What was converted", "converted", lambda: _converted(summary, config)),
        _section("Alignment of the layers", "alignment", lambda: _alignment(summary, measured)),
        _section("Training", "training", lambda: _training(summary, log)),
        _section("Teacher and student", "comparison", lambda: _comparison(_of(measured, "comparison"), measured)),
        _section("Forget gates", "gates", lambda: _gates(_of(measured, "gates"))),
        _section("Decoding", "decoding", lambda: _decoding(_of(measured, "decoding"), measured)),
        _section("Samples", "samples", lambda: _samples(_of(measured, "samples"))),
        _section("The command that repeats it", "command", lambda: _repeat(command, summary)),
    ]
    if "layer_choice" in summary:
        sections.insert(3, _section("Choice of layers", "choice", lambda: _choice(summary["layer_choice"])))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(model)}, linearized: {escape(name)}</title><style>{_STYLE}</style></head>\n<body><main>"
        f'<h1>{escape(model)}, linearized</h1><p class="note">Folder {escape(name)}</p>\n'
        f"{_cards(summary, config, measured)}\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


class _Absent(Exception):
    """A part of the page for which there are no figures; says why."""


def _section(title: str, key: str, content: Callable[[], str]) -> str:
    """One part of the page. Files of other versions and damaged ones hold whatever they hold."""
    try:
        body = content()
    except _Absent as absent:
        body = f'<p class="absent">{escape(str(absent))}</p>'
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        body = '<p class="absent">The figures of this part are missing from the folder, or of a form unknown here.</p>'
    return f'<section id="{key}"><h2>{title}</h2>{body}</section>'


def _of(measured: Mapping[str, Any] | None, part: str) -> Any:
    if measured is None:
        raise _Absent(_NOT_MEASURED)
    return measured[part]


def _as_dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _model(summary: Mapping[str, Any]) -> str:
    model = str(summary["arguments"].get("model") or "A model")
    return Path(model).name if Path(model).is_absolute() else model


def _cards(summary: Mapping[str, Any], config: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    """The figures that decide, where they are known."""
    cards: list[tuple[str, str]] = []
    linear, layers = summary.get("linear_layers"), config.get("num_hidden_layers")
    if isinstance(linear, list):
        cards.append((f"{len(linear)} of {layers}" if layers else f"{len(linear)}", "layers linear"))
    if isinstance(summary.get("parameters"), int):
        cards.append((f"{summary['parameters'] / 1e6:,.1f}M", "parameters"))
    tokens = [_tokens(row, summary) for row in summary["stages"].values()]
    if None not in tokens:
        cards.append((f"{sum(filter(None, tokens)):,}", "tokens trained on"))
    if measured is not None:
        gap, error = measured["comparison"]["loss_gap"]
        ratio = math.exp(min(gap, 700.0))
        cards.append((_with_error(ratio, ratio * error, digits=3), "times the teacher's perplexity"))
        cards.append((_with_error(*measured["comparison"]["kl"], digits=3), "KL to the teacher, nats per token"))
    return '<div class="cards">' + "".join(
        f'<div class="card"><b>{_small_error(value)}</b><span>{escape(label)}</span></div>' for value, label in cards
    ) + "</div>"  # fmt: skip


def _small_error(value: str) -> str:
    figure, sign, error = escape(value).partition(" ± ")
    return figure + (f" <small>± {error}</small>" if sign else "")


def _tokens(stage: Any, summary: Mapping[str, Any]) -> int | None:
    """Tokens of a stage; earlier versions recorded its steps alone."""
    try:
        arguments = summary["arguments"]
        return int(stage.get("tokens", stage["steps"] * arguments["batch_size"] * arguments["seq_len"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _converted(summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    linear = [int(number) for number in summary["linear_layers"]]
    windowed = [int(number) for number in _as_dict(config.get("windowed")).get("layers", [])]
    arguments = summary["arguments"]
    layers = config.get("num_hidden_layers")
    strip = ""
    if isinstance(layers, int) and layers <= _MOST_LAYERS:
        kinds = ["linear" if n in linear else "window" if n in windowed else "softmax" for n in range(layers)]
        boxes = "".join(f'<span class="{kind}">{n}</span>' for n, kind in enumerate(kinds))
        names = "".join(f'<span class="{kind}">{_KINDS[kind]}</span>' for kind in _KINDS if kind in kinds)
        strip = f'<div class="layers">{boxes}</div><div class="layers key">{names}</div>'
    mixer = _as_dict(config.get("mixer"))
    kind = str(config.get("model_type", "")).removeprefix("regla_")
    error = summary.get("transfer_error")
    facts = {
        "original": _model(summary) + (f" ({kind})" if kind else ""),
        "class": ", ".join(config.get("architectures") or []),
        "update rule": mixer.get("update_rule"),
        "feature map": mixer.get("feature_map"),
        "gate": mixer.get("gate"),
        "window branch": _branch(mixer),
        "self-check": None if error is None else f"logits reproduced to {error:.1e} of the largest",
        "training": arguments.get("preset"),
        "state": None if "trained" in summary["scores"] else "not trained, or not trained to the end",
        "computed on": summary.get("device"),
        "versions": ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items()),
    }
    rows = [[name, str(value)] for name, value in facts.items() if value]
    return strip + _table(["", ""], rows, numbers_from=2)


def _branch(mixer: Mapping[str, Any]) -> str | None:
    """What a window branch sees; None: there is none."""
    tokens, sinks, dropout = (mixer.get(f"window_{name}") for name in ("branch", "sinks", "dropout"))
    if not tokens:
        return None
    return f"softmax over the last {tokens} tokens and the first {sinks}" + (f", dropout {dropout}" if dropout else "")


def _alignment(summary: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    parts = []
    rows = summary.get("calibration")
    if rows:
        failing = [str(row["layer"]) for row in rows if not row.get("holds", True)]
        contract = (
            f"The contract fails in layers {', '.join(failing)}." if failing else "The contract holds in every layer."
        )
        parts.append(
            plots.calibration_figure(rows)
            + '<p class="note">Before training, on tokens that the calibration did not see. Contract: at least a '
            f"quarter of the features in use, and KL below that of uniform attention. {contract}</p>"
        )
    errors = {} if measured is None else measured["alignment"]
    if errors:
        parts.append(
            plots.alignment_figure(errors)
            + '<p class="note">|mixer(x) - y|² / |y|² of the model as it is now, on held-out text: x is what goes into '
            "the teacher's attention, y what comes out. After distillation layers may differ from the teacher's and "
            "still predict the same.</p>"
        )
    if not parts:
        raise _Absent("Nothing was calibrated." + (f" {_NOT_MEASURED}" if measured is None else ""))
    return "".join(parts)


def _training(summary: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in log:
        step, loss = record.get("step"), record.get("loss")
        if all(isinstance(value, int | float) and math.isfinite(value) for value in (step, loss)):
            curves.setdefault(str(record.get("stage", "training")), []).append((step, loss))  # type: ignore[arg-type]
    if curves:
        parts.append(plots.training_figure(curves))
        parts.append(
            '<p class="note">Loss of attention transfer: |mixer(x) - y|² / |y|². Loss of distillation: '
            "KL(teacher || student). Thick lines: the mean of 20 steps.</p>"
        )
    if summary["stages"]:
        body = [
            [
                stage,
                f"{row['steps']:,}",
                "-" if (tokens := _tokens(row, summary)) is None else f"{tokens:,}",
                f"{row['seconds']:,.0f} s",
                f"{row['first_loss']:.3f}",
                f"{row['last_loss']:.3f}",
            ]
            for stage, row in summary["stages"].items()
        ]
        parts.append(_table(["stage", "steps", "tokens", "time", "loss at first", "at last"], body))
    else:
        parts.append('<p class="absent">It was not trained.</p>')
    scores = summary["scores"]
    if scores:
        names = [_STATES.get(state, state) for state in scores]
        body = [
            [Path(of_source[0]["name"]).name, f"{of_source[0]['tokens']:,}"]
            + [f"{row['perplexity']:,.2f}" for row in of_source]
            for of_source in zip(*scores.values(), strict=True)
        ]
        parts.append("<p>Perplexity of the validation text, as the conversion measured it:</p>")
        parts.append(_table(["source", "tokens", *names], body))
    divergences = summary.get("divergence")
    if divergences:
        body = [
            [_STATES.get(state, state), _with_error(row["mean"], row["se"], digits=4)]
            for state, row in divergences.items()
        ]
        parts.append(_table(["KL to the original, nats per token", ""], body))
    return "".join(parts)


def _choice(choice: Mapping[str, Any]) -> str:
    kept, rows = [int(number) for number in choice["kept"]], choice["ranking"]
    header = ["layer", "KL won", "recall won, nats", "score", "stays"]
    body = [
        [
            str(row["layer"]),
            _with_error(row["kl_gain"], row["kl_gain_se"], digits=4),
            _with_error(row["recall_gain"], row["recall_gain_se"], digits=4),
            f"{row['score']:.3f}",
            "softmax" if row["layer"] in kept else "linear",
        ]
        for row in rows
    ]
    ranking = f"<details><summary>The ranking</summary>{_table(header, body, numbers_from=0)}</details>"
    return plots.choice_figure(rows, kept) + '<p class="note">Bars: ± 2 standard errors.</p>' + ranking


def _comparison(found: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    def perplexity(loss: float, error: float) -> str:
        return _with_error(math.exp(min(loss, 700.0)), math.exp(min(loss, 700.0)) * error, digits=2)

    gap, gap_error = found["loss_gap"]
    ratio = math.exp(min(gap, 700.0))
    body = [
        [
            "perplexity",
            perplexity(*found["teacher_loss"]),
            perplexity(*found["student_loss"]),
            _with_error(ratio, ratio * gap_error, digits=3) + " times",
        ],
        [
            "loss, nats per token",
            *(_with_error(*found[f"{name}_loss"], digits=3) for name in ("teacher", "student")),
            _with_error(gap, gap_error, digits=3, sign=True),
        ],
        [
            "next token right",
            *(_with_error(*found[f"{name}_right"], digits=1, share=True) for name in ("teacher", "student")),
            _with_error(*found["right_gap"], digits=1, share=True, sign=True),
        ],
        ["KL(teacher || student), nats per token", "", _with_error(*found["kl"], digits=4), ""],
        ["same likeliest token", "", _with_error(*found["same"], digits=1, share=True), ""],
    ]
    assert measured is not None
    note = (
        f"± standard error over {found['sequences']} sequences of {found['length']} tokens, of differences paired by "
        f"sequence. Text: {measured['text']}."
    )
    return (
        _table(["", "teacher", "student", "student to teacher"], body)
        + f'<p class="note">{escape(note)}</p>'
        + plots.position_figure(found["positions"])
    )


def _gates(layers: Sequence[Mapping[str, Any]]) -> str:
    if not any(layer["half_lives"] for layer in layers):
        raise _Absent("The model has no layers with forget gates.")
    body = []
    for layer in layers:
        for axis, values in layer["half_lives"].items():
            features = layer["effective_features"]
            body.append(
                [
                    str(layer["layer"]),
                    axis,
                    f"{min(values):,.1f} to {max(values):,.1f}",
                    f"{layer['saturated_low'][axis]:.1%}",
                    f"{layer['saturated_high'][axis]:.1%}",
                    f"{min(features):.1f} to {max(features):.1f} of {layer['key_dim']}" if features else "-",
                ]
            )
    header = ["layer", "axis", "half-life of heads, tokens", "F < 0.01", "F > 0.99", "key features in use"]
    return (
        plots.gates_figure(layers)
        + '<p class="note">The half-life of a channel is log 2 over its mean -log F, that of a head the median of its '
        "channels. A gate is saturated where F is below 0.01 or above 0.99.</p>"
        f"<details><summary>By layer</summary>{_table(header, body, numbers_from=2)}</details>"
    )


def _decoding(rows: Mapping[str, Sequence[Mapping[str, Any]]], measured: Mapping[str, Any] | None) -> str:
    body = []
    for theirs, ours in zip(rows["teacher"], rows["student"], strict=True):
        cells = (f(row) for f in (_milliseconds, _kibibytes) for row in (theirs, ours))
        body.append([f"{theirs['context']:,}", *cells])
    header = ["context", "teacher, ms", "student, ms", "teacher, KiB", "student, KiB"]
    assert measured is not None
    note = f"Median time of one more token, one sequence, float32, on {measured['device']}; bytes of the cache."
    return plots.decoding_figure(rows) + _table(header, body, numbers_from=0) + f'<p class="note">{escape(note)}</p>'


def _milliseconds(row: Mapping[str, Any]) -> str:
    return f"{row['milliseconds']:.2f}"


def _kibibytes(row: Mapping[str, Any]) -> str:
    return f"{row['cache_bytes'] / 1024:,.0f}"


def _samples(rows: Sequence[Mapping[str, str]]) -> str:
    parts = ['<p class="note">Likeliest token at each step, after beginnings from held-out text.</p>']
    for row in rows:
        texts = "".join(
            f"<div><b>{title}</b>{escape(row[key].strip())}</div>"
            for key, title in (("teacher", "Teacher"), ("student", "Student"), ("text", "The text itself"))
        )
        parts.append(f'<div class="prompt">{escape(row["prompt"].strip())}…</div><div class="samples">{texts}</div>')
    return "".join(parts)


def _repeat(command: str | None, summary: Mapping[str, Any]) -> str:
    if command is None:
        raise _Absent("linearize.json does not hold the arguments of the conversion.")
    overrides = summary["arguments"].get("overrides")
    note = f"<p>The file of --config holds <code>{escape(str(overrides))}</code>.</p>" if overrides else ""
    return f"<pre><code>{escape(command)}</code></pre>{note}"


def _with_error(value: float, error: float, *, digits: int, share: bool = False, sign: bool = False) -> str:
    """A value with its standard error, where that is known; `share`: in percent."""
    scale, end = (100, " %") if share else (1, "")
    text = f"{value * scale:{'+' if sign else ''},.{digits}f}"
    if isinstance(error, int | float) and math.isfinite(error):
        text += f" ± {error * scale:,.{digits}f}"
    return text + end


def _table(header: Sequence[str], body: Sequence[Sequence[str]], *, numbers_from: int = 1) -> str:
    """Columns from `numbers_from` on are set to the right."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="num"' if index >= numbers_from else "" for index in range(len(cells))]
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))

    head = f"<thead><tr>{row(header, 'th')}</tr></thead>" if any(header) else ""
    lines = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in body)
    return f'<div class="scroll"><table>{head}<tbody>{lines}</tbody></table></div>'
