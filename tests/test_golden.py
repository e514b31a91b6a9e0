"""The library against data/golden, value and gradient, and the vectors' own force."""

import ast
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minialign.algorithms import dpo, rrhf
from minialign.algorithms.grpo import centred_advantages
from minialign.algorithms.ppo import gae
from minialign.algorithms.remax import code_returns
from minialign.logprobs import (
    kl_k3,
    masked_mean,
    probability_ratio,
    token_logprobs,
    token_mean,
)
from tests import golden
from tests.golden import VECTORS

# |ours - expected| <= this x (1 + |expected|), as data/golden/README.md promises.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}

# Public functions without vectors, and why.
LEFT_OUT = {
    "checks": """check_shapes check_mask check_live check_logprobs check_rows
        check_groups check_tokens check_settings check_reference normaliser""",
    "loops, and what they loop over": """train batches learning_rate optimizers
        keep_latest keep_all""",
    "a model answers, no formula": """score_tokens pair_logprobs sample_answers
        policy_gradient measured_kl""",
    "they read texts": "summary style_shares answer_metrics",
    "the value is a mean, the interval is drawn": "bootstrap",
}
ALGORITHMS = Path(dpo.__file__).parent.glob("[a-z]*.py")
MODULES = ("logprobs", "evaluation", *sorted(path.stem for path in ALGORITHMS))


@cache
def committed(module: str) -> dict[str, dict]:
    text = (golden.FOLDER / f"{module}.json").read_text(encoding="utf-8")
    return {entry["function"]: entry for entry in json.loads(text)["functions"]}


def cases(name: str) -> list[dict]:
    module, function = name.split(".")
    assert function in committed(module), f"{name}: run python -m tests.golden"
    return committed(module)[function]["cases"]


# Calling our functions


class Table:
    """A model whose logits are given, whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        self.given = logits

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.given[:, : tokens.shape[1]]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def named(argument, module, f):
    """The files name a function where ours take the function."""
    return lambda **call: f(**call | {argument: getattr(module, call[argument])})


def asked(f, logits, **call):
    return f(Table(logits), **call)


def given_lots(f):
    return lambda **call: f(**call, generator=torch.Generator())


def value_of(f):
    return lambda **call: f(**call).value


ADAPTED = {
    "logprobs.token_logprobs": lambda f: partial(asked, f),
    "dpo.dpo_loss": partial(named, "per_pair", dpo),
    "rrhf.rrhf_loss": partial(named, "scoring", rrhf),
    "dpo.make_pairs": given_lots,
    "rejection_sampling.select_right": given_lots,
    "rejection_sampling.select_best": given_lots,
    "rejection_sampling.select_top": given_lots,
    "rejection_sampling.select_random": lambda f: (
        lambda **call: given_lots(f)(**call).sum()
    ),
    "evaluation.difference": value_of,
    "evaluation.gap_closed": value_of,
    "evaluation.reward_variance_share": value_of,
    "evaluation.dead_share": value_of,
    "evaluation.over_seeds": lambda f: lambda **call: [*vars(f(**call)).values()],
}


def module_of(name: str):
    room = name in ("logprobs", "evaluation")
    return importlib.import_module(f"minialign{'' if room else '.algorithms'}.{name}")


def adapted(name: str, function: Callable) -> Callable:
    """The function, called as the files call it."""
    return ADAPTED.get(name, lambda f: f)(function)


def ours(name: str) -> Callable:
    module, function = name.split(".")
    return adapted(name, getattr(module_of(module), function))


def tensor(x) -> Tensor:
    """float64, int64 or bool; infinity is the text "inf"."""
    array = np.array(x)
    return torch.tensor(array.astype(float) if array.dtype.kind == "U" else array)


def as_arguments(name: str, inputs: dict, dtype=torch.float64) -> dict:
    """Lists as tensors where the function takes them; the floats of these as leaves."""
    if name.startswith(golden.STATISTICS) and name != "evaluation.signal_to_noise":
        return dict(inputs)
    call = dict(inputs)
    for argument, x in inputs.items():
        if isinstance(x, list) and argument != "counts":
            call[argument] = tensor(x)
            if call[argument].is_floating_point():
                call[argument] = call[argument].to(dtype).requires_grad_()
    return call


def moved_by(call: dict) -> dict:
    """The tables of floats: their gradients are looked at."""
    return {k: x for k, x in call.items() if getattr(x, "requires_grad", False)}


def same(what: str, actual, expected, tolerance: float) -> None:
    """Same shape and numbers; nan equals nothing."""
    is_tensor = isinstance(actual, Tensor)
    a = actual.detach() if is_tensor else torch.tensor(np.array(actual))
    b = tensor(expected)
    if b.is_floating_point() and b.numel():
        options = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
        torch.testing.assert_close(a, b, **options, msg=lambda why: f"{what}: {why}")
    else:
        assert a.tolist() == expected, f"{what}: {a.tolist()}, expected {expected}"


def check(name: str, function: Callable, dtype=torch.float64) -> None:
    """All cases: value and slopes; none to a constant, exactly 0 where masked."""
    for case in cases(name):
        what = f"{name}, {case['note']!r}"
        if dtype == torch.float32 and "1e-9" in case["note"]:
            continue
        call = as_arguments(name, case["inputs"], dtype)
        output = function(**call)
        same(what, output, case["expected"], TOLERANCE[dtype])
        leaves = moved_by(call)
        slopes = dict.fromkeys(leaves)
        if getattr(output, "requires_grad", False):
            weighed = (output * tensor(case.get("upstream", 1.0))).sum()
            found = torch.autograd.grad(weighed, [*leaves.values()], allow_unused=True)
            slopes = dict(zip(leaves, found, strict=True))
        for argument, slope in slopes.items():
            if argument not in case["gradients"]:
                assert slope is None or not slope.any(), f"{what}: moves {argument}"
                continue
            assert slope is not None, f"{what}: does not move {argument}"
            expected = case["gradients"][argument]
            same(f"{what}: {argument}'s slope", slope, expected, TOLERANCE[dtype])
            if "mask" in call and slope.shape == call["mask"].shape:
                unseen = slope[~call["mask"]]
                assert not unseen.any(), f"{what}: {argument} moves where masked"


@pytest.mark.parametrize("name", VECTORS)
def test_the_library_agrees(name):
    check(name, ours(name))


FLOATS = [x for x in VECTORS if moved_by(as_arguments(x, cases(x)[0]["inputs"]))]


@pytest.mark.parametrize("name", FLOATS)
def test_the_library_agrees_in_float32(name):
    check(name, ours(name), torch.float32)


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
        ("dpo.logistic", "told apart; β = 0.1", [0.64439666]),
        ("rrhf.ranking_loss", "by hand: 0.4", 0.4),
        ("ppo.explained_variance", "a perfect guess: 1", 1.0),
        ("ppo.value_loss", "moved by more than the clip, towards R: flat", 0.28125),
        ("ppo.value_loss", "moved by more than the clip, away from R: not flat", 1.125),
        ("evaluation.maj_at_k", "runs wrap round", [0.5]),
        ("evaluation.maj_at_k", "who abstains does not count", [1.0]),
        ("evaluation.over_seeds", "all equal: no width", [0.25] * 3),
    ],
)
def test_what_is_known_by_hand(name, note, expected):
    found = [case["expected"] for case in cases(name) if case["note"] == note]
    assert found and np.abs(np.array(found[0]) - expected).max() < 1e-8


def test_the_readme_is_right(monkeypatch):
    text = (golden.FOLDER / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(golden.FOLDER.parents[1])
    exec(example, {})
    wrong = example.replace("** 2 / 2", "** 2")
    assert wrong != example
    with pytest.raises(AssertionError):
        exec(wrong, {})


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
        check(name, more)


@pytest.mark.parametrize("name", [name for name in VECTORS if VECTORS[name].by])
@pytest.mark.parametrize("share", [1e-9, -1.0])
def test_a_right_value_with_a_wrong_slope_is_wrong(name, share):
    function = ours(name)

    def steeper(**call):
        output = function(**call)
        return output + share * (output - output.detach())

    with pytest.raises(AssertionError, match="'s slope"):
        check(name, steeper)


MASKED = [name for name in VECTORS if "mask" in cases(name)[0]["inputs"]]


@pytest.mark.parametrize("name", MASKED)
def test_a_forgotten_mask_is_wrong(name):
    function = ours(name)

    def unmasked(mask, **call):
        return function(mask=torch.ones_like(mask), **call)

    with pytest.raises((AssertionError, ValueError)):  # log-probabilities of 1000
        check(name, unmasked)


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

    with pytest.raises(AssertionError, match=f"moves {argument}"):
        check(name, leaking)


def test_a_leak_through_a_sum_of_0_is_wrong():
    """Weighed evenly, advantages that add up to 0 have no slope: it would pass."""

    def leaking(rewards):
        return rewards - rewards.mean(1, keepdim=True)

    with pytest.raises(AssertionError, match="moves rewards"):
        check("grpo.centred_advantages", leaking)


# Wrong versions that somebody wrote, each beside the function it passed for.


def kl_k3_inverted(logprobs, ref_logprobs, mask):
    """π / π_ref for π_ref / π."""
    return kl_k3(ref_logprobs.clamp(max=0), logprobs, mask)


def kl_ratio_k3_held(logprobs, old_logprobs, ref_logprobs, mask):
    """The ratio is 1, "so its gradient cannot matter"."""
    ratio = probability_ratio(logprobs.detach(), old_logprobs, mask)
    return ratio * kl_k3(logprobs, ref_logprobs, mask)


def exact_kl_of_fixed_weights(logits, ref_logits):
    """The right value, and a gradient of 0."""
    policy = logits.log_softmax(-1)
    gap = policy - ref_logits.detach().log_softmax(-1)
    return (policy.exp().detach() * gap).sum(-1)


def token_logprobs_unshifted(model, tokens, mask, temperature):
    """Scores the token that was read, not the one that was chosen."""
    read = torch.cat((tokens[:, :1], tokens[:, :-1]), 1)
    return token_logprobs(model, read, mask, temperature)


def sequence_mean_of_all_rows(x, mask, count):
    """Counts rows without a live token."""
    return masked_mean(x, mask).sum() / (count or len(mask))


def leave_one_out_with_itself(rewards):
    return (rewards - rewards.mean(1, keepdim=True)).detach()


def group_advantages_of_the_population(rewards, epsilon):
    """Divisor K in the std."""
    centred = centred_advantages(rewards)
    std = centred.std(1, correction=0, keepdim=True)
    return torch.where(std > 0, centred / (std + epsilon), 0.0)


def code_returns_from_the_next_token(advantages, k1, mask, beta):
    """n does not count s itself."""
    kl = torch.where(mask, beta * k1.detach(), 0.0)
    return (code_returns(advantages, k1, mask, beta) + kl) / 0.99 - kl


def clip(logprobs, old_logprobs, advantages, mask, low, high, worse=torch.minimum):
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    A = torch.where(mask, advantages.detach()[:, None], 0.0)
    return -worse(ratio * A, ratio.clamp(low, high) * A)


def clipped_loss_optimistic(eps_low, eps_high, **call):
    """The larger of the two."""
    return clip(**call, low=1 - eps_low, high=1 + eps_high, worse=torch.maximum)


def clipped_loss_swapped(eps_low, eps_high, **call):
    """eps_low above, eps_high below."""
    return clip(**call, low=1 - eps_high, high=1 + eps_low)


def clipped_loss_one_sided(eps_low, eps_high, **call):
    return clip(**call, low=None, high=1 + eps_high)


def gae_through_masked_slots(token_rewards, values, mask, gamma, lam):
    """Masked slots are steps of reward 0 and value 0."""
    inner = [torch.where(mask, x.detach(), 0.0) for x in (token_rewards, values)]
    return torch.where(mask, gae(*inner, torch.ones_like(mask), gamma, lam), 0.0)


def whiten_with_bessel(x, mask):
    live = x[mask].detach()
    spread = live.var(correction=int(len(live) > 1))
    scaled = (live - live.mean()) / (spread + 1e-8).sqrt()
    return torch.zeros_like(x).masked_scatter(mask, scaled)


def value_loss_optimistic(values, old_values, returns, mask, clip, count):
    """The smaller of the two squares."""
    v, old, R = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    old, limit = old.detach(), float("inf") if clip is None else clip
    squares = v - R.detach(), old + (v - old).clamp(-limit, limit) - R.detach()
    each = torch.minimum(squares[0] ** 2, squares[1] ** 2)
    return 0.5 * token_mean(each, mask, count)


def dpo_loss_without_reference(ref_chosen_logprobs, ref_rejected_logprobs, **call):
    zeros = torch.zeros_like(ref_chosen_logprobs)
    call |= {"ref_chosen_logprobs": zeros, "ref_rejected_logprobs": zeros}
    return dpo.dpo_loss(**call)


def scores_of_the_padded_width(logprobs, mask):
    """Divides by all slots."""
    return torch.where(mask, logprobs, 0.0).mean(1)


def ranking_loss_of_ties(scores, rewards, margin, count):
    """Equal rewards make pairs too."""
    pairs = rewards[:, :, None] <= rewards[:, None, :]
    pairs &= ~torch.eye(rewards.shape[1], dtype=torch.bool)
    gaps = margin + scores[:, :, None] - scores[:, None, :]
    return torch.relu(gaps)[pairs].sum() / (count or len(scores))


def pass_at_k_with_replacement(correct, k):
    """1 - (1 - c / n)^k is biased."""
    return 1 - (1 - np.mean(correct, 1)) ** k


def best_of_n_without_ties(scores, values, n):
    """Equal scores: the last wins."""
    order = np.argsort(scores, 1, kind="stable")
    K = order.shape[1]
    weights = np.array([math.comb(i, n - 1) for i in range(K)]) / math.comb(K, n)
    return np.take_along_axis(np.array(values), order, 1) @ weights


WRONG = {
    "logprobs.kl_k3": [kl_k3_inverted],
    "logprobs.kl_ratio_k3": [kl_ratio_k3_held],
    "logprobs.exact_kl": [exact_kl_of_fixed_weights],
    "logprobs.token_logprobs": [token_logprobs_unshifted],
    "logprobs.sequence_mean": [sequence_mean_of_all_rows],
    "rloo.leave_one_out": [leave_one_out_with_itself],
    "grpo.group_advantages": [group_advantages_of_the_population],
    "remax.code_returns": [code_returns_from_the_next_token],
    "grpo.clipped_loss": [
        clipped_loss_optimistic,
        clipped_loss_swapped,
        clipped_loss_one_sided,
    ],
    "ppo.gae": [gae_through_masked_slots],
    "ppo.whiten": [whiten_with_bessel],
    "ppo.value_loss": [value_loss_optimistic],
    "dpo.dpo_loss": [dpo_loss_without_reference],
    "rrhf.scores": [scores_of_the_padded_width],
    "rrhf.ranking_loss": [ranking_loss_of_ties],
    "evaluation.pass_at_k": [pass_at_k_with_replacement],
    "evaluation.best_of_n": [best_of_n_without_ties],
}
PAIRS = [(name, wrong) for name, versions in WRONG.items() for wrong in versions]


@pytest.mark.parametrize("name, wrong", PAIRS, ids=[f.__name__ for _, f in PAIRS])
def test_a_wrong_version_fails(name, wrong):
    with pytest.raises(AssertionError):  # by its numbers: it refuses nothing
        check(name, adapted(name, wrong))
