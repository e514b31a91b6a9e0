"""Every public function passes what it owes (tests/entries.py); none is left out."""

import importlib
import inspect
import pkgutil

import pytest
import torch

from minialign import algorithms, logprobs
from tests.entries import ENTRIES, OF
from tests.properties import common

CHECKS = [(entry.function, check) for entry in ENTRIES for check in entry.properties]

# Public functions without an entry, and why.
LEFT_OUT = {
    "it refuses, see tests/test_refusals.py": "normaliser",
    "parts of loops": """learning_rate optimizers score_answers reference_of_pairs
        same_beta surrogate_slope scored_parts""",
    "it changes a type": "at_least_float32",
    "training, see tests/methods.py": "train",
}


def own_functions(module) -> set:
    return {
        x
        for name, x in vars(module).items()
        if inspect.isfunction(x)
        and x.__module__ == module.__name__
        and not name.startswith("_")
    }


def test_every_function_has_an_entry():
    names = [name for _, name, _ in pkgutil.iter_modules(algorithms.__path__)]
    modules = [importlib.import_module(f"minialign.algorithms.{x}") for x in names]
    found = set().union(*map(own_functions, [*modules, logprobs]))
    reasons = set(" ".join(LEFT_OUT.values()).split())
    without = {f.__name__ for f in found if f not in OF}
    assert without == reasons, "tests/entries.py says what an entry needs"
    assert len(OF) == len(ENTRIES)


@pytest.mark.parametrize(
    "function, check",
    CHECKS,
    ids=[f"{OF[f].name}-{common.name_of(check)}" for f, check in CHECKS],
)
def test_it_passes(function, check):
    check(function)


# The harness: what it must not let through


def test_a_name_is_a_word_of_the_message():
    """A message about `masks` says nothing of an argument `mask`."""

    def refuses(x):
        raise ValueError("masks: expected something else")

    call = {"x": torch.zeros(1)}
    with pytest.raises(AssertionError, match="does not say which argument"):
        common.assert_refused(refuses, call, ValueError, "this", ["mask"])
    common.assert_refused(refuses, call, ValueError, "this", ["masks"])


def test_a_leak_through_a_sum_of_0_is_found():
    """Centred advantages add up to 0: weighed evenly, their slope is 0 all the same."""

    def leaking(rewards):
        return rewards - rewards.mean(1, keepdim=True)

    entry = next(entry for entry in ENTRIES if entry.name == "grpo.centred_advantages")
    leaf = torch.rand(2, 3, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(leaking(leaf).sum(), leaf)
    assert slope.abs().max() < 1e-15
    named = {common.name_of(check): check for check in entry.properties}
    for name in ("check_golden_vectors", "check_no_gradient_to"):
        assert common.refutes(named[name], leaking)
