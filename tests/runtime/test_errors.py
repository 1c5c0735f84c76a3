"""Errors that name parameters in Python and flags on the command line."""

import math
import pickle

import pytest

from regla.runtime.errors import OptionError, check_choice, check_count, check_number, check_seed, told_in_flags


def test_an_error_names_what_the_caller_passed() -> None:
    error = OptionError("{batch_size} is {value}, expected {what}.", value="{seed}", what="less than {lr}")
    assert str(error) == "batch_size is {seed}, expected less than {lr}."  # values are no templates
    assert told_in_flags(error) == "--batch-size is {seed}, expected less than {lr}."
    assert error.option == "batch_size"
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and told_in_flags(again) == told_in_flags(error)
    assert told_in_flags(ValueError("{x} is odd.")) == "{x} is odd."


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_count("steps", 0), "steps is 0, expected a number above 0."),
        (lambda: check_count("warmup", -1, least=0), "warmup is -1, expected 0 or more."),
        (lambda: check_count("steps", 2**70), "steps is 1180591620717411303424, expected at most 2147483647."),
        (lambda: check_count("steps", 1.5), "steps is 1.5, expected a whole number."),
        (lambda: check_count("steps", True), "steps is True, expected a whole number."),
        (lambda: check_seed(2**70), "seed is 1180591620717411303424, expected at most 9223372036854775807."),
        (lambda: check_seed(-1), "seed is -1, expected 0 or more."),
        (lambda: check_number("lr", math.nan), "lr is nan, expected a number above 0."),
        (lambda: check_number("lr", math.inf), "lr is inf, expected a number above 0."),
        (lambda: check_number("lr", 0.0), "lr is 0.0, expected a number above 0."),
        (lambda: check_number("lr", "1"), "lr is '1', expected a number above 0."),
        (lambda: check_number("weight_decay", -0.1, zero=True), "weight_decay is -0.1, expected 0 or more."),
        (lambda: check_choice("dtype", "int4", ("a", "b")), "dtype is 'int4', expected one of a, b."),
    ],
)
def test_values_that_do_not_fit(check, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check()
    assert str(caught.value) == message


def test_values_that_fit() -> None:
    for value in (None, 1, 2**31 - 1):
        check_count("steps", value)
    check_seed(0)
    check_seed(2**63 - 1)
    check_number("lr", None)
    check_number("lr", 1e30)
    check_number("weight_decay", 0, zero=True)
