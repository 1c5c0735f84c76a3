"""A small model with something to keep, its text, and what `regla linearize` makes of it."""

import pytest
import torch

from regla.cli import main
from regla.data.tokenizer import train_tokenizer
from regla.runtime.progress import Progress
from regla.train.config import TrainConfig
from regla.train.loop import optimise
from tests.linearize.models import TEMPLATE, command, llama

WORDS = "the cat sat on a mat and saw dog that ran to its house by old tree where birds sang all day".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model that was trained a little, so that there is something to keep; with its texts."""
    place = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    picks = torch.randint(len(WORDS), (12_000,)).tolist()
    # Every second word repeats the one four words back: only attention to the past predicts it.
    for index in range(4, len(picks), 2):
        picks[index] = picks[index - 4]
    text = " ".join(WORDS[pick] for pick in picks)
    (place / "text.txt").write_text(text)
    tokenizer = train_tokenizer([text], 300)
    tokenizer.chat_template = TEMPLATE
    model = llama(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    tokens = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int32)
    run = TrainConfig(out="-", steps=150, seq_len=64, batch_size=8, lr=5e-3)
    optimise(model, tokens, run, progress=Progress(), stop=lambda: False)
    model.eval().save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place


@pytest.fixture(scope="session")
def converted(folder):
    out = folder / "converted"
    assert main(command(folder, out, "--keep", "none", "--tokens", "23040", "--lr", "3e-3")) == 0
    return out
