"""Every probe can fail and can be passed: an oracle scores 1, a broken model what chance gives it."""

import math

import numpy as np
import pytest
import torch
from tests.eval.probes.models import Oracle

from regla.data.embedded import embedded_text
from regla.data.tokenizer import train_tokenizer
from regla.eval.probes.run import TEXT_PROBES, Cell, run_cell
from regla.eval.probes.score import Answers, answer_tokens, greedy, share
from regla.eval.probes.text import Haystack
from regla.eval.probes.tokens import IGNORE, copy, mqar
from regla.models import ReGLAConfig, ReGLAForCausalLM

CELLS = {
    "mqar": Cell(probe="mqar", length=48, pairs=4, gap=16),
    "induction": Cell(probe="induction", length=40, depth=0.25),
    "copy": Cell(probe="copy", length=48),
    "passkey": Cell(probe="passkey", length=110, depth=0.25),
    "needle": Cell(probe="needle", length=110, depth=0.25),
    "kv": Cell(probe="kv", length=190, pairs=4),
}
V = 400


@pytest.fixture(scope="module")
def haystack():
    documents = embedded_text().documents[:20]
    tokenizer = train_tokenizer(documents, V)
    return Haystack(tokenizer, np.concatenate([tokenizer(text)["input_ids"] for text in documents]), first=0)


@pytest.fixture
def run(haystack):
    def one(probe, limit=24, **broken):
        model = Oracle(V, **broken)
        return run_cell(model, "oracle", CELLS[probe], limit=limit, seed=3, haystack=haystack, vocab_size=V)

    return one


@pytest.mark.parametrize("probe", CELLS)
def test_a_model_that_remembers_passes(run, probe):
    record = run(probe)
    assert record.likelihood >= 0.99 and record.generation >= 0.95  # mqar's noise may repeat a key
    assert record.sequences == 24 and record.nats < 1
    if probe in TEXT_PROBES:
        assert record.generation == 1


@pytest.mark.parametrize("probe", CELLS)
@pytest.mark.parametrize("broken", [{"window": 8}, {"shuffled": True}], ids=["cut context", "shuffled state"])
def test_a_model_that_forgets_is_at_chance(run, probe, broken):
    record = run(probe, **broken)
    of_chance = record.chance + 4 * math.sqrt(record.chance * (1 - record.chance) / record.sequences)
    assert record.likelihood <= of_chance
    assert record.generation <= (of_chance if "shuffled" in broken else 0.05)  # the other row's answer may be the same


def test_a_mask_that_shows_the_answer_cannot_speak(run):
    """By likelihood it seems to copy perfectly; written token by token there is nothing to look at."""
    record = run("copy", sees_answers=True, window=8)
    assert record.likelihood >= 0.95
    assert record.generation <= 0.05


def test_distances_say_where_a_window_ends():
    """A model that sees 24 tokens answers up to a distance of 22 (the pair's key, too, must be seen) and not beyond."""
    asked = mqar(np.random.default_rng(0), rows=40, length=64, vocab_size=V, cells=[(8, 0)])
    answers = answer_tokens(Oracle(V, window=24), asked, batch_size=16, dtype="float32")
    near = answers.distance_N <= 22
    assert near.any() and (~near).any()
    assert answers.generation_N[near].float().mean() >= 0.9
    assert answers.generation_N[~near].float().mean() <= 0.05


def test_chance_is_one_of_the_candidates(run):
    assert [run(probe, limit=2).chance for probe in CELLS] == [1 / 4, 1 / 8, 1 / 24, 1 / 10, 1 / 10, 1 / 4]


def test_the_same_questions_for_every_model(run):
    assert run("kv").nats == run("kv").nats


def tiny():
    torch.manual_seed(0)
    config = ReGLAConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        layer_types=["linear_attention", "full_attention", "sliding_attention"],
        sliding_window=8,
        initializer_range=0.3,
    )
    return ReGLAForCausalLM(config).eval()


def test_greedy_is_what_generate_writes():
    """Through the cache of a real hybrid, against transformers' own generation."""
    model = tiny()
    asked = copy(np.random.default_rng(0), rows=3, length=16, vocab_size=V)
    said = greedy(model, asked.ids_BT, asked.targets_BT)
    prompt = asked.ids_BT[:, :9]
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, do_sample=False)
    assert torch.equal(said[:, 8:], written[:, 9:]) and (said[:, :8] == IGNORE).all()


@pytest.mark.parametrize("probe", CELLS)
def test_an_untrained_model_knows_nothing(haystack, probe):
    record = run_cell(tiny(), "tiny", CELLS[probe], limit=8, seed=0, haystack=haystack, vocab_size=V)
    assert record.generation <= 0.2 and record.nats > 2


def test_the_error_counts_sequences():
    """Four answers that stand or fall together are one observation."""
    right, row = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), torch.tensor([0] * 4 + [1] * 4)
    together = share(right, row)
    assert together.mean == 0.5 and together.se == pytest.approx(0.5)  # of two coins: sqrt(1/2 (1/4 + 1/4)) = 0.5
    apart = share(right, torch.arange(8))
    assert apart.se == pytest.approx(math.sqrt(0.25 / 7))
    assert math.isnan(share(right[:4], row[:4]).se)


def test_unequal_rows_weigh_by_their_answers():
    one = Answers(*(torch.tensor(x) for x in ([0, 1, 1, 1], [0] * 4, [0.0] * 4, [1, 0, 0, 0], [1, 0, 0, 0])))
    assert share(one.likelihood_N, one.row_N).mean == 0.25
