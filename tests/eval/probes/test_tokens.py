"""Probes in token ids: what is asked can be answered from the sequence, is asked once, and lies where it says."""

import numpy as np
import pytest
import torch

from regla.eval.probes.tokens import IGNORE, copy, fitting_cells, induction, mqar

V = 512


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("pairs", "gap"), [(1, 0), (4, 0), (8, 16), (12, 16)])
def test_mqar_is_zoologys(pairs, gap):
    """Pairs first, keys below and values above half of the vocabulary, each key once more at an even place behind the
    gap, its value the target there and nowhere in between."""
    asked = mqar(rng(), rows=20, length=64, vocab_size=V, cells=[(pairs, gap)])
    for ids, targets, distance, values in zip(
        asked.ids_BT, asked.targets_BT, asked.distance_BT, asked.candidates_BC, strict=True
    ):
        keys, own = ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]
        assert len(keys.unique()) == len(own.unique()) == pairs
        assert keys.min() >= 1 and keys.max() < V // 2 <= own.min()
        assert values.tolist() == own.tolist()
        places = (targets != IGNORE).nonzero().flatten()
        assert len(places) == pairs and places.min() >= 2 * pairs + gap and (places % 2 == 0).all()
        assert sorted(ids[places].tolist()) == sorted(keys.tolist())
        for place in places:
            first = 2 * keys.tolist().index(int(ids[place]))
            assert targets[place] == ids[first + 1]
            assert distance[place] == place - first - 1


def test_most_queries_of_mqar_come_soon():
    """Slots have p ~ slot^(power - 1), power 0.01: the first of 28 slots has a quarter of the first query's draws."""
    asked = mqar(rng(), rows=4000, length=58, vocab_size=V, cells=[(1, 0)])
    slot = ((asked.targets_BT != IGNORE).nonzero()[:, 1] - 2) // 2
    p = np.arange(1, 29) ** -0.99
    p /= p.sum()
    found = np.bincount(slot, minlength=28) / 4000
    np.testing.assert_allclose(found, p, atol=4 * np.sqrt(p * (1 - p) / 4000).max())


def test_rows_of_mqar_have_one_of_the_cells_each():
    asked = mqar(rng(), rows=200, length=64, vocab_size=V, cells=[(2, 0), (4, 32), (16, 0)])
    numbers = (asked.targets_BT != IGNORE).sum(1)
    assert set(numbers.tolist()) == {2, 4, 16}
    of_4 = (asked.targets_BT[numbers == 4] != IGNORE).nonzero()[:, 1]
    assert of_4.min() >= 8 + 32


def test_a_seed_says_everything():
    one, same, other = (mqar(rng(seed), rows=3, length=32, vocab_size=V, cells=[(4, 0)]) for seed in (1, 1, 2))
    assert torch.equal(one.ids_BT, same.ids_BT) and not torch.equal(one.ids_BT, other.ids_BT)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_induction_asks_for_what_followed(depth):
    asked = induction(rng(), rows=20, length=33, vocab_size=V, depths=[depth])
    for ids, targets, distance, candidates in zip(
        asked.ids_BT, asked.targets_BT, asked.distance_BT, asked.candidates_BC, strict=True
    ):
        before = (ids[:-1] == ids[-1]).nonzero().flatten()
        assert before.tolist() == [round(depth * 29)]
        assert targets[-1] == ids[before + 1] and (targets[:-1] == IGNORE).all()
        assert distance[-1] == 32 - (before + 1)
        assert len(candidates.unique()) == len(candidates) and targets[-1] in candidates


def test_copy_asks_for_the_segment():
    asked = copy(rng(), rows=5, length=16, vocab_size=V)
    assert torch.equal(asked.ids_BT[:, :7], asked.ids_BT[:, 8:])
    assert torch.equal(asked.targets_BT[:, 8:], asked.ids_BT[:, 1:8]) and (asked.targets_BT[:, :8] == IGNORE).all()
    assert (asked.distance_BT[:, 8:] == 7).all()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: mqar(rng(), rows=1, length=64, vocab_size=V, cells=[(16, 2)]),
            "16 pairs and a gap of 2 tokens need 66 tokens",
        ),
        (lambda: mqar(rng(), rows=1, length=64, vocab_size=16, cells=[(8, 0)]), "a vocabulary of 16 has 7"),
        (lambda: mqar(rng(), rows=1, length=64, vocab_size=V, cells=[(0, 0)]), "expected at least 1 pair"),
        (lambda: induction(rng(), rows=1, length=3, vocab_size=V), "expected at least 4 tokens"),
        (lambda: copy(rng(), rows=1, length=64, vocab_size=20), "needs 32 different tokens, but the vocabulary has 20"),
    ],
)
def test_what_does_not_fit(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_cells_that_fit():
    assert fitting_cells([4, 16], [0, 32], length=64, vocab_size=V) == [(4, 0), (4, 32), (16, 0)]
    with pytest.raises(ValueError, match="17 pairs and a gap of 0 tokens need 68 tokens"):
        fitting_cells([4, 17], [0], length=64, vocab_size=V)
