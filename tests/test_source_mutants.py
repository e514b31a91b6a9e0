"""The machine that makes slips: it makes those it should, and leaves no trace."""

import inspect
import sys

import pytest

from tests import source_mutants
from tests.source_mutants import (
    EXPLAINED,
    MODULES,
    PARTS_OF_A_FUNCTION,
    deleted_checks,
    evidence,
    failure,
    first_failure,
    killed_by,
    mutants_of,
    quick_to_judge,
    refused,
    replaced,
    syntax,
)


def price(x, K, scale=0.5):
    """Nobody needs it."""
    if K < 2:
        raise ValueError(f"K: got {K + 0}")
    return max(x.detach(), K - scale)


NAME = f"{__name__.split('.')[-1]}.price"
SLIPS = {
    "x, K, scale=0.5 -> x, K, scale=1.0",
    "if K < 2: -> pass",
    "K < 2 -> K <= 2",
    "K < 2 -> K > 2",
    "K < 2 -> K < 3",
    "K < 2 -> K < 1",
    "return max(x.detach(), K - scale) -> return -max(x.detach(), K - scale)",
    "max(x.detach(), K - scale) -> min(x.detach(), K - scale)",
    "x.detach() -> x",
    "K - scale -> K + scale",
    "K - scale -> -K - scale",
    "K - scale -> scale - K",
    "K - scale -> K",
    "K - scale -> -scale",
}


def slips(only=lambda node: True):
    tree = syntax(sys.modules[__name__])["price"]
    return {mutant.key: mutant for mutant in mutants_of(tree, price, only)}


def test_a_small_function_has_these_mutants():
    """None of its message, of the order of two that are compared, or of its text."""
    assert slips().keys() == {f"{NAME}: {slip}" for slip in SLIPS}


def test_its_check_is_one_statement():
    assert slips(source_mutants.is_check).keys() == {f"{NAME}: if K < 2: -> pass"}


def test_a_mutant_says_where_it_is():
    mutant = slips()[f"{NAME}: K - scale -> K + scale"]
    assert mutant.line == inspect.getsourcelines(price)[1] + 4
    assert str(mutant) == f"{NAME}:{mutant.line} K - scale -> K + scale"
    assert mutant.after == "return max(x.detach(), K + scale)"


def parts(function):
    return [getattr(function, part) for part in PARTS_OF_A_FUNCTION]


def test_the_code_is_lent_and_given_back(tmp_path):
    class Still(float):
        detach = float.__abs__

    before, held = parts(price), {"in a table": price}
    assert held["in a table"](Still(0.0), 3) == 2.5
    for slip, expected in {
        "K - scale -> K + scale": 3.5,
        "x, K, scale=0.5 -> x, K, scale=1.0": 2.0,
    }.items():
        mutant = slips()[f"{NAME}: {slip}"]
        with replaced(price, mutant.wrong):
            assert held["in a table"](Still(0.0), 3) == expected
        assert parts(price) == before and price.__code__ is before[0]


@pytest.mark.parametrize(
    "key",
    [
        "ppo.gae: r[:, s] + gamma * next_value -> r[:, s] - gamma * next_value",
        (
            "ppo.policy_loss: torch.minimum(ratio * A, clipped * A) -> "
            "torch.maximum(ratio * A, clipped * A)"
        ),
        "rloo.leave_one_out: rewards.shape[1] - 1 -> rewards.shape[1] - 0",
    ],
)
def test_the_evidence_kills(key):
    function = key.split(":")[0]
    mutants = source_mutants.source_mutants(function)
    (mutant,) = [each for each in mutants if each.key == key]
    before = parts(mutant.right)
    with quick_to_judge():
        killer, error = killed_by(mutant, evidence(function.split(".")[0]))
    assert killer.startswith(f"golden: {function}") and error == "AssertionError"
    assert parts(mutant.right) == before and mutant.right.__code__ is before[0]


@pytest.mark.parametrize("function", ["rloo.leave_one_out", "rloo.train"])
def test_a_deleted_check_is_seen(function):
    proofs = list(refused("rloo"))
    mutants = deleted_checks(function)
    assert len(mutants) == {"rloo.leave_one_out": 1, "rloo.train": 5}[function]
    with quick_to_judge():
        assert first_failure(proofs) is None
        assert all(killed_by(mutant, proofs) for mutant in mutants)


@pytest.mark.parametrize("module", MODULES)
def test_there_is_evidence_of_every_kind(module):
    kinds = {name.split(":")[0] for name, _ in evidence(module)}
    assert kinds == {"golden", "refusals", "properties"}


def test_what_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr(source_mutants, "PATIENCE", 0.05)

    def for_ever():
        while True:
            pass

    with quick_to_judge():
        assert failure(for_ever) == "TooLong"
        assert failure(lambda: None) is None


def test_every_explanation_is_of_a_mutant():
    made = [*source_mutants.source_mutants(), *deleted_checks()]
    stale = EXPLAINED.keys() - {mutant.key for mutant in made}
    assert not stale
