"""Continuations behind shared prefixes: what each would score alone, and every shared token run once."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from regla.eval import prefix
from regla.eval.prefix import ContinuationScorer
from regla.layers.defaults import DELTA
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.configuration import mixer_arguments

L, F = "linear_attention", "full_attention"
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,  # far from uniform predictions
    "pad_token_id": 0,
}
KINDS = {
    "delta": lambda: ReGLAForCausalLM(ReGLAConfig(**SHAPE | mixer_arguments(DELTA))),
    "pure": lambda: ReGLAForCausalLM(ReGLAConfig(**SHAPE, linear_conv_kernel_dim=4)),
    "pure, rope": lambda: ReGLAForCausalLM(ReGLAConfig(**SHAPE, linear_rope=True, qk_norm=False)),
    "hybrid": lambda: ReGLAForCausalLM(ReGLAConfig(**SHAPE, layer_types=[L, F], softmax_conv_kernel_dim=3)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5)),
}


@pytest.fixture(params=KINDS)
def model(request):
    return KINDS[request.param]().eval()


def tokens(count: int) -> list[int]:
    return torch.randint(1, 61, (count,)).tolist()


def cases() -> dict[str, list]:
    """Pairs of a context and a continuation, as the tasks make them."""
    examples, question = tokens(40), tokens(30)
    stem = tokens(20)
    return {
        "one context, several answers": [(question, tokens(n)) for n in (1, 5, 3, 9)],
        "one-token answers": [(question, [3]), (question, [4])],
        "the same answer twice": [(question, [3, 5]), (question, [3, 5])],
        "one set of examples": [(examples + q, a) for q in (tokens(25), tokens(18), tokens(3)) for a in ([7, 8], [9])],
        "contexts that branch early": [([*stem, 5, *tokens(22)], [1, 2]), ([*stem, 6, *tokens(20)], [1, 2])],
        "answers that begin alike": [(question, [*stem, 1, 4]), (question, [*stem, 2])],
        "lone contexts": [(tokens(n), tokens(3)) for n in (1, 2, 17, 50)],
        "one is the other's beginning": [(question, [5]), ([*question, 5, *stem], [6]), (question[:20], [7])],
        "many lengths": [(tokens(n), tokens(k)) for n in range(17, 80, 5) for k in (1, 4)],
    }


@torch.no_grad()
def alone(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition: one forward pass over the two, without a cache."""
    logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0, len(context) - 1 : -1].double()
    logs = logits.log_softmax(-1)[range(len(continuation)), continuation]
    return float(logs.sum()), logits.argmax(-1).tolist() == continuation


def score(model, pairs, **options) -> list[tuple[float, bool]]:
    answers = {}

    def done(index, answer):
        assert index not in answers, "scored twice"
        answers[index] = answer

    ContinuationScorer(model, **options).score(pairs, done)
    return [answers[index] for index in range(len(pairs))]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_each_pair_alone(model, batch_size) -> None:
    pairs = [pair for case in cases().values() for pair in case]
    context, _ = pairs[0]
    with torch.no_grad():  # one that is greedy
        pairs.append((context, [int(model(torch.tensor([context])).logits[0, -1].argmax())]))
    expected = [alone(model, *pair) for pair in pairs]
    answers = score(model, pairs, batch_size=batch_size)
    assert [answer[0] for answer in answers] == pytest.approx([answer[0] for answer in expected], rel=1e-5, abs=1e-4)
    assert [answer[1] for answer in answers] == [answer[1] for answer in expected]
    assert answers[-1][1] and not all(greedy for _, greedy in answers)


@pytest.mark.parametrize("case", cases())
def test_every_kind_of_sharing_alone(case) -> None:
    model = KINDS["hybrid"]().eval()
    pairs = cases()[case]
    expected = [alone(model, *pair)[0] for pair in pairs]
    assert [ll for ll, _ in score(model, pairs)] == pytest.approx(expected, rel=1e-5, abs=1e-4)


def count_tokens(model, pairs, **options) -> tuple[int, int]:
    """Tokens and calls, without the scorer's look at the cache."""
    scorer = ContinuationScorer(model, **options)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scorer.score(pairs)
    hook.remove()
    return sum(seen), len(seen)


def test_a_shared_prefix_runs_once() -> None:
    model = KINDS["pure"]().eval()
    question = tokens(100)
    answers = [(question, tokens(5)) for _ in range(4)]
    assert count_tokens(model, answers) == (99 + 4 * 5, 2)  # the question's last token comes with each answer
    assert count_tokens(model, answers, share=False) == (4 * 104, 1)
    examples = tokens(200)
    items = [(examples + question, answer) for question in (tokens(50), tokens(50)) for answer in ([1, 2], [3, 4])]
    assert count_tokens(model, items) == (200 + 2 * 49 + 4 * 2, 3)


def test_a_short_prefix_does_not_pay() -> None:
    model = KINDS["pure"]().eval()
    question = tokens(10)
    assert count_tokens(model, [(question, [1, 2]), (question, [3, 4])]) == (2 * 11, 1)


def test_an_example_that_few_items_share_is_repeated_where_a_call_costs_more(monkeypatch) -> None:
    """Pairs of items that share an example of 40 tokens, whose answers share the 100 tokens of the item."""
    pairs = []
    for example in (tokens(40) for _ in range(4)):
        pairs += [(example + item, answer) for item in (tokens(60), tokens(60)) for answer in (tokens(4), tokens(5))]
    model = KINDS["hybrid"]().eval()
    shared, calls = count_tokens(model, pairs, batch_size=4)
    monkeypatch.setattr(prefix, "_LEAST_SAVED", 64)
    repeated, fewer = count_tokens(model, pairs, batch_size=4)
    assert repeated == shared + 4 * 40
    assert fewer < calls
    for one, other in zip(score(model, pairs), score(model, pairs, share=False), strict=True):
        assert one == (pytest.approx(other[0], abs=1e-3), other[1])


def test_a_wrong_fork_shows(monkeypatch) -> None:
    """Rows that change places between prefix and continuation must not go unseen."""
    model = KINDS["pure"]().eval()
    pairs = [(context, tokens(3)) for context in (tokens(40), tokens(40)) for _ in range(2)]
    expected = [alone(model, *pair)[0] for pair in pairs]
    right = prefix.fork_cache
    monkeypatch.setattr(prefix, "fork_cache", lambda cache, rows: right(cache, list(reversed(rows))))
    assert [ll for ll, _ in score(model, pairs)] != pytest.approx(expected, rel=1e-2)


def test_states_that_take_no_second_chunk_are_not_shared() -> None:
    config = MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config).eval()
    pairs = cases()["one context, several answers"]
    assert not ContinuationScorer(model).share
    assert [ll for ll, _ in score(model, pairs)] == pytest.approx([alone(model, *pair)[0] for pair in pairs], rel=1e-4)


def test_a_batch_size_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 0, expected a number above 0\."):
        ContinuationScorer(KINDS["pure"](), batch_size=0)
