"""`regla eval`: what of a model is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regla.data.records import TEXT_FIELD
from regla.runtime.errors import OptionError
from regla.runtime.files import check_writable, write_json
from regla.runtime.install import require


def evaluate_models(
    models: Sequence[str],
    *,
    tasks: Sequence[str] = (),
    num_fewshot: int | None = None,
    data_dir: str | None = None,
    compare_lm_eval: bool = False,
    probes: Sequence[str] | None = None,
    limit: int | None = None,
    out: str | None = None,
    data: Sequence[str] = (),
    text_field: str = TEXT_FIELD,
    json_file: str | None = None,
    seq_len: int | None = None,
    by_position: bool = False,
    stream: int | None = None,
    effective_context: bool = False,
    reset_at_documents: bool = False,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "float32",
    **plan: Any,
) -> None:
    """Tasks of lm-eval if some are named, probes of memory likewise, and perplexity without either (or of `data`, with
    tasks alone); prints tables.

    Args:
        models: folders, .gguf files or names on the hub.
        tasks, num_fewshot, data_dir, compare_lm_eval: see `regla.eval.harness.evaluate_tasks`.
        probes, plan: see `regla.eval.probes.run.Plan`.
        limit, out: of tasks and probes.
        data, text_field: texts to score, and to hide the probes' facts in.
        seq_len, by_position, stream, effective_context, reset_at_documents: see `regla.eval.measure.measure`.
        json_file: for the figures of perplexity; a list of them for several models.
        batch_size, device, dtype: of all.
    """
    given = {
        "tasks": {"num_fewshot": num_fewshot, "data_dir": data_dir, "compare_lm_eval": compare_lm_eval or None},
        "probes": plan,
        "tasks} or {probes": {"limit": limit, "out": out},
    }
    wanted = {"tasks": bool(tasks), "probes": probes is not None}
    wanted["tasks} or {probes"] = any(wanted.values())
    for of, options in given.items():
        for name, value in options.items():
            if value is not None and not wanted[of]:
                raise OptionError(f"{{{name}}} goes with {{{of}}}; name some, or leave it out.")
    if json_file is not None:
        check_writable(json_file)
    where: dict[str, Any] = {"batch_size": batch_size, "device": device, "dtype": dtype}
    if tasks:
        require("lm_eval", "Tasks of lm-eval need", "accelerate")
        from regla.eval.harness import evaluate_tasks

        evaluate_tasks(
            models,
            tasks,
            num_fewshot=num_fewshot,
            data_dir=data_dir,
            limit=limit,
            out=out,
            compare_lm_eval=compare_lm_eval,
            **where,
        )
    if probes is not None:
        from regla.eval.probes.command import probe
        from regla.eval.probes.run import Plan

        if limit is not None:
            plan["limit"] = limit
        probe(models, Plan(probes=tuple(probes), **plan), data=data, text_field=text_field, out=out, **where)
    elif data or not tasks:
        from regla.eval.measure import measure

        figures = []
        for model in models:
            if len(models) > 1:
                print(f"{model}:")
            windows: dict[str, Any] = {"seq_len": seq_len, "by_position": by_position, "stream": stream}
            windows |= {"effective_context": effective_context, "reset_at_documents": reset_at_documents}
            figures.append(measure(model, data=data, text_field=text_field, **windows, **where)[1])
        if json_file is not None:
            write_json(json_file, figures[0] if len(figures) == 1 else figures)
