"""The properties have force: each mutant is killed by those about its bug."""

import sys

import pytest
import torch

from tests.entries import ENTRIES, OF
from tests.mutants import BLIND, KILLS, MUTANTS, SURVIVORS
from tests.properties import common

PROPERTIES = [
    value for name, value in sys.modules.items() if name.startswith("tests.properties.")
]


def shared_tensors() -> dict[str, torch.Tensor]:
    """All that properties hand to several functions, one after the other."""
    found = {}
    for module in PROPERTIES:
        for name, x in vars(module).items():
            parts = x if isinstance(x, dict) else {"": x}
            for part, tensor in parts.items():
                if isinstance(tensor, torch.Tensor):
                    found[f"{module.__name__}.{name}.{part}"] = tensor.clone()
    for entry in ENTRIES:
        if entry.cases is not None:
            tensors = common.copied(entry.call)
            found |= {f"{entry.name}.{name}": x for name, x in tensors.items()}
    return found


@pytest.fixture(autouse=True, scope="module")
def no_mutant_spoils_what_others_are_given():
    before = shared_tensors()
    yield
    after = shared_tensors()
    assert len(before) > 50
    spoiled = [name for name, x in before.items() if not torch.equal(after[name], x)]
    assert not spoiled


PINNED = [(wrong, name) for wrong, names in KILLS.items() for name in names]


@pytest.mark.parametrize(
    "wrong, name", PINNED, ids=[f"{wrong.__name__}-{name}" for wrong, name in PINNED]
)
def test_a_mutant_is_killed_by_what_is_about_its_bug(wrong, name):
    """By each of these properties alone: should one lose its force, it is seen."""
    checks = OF[MUTANTS[wrong]].properties
    named = [check for check in checks if common.name_of(check) == name]
    assert named, f"{name} is no property of {OF[MUTANTS[wrong]].name}"
    assert any(common.refutes(check, wrong) for check in named)


def test_nobody_is_killed_for_not_looking_at_its_inputs():
    """But for the one whose bug is that."""
    shapes = [wrong.__name__ for wrong in MUTANTS if set(KILLS[wrong]) <= {*BLIND}]
    assert shapes == ["masked_sum_that_broadcasts"]


def test_each_mutant_says_what_is_wrong():
    lines = [wrong.__doc__.splitlines()[0] for wrong in MUTANTS]
    assert all(line.endswith(".") for line in lines)
    assert len({wrong.__name__ for wrong in MUTANTS}) == len(MUTANTS) >= 115
    assert SURVIVORS.keys() <= MUTANTS.keys()
    assert all(KILLS.values())
