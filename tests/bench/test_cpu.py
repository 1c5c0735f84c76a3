"""The CPU path's promises, each a ratio within one run. Timing needs a quiet machine: these run by themselves."""

import pytest
import torch

from regla.bench.cpu import measure_decode, measure_delta, measure_forms, measure_memory

pytestmark = pytest.mark.timing


@pytest.fixture(autouse=True)
def _as_users_run():
    """Two threads, and memory that is not filled before use."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_blocks_and_kernels_are_faster_than_the_recurrence():
    least = {"chunked": 2, "native": 7}
    rows = measure_forms(2, turns=2)
    assert all(row["ratio"] >= least[row["backend"]] for row in rows), rows


def test_the_delta_rule_is_faster_than_its_recurrence():
    """The promise for the C kernels is ten times."""
    least = {"chunked": 2, "native": 10}
    rows = measure_delta(turns=1)  # a turn of the recurrence takes ten seconds
    assert {row["backend"] for row in rows} >= {"chunked"}
    assert all(row["ratio"] >= least[row["backend"]] for row in rows), rows


def test_decoding_does_not_slow_down_or_grow():
    early, late = measure_decode()
    assert late["ratio_to_early"] <= 1.1
    assert late["cache_bytes"] == early["cache_bytes"] > 0


def test_memory_of_a_forward_pass_is_linear():
    short, middle, long = (row["peak_bytes"] for row in measure_memory())
    assert middle - short > 8192 * 4 * 64 * 4 * 5  # at least what the inputs take
    assert long - middle <= 1.1 * 2 * (middle - short)
