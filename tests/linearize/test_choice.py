"""Which layers are given back to softmax: by hand on a model whose layers are not alike."""

import pytest
import torch

from regla.linearize import convert
from regla.linearize.choice import keep_softmax, rank_layers
from regla.linearize.divergence import divergence, sequence_divergences
from regla.models.student import linear_attention
from tests.linearize.models import llama
from tests.linearize.originals import FIRST, original


def test_the_layer_that_matters_comes_first():
    """Only one layer says anything: to restore it wins most, and the figures are those of models so built."""
    torch.manual_seed(0)
    teacher = llama()
    with torch.no_grad():
        for number in (0, 1, 3):
            teacher.model.layers[number].self_attn.o_proj.weight.zero_()
    student = convert(teacher, "none")
    ids = torch.randint(97, (8, 32))
    rows = rank_layers(teacher, student, ids, batch_size=4, dtype="float32", seed=0)
    assert sorted(row.layer for row in rows) == [0, 1, 2, 3] and rows[0].layer == 2
    assert [row.score for row in rows] == sorted((row.score for row in rows), reverse=True)
    assert sorted(linear_attention(student)) == [0, 1, 2, 3]  # as it was
    pure = sequence_divergences(teacher, student, ids, batch_size=8, dtype="float32")
    for row in rows:
        restored = convert(teacher, [row.layer])
        mixers, trained = linear_attention(restored), linear_attention(student)
        for number, attention in mixers.items():
            attention.load_state_dict(trained[number].state_dict())
        kl = sequence_divergences(teacher, restored, ids, batch_size=8, dtype="float32")
        assert row.kl == pytest.approx(float(kl.mean()), rel=1e-4)
        gain = pure - kl
        assert row.kl_gain == pytest.approx(float(gain.mean()), rel=1e-3, abs=1e-6)
        assert row.kl_gain_se == pytest.approx(float(gain.std() / 8**0.5), rel=1e-3, abs=1e-6)


def test_a_gain_within_its_noise_counts_as_none():
    """Layers that are the original's already win nothing."""
    teacher = llama()
    student = convert(teacher, "0,1,2")
    rows = rank_layers(teacher, student, torch.randint(97, (4, 24)), batch_size=4, dtype="float32", seed=0)
    assert [row.layer for row in rows] == [3] and rows[0].kl == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for weight in teacher.model.layers[3].self_attn.o_proj, linear_attention(student)[3].mixer.o_proj:
            weight.weight.zero_()
    (row,) = rank_layers(teacher, student, torch.randint(97, (4, 24)), batch_size=4, dtype="float32", seed=0)
    assert row.score == 0 and row.kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", FIRST)
def test_layers_given_back_are_the_originals(name, tmp_path):
    """In every family: the student computes what one that kept those layers from the start does, in a folder, too."""
    torch.manual_seed(0)
    teacher, ids = original(name), torch.randint(97, (2, 12))
    student = convert(teacher, "none")
    expected = convert(teacher, "1")
    for number, attention in linear_attention(expected).items():
        attention.load_state_dict(linear_attention(student)[number].state_dict())
    keep_softmax(teacher, student, [1])
    assert student.config.linear_layers == [0, 2]
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, expected(ids).logits)
        student.save_pretrained(tmp_path)
        loaded = type(student).from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits)
        generated = student.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, loaded.generate(ids, max_new_tokens=3, do_sample=False))


def test_divergence_by_hand():
    teacher = llama()
    student = convert(teacher)
    ids = torch.randint(97, (3, 16))
    with torch.no_grad():
        p, q = (model(ids).logits.double().softmax(-1) for model in (teacher, student))
        by_sequence = (p * (p / q).log()).sum(-1).mean(1)
    found = divergence(teacher, student, ids, batch_size=2, dtype="float32")
    assert found.mean == pytest.approx(by_sequence.mean().item(), rel=1e-4)
    assert found.se == pytest.approx((by_sequence.std() / 3**0.5).item(), rel=1e-3)
    assert found.tokens == 48
