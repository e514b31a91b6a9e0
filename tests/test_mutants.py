"""The properties have force: every mutant is caught, and no true function is."""

import pytest

from tests.mutants import MUTANTS, SURVIVORS
from tests.properties.owed import OWED, first_catch, name_of

CHECKS = [(right, check) for right, checks in OWED.items() for check in checks]


@pytest.mark.parametrize(
    "right, check",
    CHECKS,
    ids=[f"{right.__qualname__}-{name_of(check)}" for right, check in CHECKS],
)
def test_a_true_function_passes(right, check):
    check(right)


@pytest.mark.parametrize(
    "wrong, right", MUTANTS.items(), ids=[wrong.__name__ for wrong in MUTANTS]
)
def test_a_mutant_is_caught(wrong, right):
    assert first_catch(wrong, right)


def test_each_mutant_says_what_is_wrong():
    lines = [wrong.__doc__.splitlines()[0] for wrong in MUTANTS]
    assert all(line.endswith(".") for line in lines)
    assert len({wrong.__name__ for wrong in MUTANTS}) == len(MUTANTS) >= 60
    assert SURVIVORS.keys() <= MUTANTS.keys()


def test_the_table_has_no_property_without_a_use():
    assert OWED.keys() == set(MUTANTS.values())
