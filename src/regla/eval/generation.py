"""Text from a trained model: one prompt printed as it comes, or many in batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from regla.data.tokenizer import end_of_text_id, first_id, load_tokenizer
from regla.models import states
from regla.models.cache import CACHE
from regla.models.folders import check_ids, load_model
from regla.runtime.device import float32_products, pick_device
from regla.runtime.errors import OptionError, check_count, check_number, check_seed
from regla.runtime.files import check_new_file
from regla.runtime.reading import check_text, read_utf8

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COLDEST = 1e-6  # below it sampling is the likeliest token


@float32_products()
def generate(
    model: str | Path,
    prompt: str | None = None,
    *,
    load_state: str | Path | None = None,
    save_state: str | Path | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Print `prompt` and what a model (a folder, a .gguf file or a name on the hub) writes after it, token by token.

    It ends after `max_new_tokens` tokens, or before if the model ends the text. `temperature` 0 takes the likeliest
    token every time; otherwise one of the `top_k` likeliest (0: of all) is drawn, repeatably for a seed.

    `load_state`: a file of a text's state; `prompt`, which may be left out, continues that text, and only what is new
    is printed. `save_state`: a new file for the state of the whole text at the end; `max_new_tokens` may then be 0. See
    `regla.models.states`.
    """
    sampling = _sampling(max_new_tokens, temperature, top_k, seed, least=1 if save_state is None else 0)
    if prompt is None and load_state is None:
        raise OptionError("There is no text to continue; give {prompt}, {prompts_file} or {load_state}.")
    check_text(prompt or "", "The prompt")
    if save_state is not None:
        check_new_file(save_state)
    where = pick_device(device)
    loaded, tokenizer = load_model(model, where), load_tokenizer(model)
    text = _begin(loaded, tokenizer, prompt, load_state)
    if text.input_ids.shape[1] + max_new_tokens < 2:  # all but the last token are read
        raise OptionError(
            "{prompt} has {found} token, and a state is of two tokens or more; give a longer {prompt}.", found=1
        )
    arguments = text.arguments()
    if load_state is None and save_state is None:
        del arguments[CACHE]  # the model's own choice, which may be of another kind
    if load_state is not None:
        print(prompt or "", end="", flush=True)
    torch.manual_seed(seed)
    if max_new_tokens:
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=load_state is not None, skip_special_tokens=True)
        output_1L = loaded.generate(**arguments, streamer=streamer, **sampling)
        text = text._replace(input_ids=output_1L, attention_mask=torch.ones_like(output_1L))
    else:
        _read_all_but_the_last(loaded, text)
    if save_state is not None:
        states.save_state(save_state, loaded, text.cache, text.input_ids)


def _begin(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str | None, file: str | Path | None
) -> states.SavedState:
    """The text to continue, with its state from `file` or an empty one."""
    if file is None:
        ids_1T = torch.tensor([_ids(model, tokenizer, prompt or "")], device=model.device)
        return states.SavedState(states.empty_cache(model), ids_1T, torch.ones_like(ids_1T))
    state = states.load_state(file, model)
    if len(state.input_ids) != 1 or not bool(state.attention_mask.all()):
        raise ValueError(
            f"{file} holds {len(state.input_ids)} texts or padding; continue it with load_state in Python."
        )
    more = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    if more:
        check_ids(model, more, "The tokens of the prompt")
        ids_1L = torch.cat([state.input_ids, state.input_ids.new_tensor([more])], 1)
        state = state._replace(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L))
    if state.input_ids.shape[1] == state.cache.get_seq_length():
        raise OptionError("{file} holds no token that is still to be read; give a text with {prompt}.", file=file)
    return state


def _read_all_but_the_last(model: PreTrainedModel, text: states.SavedState) -> None:
    """Bring the cache to where `generate` leaves it, before the last token."""
    rest_1T = text.input_ids[:, int(text.cache.get_seq_length()) : -1]
    if rest_1T.shape[1]:
        with torch.no_grad():
            model(input_ids=rest_1T, use_cache=True, logits_to_keep=1, **{CACHE: text.cache})


@float32_products()
def generate_batch(
    model: str | Path,
    prompts_file: str | Path,
    *,
    batch_size: int = 8,
    as_json: bool = False,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: str = "auto",
) -> list[str]:
    """Print every prompt of a file with its continuation, in order, and return the continuations.

    `prompts_file`: UTF-8, one prompt a line, empty lines are passed over. `batch_size` prompts run at a time, padded on
    the left, which changes no logit. `as_json`: one object {"prompt", "continuation"} a line. The rest is `generate`'s.
    """
    sampling = _sampling(max_new_tokens, temperature, top_k, seed)
    check_count("batch_size", batch_size)
    prompts = read_prompts(prompts_file)
    where = pick_device(device)
    loaded, tokenizer = load_model(model, where), load_tokenizer(model)
    padding = end_of_text_id(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    torch.manual_seed(seed)
    continuations: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        rows = [_ids(loaded, tokenizer, prompt) for prompt in batch]
        longest = max(map(len, rows))
        input_ids_BT = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=where)
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=where)
        output_BL = loaded.generate(input_ids_BT, attention_mask=mask_BT, pad_token_id=padding, **sampling)
        texts = tokenizer.batch_decode(output_BL[:, longest:], skip_special_tokens=True)
        for prompt, text in zip(batch, texts, strict=True):
            print(
                json.dumps({"prompt": prompt, "continuation": text}, ensure_ascii=False) if as_json else prompt + text
            )
        continuations.extend(texts)
    return continuations


def read_prompts(file: str | Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank."""
    text = read_utf8(file, "a file with one prompt a line")
    prompts = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompt; write one a line.")
    return prompts


def _ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A text begins with the beginning-of-text token if it begins with nothing else."""
    ids = tokenizer(prompt)["input_ids"] or [first_id(tokenizer)]
    check_ids(model, ids, "The tokens of the prompt")
    return ids


def _sampling(max_new_tokens: int, temperature: float, top_k: int, seed: int, *, least: int = 1) -> dict[str, Any]:
    """Arguments of transformers' `generate`, checked."""
    check_count("max_new_tokens", max_new_tokens, least=least)
    check_number("temperature", temperature, zero=True)
    check_count("top_k", top_k, least=0)
    check_seed(seed)
    if temperature < _COLDEST:  # logits over it would overflow
        return {"max_new_tokens": max_new_tokens, "num_beams": 1, "do_sample": False}
    drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    return {"max_new_tokens": max_new_tokens, "num_beams": 1, **drawn}
