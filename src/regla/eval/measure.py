"""The perplexity of one model on files: read, score, print (`regla eval` without tasks and probes)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regla.data.records import TEXT_FIELD
from regla.data.selection import read_sources, split_validation
from regla.data.sources import encode_source
from regla.data.tokenizer import end_of_text_id, first_id, load_tokenizer
from regla.eval.context import context_table
from regla.eval.context import effective_context as find
from regla.eval.perplexity import Score, beyond_the_model, mean_score, position_table, score, score_stream, table
from regla.models.folders import check_ids, load_model
from regla.runtime.device import pick_device
from regla.runtime.errors import OptionError, check_count
from regla.runtime.files import check_writable, write_json
from regla.runtime.memory import memory_used

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONGEST_DEFAULT = 1024
_SETTLED = 4096  # tokens of a stream, behind which the memory of linear layers does not grow


def evaluate(
    model: str | Path,
    *,
    data: Sequence[str | Path] = (),
    text_field: str = TEXT_FIELD,
    seq_len: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "float32",
    by_position: bool = False,
    stream: int | None = None,
    effective_context: bool = False,
    reset_at_documents: bool = False,
    json_file: str | Path | None = None,
) -> list[Score]:
    """`measure`, and its figures in `json_file`, too; one score for each source."""
    if json_file is not None:
        check_writable(json_file)
    scores, figures = measure(
        model,
        data=data,
        text_field=text_field,
        seq_len=seq_len,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        by_position=by_position,
        stream=stream,
        effective_context=effective_context,
        reset_at_documents=reset_at_documents,
    )
    if json_file is not None:
        write_json(json_file, figures)
    return scores


def measure(
    model: str | Path,
    *,
    data: Sequence[str | Path] = (),
    text_field: str = TEXT_FIELD,
    seq_len: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "float32",
    by_position: bool = False,
    stream: int | None = None,
    effective_context: bool = False,
    reset_at_documents: bool = False,
) -> tuple[list[Score], dict[str, Any]]:
    """Score a model on each file of `data`, by default on the held-out tenth of the embedded text, and print a table.

    Args:
        model: a folder, a .gguf file, or a name on the Hugging Face hub.
        data: text, records or token files.
        text_field: name of the text in a record.
        seq_len: tokens of a window. None: the model's own length, at most 1024.
        batch_size: windows at a time.
        device: auto, cpu or cuda.
        dtype: of matrix products.
        by_position: print a second table, see `position_scores`.
        stream: score the first so many tokens of every source as one sequence, in chunks of `seq_len`, see
            `score_stream`.
        effective_context: say how much context the model uses, too, in windows of `seq_len`, see
            `regla.eval.context`.
        reset_at_documents: tokens of a window see nothing of the documents before theirs.

    Returns:
        One score for each source; and all figures, for JSON.

    Raises:
        ValueError: whatever can be wrong with the input, before anything is scored.
    """
    for name, value in (("seq_len", seq_len), ("batch_size", batch_size), ("stream", stream)):
        check_count(name, value)
    if reset_at_documents and (stream is not None or effective_context):
        raise OptionError(
            "{reset_at_documents} is of windows, and goes neither with {stream} nor with {effective_context}; leave "
            "one out."
        )
    where = pick_device(device)
    sources = read_sources(data, text_field) if data else split_validation(read_sources([]))[1]
    loaded, tokenizer = load_model(model, where), load_tokenizer(model)
    length = seq_len or _window(loaded)
    first = first_id(tokenizer)
    texts = [encode_source(source, tokenizer) for source in sources]
    for text in texts:
        check_ids(loaded, [first, int(text.ids.max())], f"The tokens of {text.name}")
    memory: dict[int, int] = {}

    def watch(tokens: int) -> None:
        if tokens >= _SETTLED and (used := memory_used(loaded.device)) is not None:
            memory[tokens] = used

    scores = []
    for text in texts:
        if stream is None:
            options: dict[str, Any] = {"seq_len": length, "batch_size": batch_size}
            options["reset_at"] = end_of_text_id(tokenizer) if reset_at_documents else None
            scored = score(loaded, text, first=first, dtype=dtype, by_position=by_position, **options)
        else:
            part = text.start(stream, tokenizer)
            scored = score_stream(
                loaded, part, first=first, chunk=length, dtype=dtype, by_position=by_position, watch=watch
            )
        scores.append(scored)
    print(table(scores))
    if by_position:
        print("\n" + position_table(scores))
    if memory:
        first_tokens, last_tokens = min(memory), max(memory)
        print(
            f"\nMemory in use: {memory[first_tokens] / 2**20:,.0f} MiB after {first_tokens:,} tokens, "
            f"{max(memory.values()) / 2**20:,.0f} MiB at most, {memory[last_tokens] / 2**20:,.0f} MiB after "
            f"{last_tokens:,}."
        )
    found = None
    if effective_context:
        found = find(loaded, texts, first=first, seq_len=length, batch_size=batch_size, dtype=dtype)
        print("\n" + context_table(found))
    context = min(length if stream is None else stream, max(len(text.ids) for text in texts))
    if (note := beyond_the_model(loaded, context)) is not None:
        print("\n" + note)
    figures = {
        "model": str(model),
        "seq_len": length,
        "stream": stream,
        "reset_at_documents": reset_at_documents,
        "max_position_embeddings": getattr(loaded.config, "max_position_embeddings", None),
        "device": where.type,
        "dtype": dtype,
        "sources": [asdict(score) for score in scores],
        "mean": asdict(mean_score(scores)),
        "memory_bytes": {tokens: memory[tokens] for tokens in (min(memory), max(memory))} if memory else None,
        "effective_context": None if found is None else asdict(found),
    }
    return scores, figures


def _window(model: PreTrainedModel) -> int:
    """The model's own length, at most _LONGEST_DEFAULT."""
    own = getattr(model.config, "max_position_embeddings", None)
    return min(own, _LONGEST_DEFAULT) if isinstance(own, int) and own > 0 else _LONGEST_DEFAULT
