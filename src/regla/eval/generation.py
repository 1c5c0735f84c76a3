"""Text from a trained model, printed as it comes."""

from __future__ import annotations

from pathlib import Path

import torch

from regla.eval.perplexity import first_id
from regla.models.folders import load_model, load_tokenizer
from regla.train.device import pick_device


def generate(
    folder: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Print `prompt` and what the model in `folder` writes after it, token by token.

    It ends after `max_new_tokens` tokens, or before if the model ends the text. `temperature` 0 takes the likeliest
    token every time; otherwise one of the `top_k` likeliest (0: of all) is drawn, repeatably for a seed.
    """
    if max_new_tokens <= 0:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}, expected a number above 0.")
    if temperature < 0 or top_k < 0:
        raise ValueError(f"--temperature {temperature} and --top-k {top_k} must be 0 or more.")
    where = pick_device(device)
    model, tokenizer = load_model(folder, where), load_tokenizer(folder)
    from transformers import TextStreamer

    ids = tokenizer(prompt)["input_ids"] or [first_id(tokenizer)]
    input_ids_1T = torch.tensor([ids], device=where)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    model.generate(
        input_ids_1T,
        attention_mask=torch.ones_like(input_ids_1T),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
