"""The library against data/golden, value and gradient, and the vectors' own force."""

import ast
import inspect
import json
import math
import re
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minialign.algorithms import dpo
from tests import golden, mutants
from tests.entries import ENTRIES, called
from tests.golden import VECTORS
from tests.properties.common import refutes
from tests.properties.vectors import (
    as_arguments,
    cases,
    check_cases,
    check_golden_vectors,
    module_of,
    moved_by,
    ours,
)

# Public functions without vectors, and why.
LEFT_OUT = {
    "they refuse": "normaliser check_numbers",
    "loops, and what they loop over": """train batches learning_rate optimizers
        keep_latest keep_all keep_latest_with same_beta conjugate_gradients
        pairs_of rankings_of""",
    "a model answers, no formula": """score_tokens score_answers pair_logprobs
        mean_pair_logprobs reference_of_pairs sample_answers policy_gradient
        measured_kl score_choices
        surrogate_slope line_search scored_parts read_rankings""",
    "it changes a type": "at_least_float32",
    "they read texts": """summary style_shares answer_metrics working_of
        distinct_workings workings_differ""",
    "the value is a mean, the interval is drawn": "bootstrap",
}
ALGORITHMS = Path(dpo.__file__).parent.glob("[a-z]*.py")
ROOMS = ("logprobs", "intervals", "evaluation")
MODULES = (*ROOMS, *sorted(path.stem for path in ALGORITHMS))


ENTERED = {entry.name for entry in ENTRIES}  # they meet theirs in test_losses.py


@pytest.mark.parametrize("name", [name for name in VECTORS if name not in ENTERED])
def test_the_library_agrees(name):
    check_cases(ours(name), name)


FLOATS = [x for x in VECTORS if moved_by(as_arguments(x, cases(x)[0]["inputs"]))]


@pytest.mark.parametrize("name", FLOATS)
def test_the_library_agrees_in_float32(name):
    check_cases(ours(name), name, torch.float32)


# The vectors


def test_the_files_are_what_the_code_makes():
    files = golden.FOLDER.glob("*.json")
    there = {path.name: path.read_text(encoding="utf-8") for path in files}
    made = golden.files()
    assert there.keys() == made.keys()
    for name in made:
        assert there[name] == made[name], f"{name}: run python -m tests.golden"
    assert sum(len(text.encode()) for text in made.values()) < 1_500_000


def test_nothing_but_the_standard_library_makes_them():
    allowed = {"inspect", "json", "random", "collections", "decimal", "functools"}
    allowed |= {"itertools", "pathlib", "typing", "dataclasses"}
    for node in ast.walk(ast.parse(inspect.getsource(golden))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in allowed


def test_every_public_function_has_vectors_or_a_reason():
    found = set()
    for module in MODULES:
        for name, x in vars(module_of(module)).items():
            own = inspect.isfunction(x) and x.__module__.endswith(f".{module}")
            if own and not name.startswith("_"):
                found.add(f"{module}.{name}")
    reasons = set(" ".join(LEFT_OUT.values()).split())
    left_out = {name for name in found if name.split(".")[1] in reasons}
    assert reasons == {name.split(".")[1] for name in left_out}
    assert found == VECTORS.keys() | left_out
    assert not VECTORS.keys() & left_out


@pytest.mark.parametrize("name", VECTORS)
def test_there_are_at_least_12_different_cases(name):
    inputs = {json.dumps(case["inputs"]) for case in cases(name)}
    assert len(inputs) >= 12 and len(inputs) == len(cases(name))
    if "mask" in cases(name)[0]["inputs"]:
        sizes = [np.array(case["inputs"]["mask"]) for case in cases(name)]
        assert any(mask.size == 1 for mask in sizes)
        assert any(mask.size > 1 and mask.sum() == 1 for mask in sizes)


@pytest.mark.parametrize("name", [name for name in VECTORS if VECTORS[name].by])
def test_the_expected_slopes_are_those_of_the_expected_values(name):
    """By central differences, to 15 digits: there are 60 to lose. Not at kinks."""
    oracle, step = VECTORS[name].oracle, Decimal("1e-20")

    def output(case, argument, path, by):
        call = {k: golden.lifted(x, (k,), False) for k, x in case["inputs"].items()}
        leaf = call[argument]
        for index in path:
            leaf = leaf[index]
        leaf.value += by
        found = oracle(**call)
        return golden.weighed(case["upstream"], found) if "upstream" in case else found

    with localcontext(golden.PRECISION):
        for case in cases(name)[1:4] + cases(name)[-1:]:
            if "kink" in case["note"]:
                continue
            for argument, slopes in case["gradients"].items():
                for path in np.ndindex(np.shape(slopes)):
                    ends = [output(case, argument, path, by) for by in (step, -step)]
                    slope = float((ends[0].value - ends[1].value) / (2 * step))
                    expected = np.array(slopes)[path]
                    assert abs(slope - expected) <= 1e-15 * (1 + abs(expected))


@pytest.mark.parametrize(
    "name, note, expected",
    [
        ("ppo.gae", "0.7655, 0.49, 0.2", [[0.7655, 0.49, 0.2]]),
        ("logprobs.logprobs_from_logits", "equal logits: log V", [-math.log(5)] * 2),
        ("logprobs.exact_kl", "policy is the reference", [0.0, 0.0]),
        ("rloo.leave_one_out", "one right of four", [[1.0, -1 / 3, -1 / 3, -1 / 3]]),
        ("grpo.centred_advantages", "seven times 0.1: exactly 0", [[0.0] * 7]),
        ("dpo.dpo_loss", "policy is the reference", math.log(2)),
        ("dpo.dpo_loss", "the minimum: h = 1/(2 β)", 0.0),
        ("dpo.ipo", "told apart; β = 0.1", [16.0]),
        ("dpo.robust", "told apart; β = 1.0", [-0.02007164581]),
        ("dpo.logistic", "told apart; β = 0.1", [0.64439666]),
        ("rrhf.ranking_loss", "by hand: 0.4", 0.4),
        ("ppo.explained_variance", "a perfect guess: 1", 1.0),
        ("ppo.value_loss", "moved by more than the clip, towards R: flat", 0.28125),
        ("ppo.value_loss", "moved by more than the clip, away from R: not flat", 1.125),
        ("evaluation.maj_at_k", "runs wrap round", [0.5]),
        ("evaluation.maj_at_k", "who abstains does not count", [1.0]),
        ("intervals.over_seeds", "all equal: no width", [0.25] * 3),
    ],
)
def test_what_is_known_by_hand(name, note, expected):
    found = [case["expected"] for case in cases(name) if case["note"] == note]
    assert found and np.abs(np.array(found[0]) - expected).max() < 1e-8


def test_the_readme_is_right(monkeypatch):
    text = (golden.FOLDER / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(golden.FOLDER.parents[1])
    exec(example, {})  # noqa: S102 (it is our own README)
    wrong = example.replace("** 2 / 2", "** 2")
    assert wrong != example
    with pytest.raises(AssertionError):
        exec(wrong, {})  # noqa: S102


# What a wrong version meets


@pytest.mark.parametrize("name", VECTORS)
def test_1e_9_more_is_wrong(name):
    function = ours(name)

    def more(**call):
        output = function(**call)
        output = output if isinstance(output, Tensor) else np.array(output)
        if output.dtype in (torch.bool, torch.int64):
            return output.long() + 1
        return output + 1e-9

    with pytest.raises(AssertionError):
        check_cases(more, name)


@pytest.mark.parametrize("name", [name for name in VECTORS if VECTORS[name].by])
@pytest.mark.parametrize("share", [1e-9, -1.0])
def test_a_right_value_with_a_wrong_slope_is_wrong(name, share):
    function = ours(name)

    def steeper(**call):
        output = function(**call)
        return output + share * (output - output.detach())

    with pytest.raises(AssertionError, match="'s slope"):
        check_cases(steeper, name)


MASKED = [name for name in VECTORS if "mask" in cases(name)[0]["inputs"]]


@pytest.mark.parametrize("name", MASKED)
def test_a_forgotten_mask_is_wrong(name):
    function = ours(name)

    def unmasked(mask, **call):
        return function(mask=torch.ones_like(mask), **call)

    with pytest.raises((AssertionError, ValueError)):  # log-probabilities of 1000
        check_cases(unmasked, name)


def constants(name: str) -> list[str]:
    """Arguments that are tables of floats and have no gradient."""
    call = as_arguments(name, cases(name)[0]["inputs"])
    return [k for k in moved_by(call) if k not in VECTORS[name].by]


LEAKS = [(name, argument) for name in VECTORS for argument in constants(name)]


@pytest.mark.parametrize("name, argument", LEAKS)
def test_a_gradient_to_a_constant_is_wrong(name, argument):
    function = ours(name)

    def leaking(**call):
        x = call[argument]
        output = torch.as_tensor(function(**call), dtype=torch.float64)
        return output + (x - x.detach()).sum()

    with pytest.raises(AssertionError, match=f"a gradient reaches {argument}"):
        check_cases(leaking, name)


# Wrong versions that somebody wrote: tests/mutants.py. These the vectors do not see.

UNSEEN = {
    "no case has junk that multiplies to nan, for JSON has none": [
        mutants.token_mean_by_multiplication,
        mutants.reinforce_loss_by_multiplication,
        mutants.remax_loss_masked_late,
    ],
    "no case has a token of -1000 nats": [mutants.reinforce_loss_of_likely_tokens],
    "no pair is 1000 nats apart": [mutants.dpo_loss_by_two_steps],
    "no case is in half precision": [mutants.logprobs_from_logits_cooled_in_half],
    "no case is in float32": [
        mutants.kl_k3_rounded,
        mutants.leave_one_out_rounded,
        mutants.whiten_by_raw_moments,
    ],
    "no case is refused": [
        mutants.masked_sum_that_broadcasts,
        mutants.probability_ratio_without_bound,
        mutants.shape_rewards_not_looking_at_no_price,
    ],
    "what it gives is right": [mutants.leave_one_out_in_place],
    "no case is on the very edge of a band": [mutants.policy_loss_flat_on_the_edge],
    "no case is decided by lot": [
        mutants.make_pairs_without_lots,
        mutants.make_pairs_by_torch_s_dice,
        mutants.select_best_first,
        mutants.select_top_first,
        mutants.select_random_by_answers,
        mutants.select_random_of_the_right,
    ],
}


@pytest.mark.parametrize("wrong", mutants.MUTANTS, ids=lambda wrong: wrong.__name__)
def test_a_mutant_is_seen_or_there_is_a_reason(wrong):
    name = called(mutants.MUTANTS[wrong])
    unseen = [each for some in UNSEEN.values() for each in some]
    if name not in VECTORS:
        assert wrong not in unseen
    else:
        seen = refutes(check_golden_vectors, wrong, name=name)
        assert seen == (wrong not in unseen)
