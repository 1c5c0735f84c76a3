"""Every sequence once in an epoch, at any place without what came before."""

import numpy as np
import pytest
import torch

from regla.data.tokens import Ids
from regla.train.config import LoopConfig
from regla.train.epochs import Epochs, permuted
from regla.train.mixture import Mixture, Stream


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000])
def test_a_permutation_has_every_index_once(size: int) -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, size=6, dtype=np.uint64)
    order = permuted(np.arange(size), size, keys)
    assert sorted(order.tolist()) == list(range(size))
    if size >= 17:
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.5 and order.tolist() != list(range(size))
        assert permuted(np.arange(size), size, keys + np.uint64(1)).tolist() != order.tolist()


@pytest.mark.parametrize(("tokens", "T"), [(100, 9), (99, 9), (19, 9), (11, 9), (10, 9), (5000, 64)])
def test_an_epoch_predicts_every_token_at_most_once(tokens: int, T: int) -> None:
    order = Epochs(tokens, seq_len=T, seed=3)
    assert order.sequences >= max(1, tokens // T - 1)
    starts = order.starts(0, 3 * order.sequences).reshape(3, -1)
    for start_B in starts:
        predicted = (start_B[:, None] + 1 + np.arange(T)).flatten()
        assert len(np.unique(predicted)) == len(predicted) and predicted.max() < tokens and start_B.min() >= 0
        assert tokens - len(predicted) <= 2 * T
    if order.sequences > 20:
        assert len({tuple(start_B) for start_B in starts}) == 3
    at = order.sequences - 1  # across the end of an epoch
    np.testing.assert_array_equal(order.starts(at, 3), starts.flatten()[at : at + 3])


def streams(*lengths: int) -> list[Stream]:
    ends = np.cumsum(lengths)
    rows = [np.arange(end - length, end, dtype=np.int32) for length, end in zip(lengths, ends, strict=True)]
    return [Stream(f"{number}", Ids.of(row)) for number, row in enumerate(rows)]


@pytest.mark.parametrize("weights", [None, (3, 1)])
def test_a_mixture_reads_each_source_evenly(weights: tuple[int, int] | None) -> None:
    config = LoopConfig(seq_len=9, batch_size=6, seed=1)
    drawn = Mixture(streams(2000, 500), weights, config, once=True)
    assert drawn.in_memory is None
    batches = [drawn(batch) for batch in range(90)]
    counts = torch.stack(batches)[..., 1:].flatten().bincount(minlength=2500)
    for part, epochs in ((counts[:2000], 90 * 54 * 0.75 / 2000), (counts[2000:], 90 * 54 * 0.25 / 500)):
        expected = epochs if weights else 90 * 54 / 2500
        assert part.max() - part.clamp(min=int(expected)).min() <= 1 and part.max() <= np.ceil(expected) + 1
    again = Mixture(streams(2000, 500), weights, config, once=True)
    for batch in (50, 7, 8, 89):  # from any place, without those before
        assert torch.equal(again(batch), batches[batch])
    told = drawn.drawn(90)
    assert [one.drawn for one in told] == [int(counts[:2000].sum()), int(counts[2000:].sum())]
