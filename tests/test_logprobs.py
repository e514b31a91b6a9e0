"""Token log-probs and KL estimates: what is not the property of one function alone.

What each of them owes by itself is in tests/entries.py.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minialign.logprobs import (
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_ratio_k3,
    logprobs_from_logits,
    masked_sum,
    token_logprobs,
)
from minialign.model import GPT, GPTConfig
from tests import enumeration as world
from tests import strategies
from tests.properties import common
from tests.properties.logprobs import (
    FORWARD_GRADIENT,
    KL,
    KL_GRADIENT,
    LOGITS_PAIRS,
    OLD,
    POLICY,
    REF_LOGPROBS,
    REFERENCE,
    THREE,
    THREE_REF,
    ZERO,
    MemoryModel,
    TableModel,
    answers,
    check_expects_kl,
    check_sums_to_one,
    close,
    on_policy,
    per_token,
    random_model,
    score_by_hand,
    tensor,
    whole,
)

PAIR = strategies.batches(
    logprobs=strategies.logprobs, ref_logprobs=strategies.logprobs
)


# token_logprobs


@pytest.mark.parametrize("kind", [TableModel, MemoryModel])
def test_probabilities_of_all_continuations_sum_to_1(kind):
    check_sums_to_one(token_logprobs, kind)


def test_chain_rule():
    """Log p(y | x) = log p(y[:j] | x) + log p(y[j:] | x, y[:j])."""
    model, prompt, response = random_model(), (1,), (0, 2, 2, 1)

    def logprob(prompt, response):
        tokens, mask = answers(prompt, [response])
        return token_logprobs(model, tokens, mask).sum()

    whole = logprob(prompt, response)
    for j in range(1, len(response)):
        first, rest = response[:j], response[j:]
        parts = logprob(prompt, first) + logprob((*prompt, *first), rest)
        close(parts, whole)


@given(strategies.logits((2, 3, 4)), strategies.tensors((2, 3)))
def test_a_constant_on_all_logits_of_a_position_changes_nothing(logits, constant):
    targets = torch.tensor([[0, 1, 2], [3, 3, 0]])
    expected = logprobs_from_logits(logits, targets)
    assert (expected <= 0).all()
    close(logprobs_from_logits(logits + constant[..., None], targets), expected)


def test_golden_markov_table():
    """Three rows of probabilities, and their logarithms added by hand."""
    table = tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    tokens, mask = answers((2, 0), [(1, 1, 2), (2, 0, 0), (0,)])
    actual = token_logprobs(TableModel(table.log()), tokens, mask)
    expected = [
        [0, math.log(0.25), math.log(0.8), math.log(0.1)],
        [0, math.log(0.25), math.log(0.3), math.log(0.5)],
        [0, math.log(0.5), 0, 0],
    ]
    close(actual, tensor(expected))
    close(actual.sum(1).exp(), tensor([0.25 * 0.8 * 0.1, 0.25 * 0.3 * 0.5, 0.5]))


def test_temperature_sharpens():
    """At temperature T the odds are those of the power 1 / T."""
    table = tensor([[0.5, 0.3, 0.2]] * 3).log()
    tokens, mask = answers((0,), [(1,), (2,), (0,)])
    actual = token_logprobs(TableModel(table), tokens, mask, temperature=0.5)
    squares = tensor([[0.09], [0.04], [0.25]])
    close(actual.exp(), squares / squares.sum())


def test_the_prompt_is_read_and_the_padding_is_not():
    model = random_model()
    tokens, mask = answers((1, 0), [(0, 2), (1, 1, 1, 2)], pad=0)
    expected = token_logprobs(model, tokens, mask)
    other_pad, _ = answers((1, 0), [(0, 2), (1, 1, 1, 2)], pad=1)
    assert torch.equal(token_logprobs(model, other_pad, mask), expected)
    other_prompt, _ = answers((2, 0), [(0, 2), (1, 1, 1, 2)], pad=0)
    assert (token_logprobs(model, other_prompt, mask) != expected)[mask].all()
    wider = torch.cat((tokens, tokens), dim=1)
    wider_mask = torch.cat((mask, torch.zeros_like(tokens, dtype=torch.bool)), dim=1)
    actual = token_logprobs(model, wider, wider_mask)
    close(actual[:, : mask.shape[1]], expected)
    assert (actual[:, mask.shape[1] :] == 0).all()


def test_rows_alone_and_in_any_order():
    model = random_model()
    tokens, mask = answers((1, 0), world.RESPONSES)
    expected = token_logprobs(model, tokens, mask)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    close(token_logprobs(model, tokens[order], mask[order]), expected[order])
    for row in range(len(tokens)):
        one = slice(row, row + 1)
        close(token_logprobs(model, tokens[one], mask[one]), expected[one])


def test_only_live_positions_are_projected():
    model = random_model()
    tokens, mask = answers((1, 0, 0, 1), [(0, 2), (2,)])
    token_logprobs(model, tokens, mask)
    assert model.projected == mask.sum() == 3


def test_gradient_is_onehot_minus_softmax_at_live_slots():
    """The gradient of log π(y) in the logits, in closed form; EOS included."""
    table = tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    model = TableModel(table.log())
    tokens, mask = answers((0,), [(1, 2)])
    token_logprobs(model, tokens, mask).sum().backward()
    expected = [[-0.5, 0.75, -0.25], [-0.1, -0.8, 0.9], [0, 0, 0]]
    close(model.table.grad, tensor(expected))


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_junk_hidden_states_at_masked_positions_are_inert(junk):
    """Of the model's side too: neither value nor any gradient sees them."""
    tokens, mask = answers((1, 0), [(0, 2), (1, 1, 1, 2)])
    results = []
    for content in (0.0, junk):
        hidden = torch.ones(*mask.shape, 3, dtype=torch.float64)
        hidden = hidden.masked_fill(~mask[..., None], content).requires_grad_()
        model = random_model()
        model.forward = lambda tokens, hidden=hidden: hidden
        value = token_logprobs(model, tokens, mask)
        value.sum().backward()
        results.append((value.detach(), hidden.grad, model.table.grad))
    for a, b in zip(*results, strict=True):
        close(a, b)
    assert (results[1][1][~mask] == 0).all()
    assert (results[1][1][mask] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_float32(dtype):
    model = random_model(TableModel).to(dtype)
    tokens, mask = answers((1, 0), world.RESPONSES)
    actual = token_logprobs(model, tokens, mask)
    assert actual.dtype == torch.float32
    close(actual, token_logprobs(model.float(), tokens, mask))


def test_scoring_is_pure():
    """Modes, weights, tokens and every generator stay as they were."""
    model = random_model()
    model.add_module("dropout", torch.nn.Dropout(0.5).eval())
    tokens, mask = answers((1, 0), world.RESPONSES)
    case = {"tokens": tokens, "mask": mask}
    common.check_pure(partial(token_logprobs, model), st.just(case), model=model)


def test_the_real_model():
    """The contract with a GPT: sums to 1, reads no padding, trains every weight."""
    config = GPTConfig(
        vocab_size=3, context=8, dim=8, layers=2, heads=2, kv_heads=1, hidden=12
    )
    model = GPT(config, torch.Generator().manual_seed(0)).double()
    tokens, mask = answers((1, 0), world.RESPONSES, pad=0)
    actual = token_logprobs(model, tokens, mask)
    close(actual.sum(1).exp().sum(), tensor(1.0))
    other_pad, _ = answers((1, 0), world.RESPONSES, pad=2)
    assert torch.equal(token_logprobs(model, other_pad, mask), actual)
    b, s = mask.nonzero()[-1].tolist()
    close(actual[b, s], tensor(score_by_hand(model, tokens, b, s + 1)))
    (actual**2).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad.isfinite().all() and weight.grad.any(), name


# KL estimates


def test_k2_is_biased():
    """The harness tells estimates of KL from others."""
    assert common.refutes(check_expects_kl, kl_k2)
    assert (world.expectation(whole(kl_k2), POLICY) - KL).abs() > 0.05


@given(PAIR)
def test_signs_and_zeros(case):
    mask, d = case["mask"], case["logprobs"] - case["ref_logprobs"]
    k1, k2, k3 = (estimate(**case) for estimate in (kl_k1, kl_k2, kl_k3))
    assert torch.equal(k1.sign(), torch.where(mask, d.sign(), 0.0))
    assert (k2 >= 0).all() and (k3 >= 0).all()
    far = mask & (d.abs() > 1e-5)  # nearer, the square is below what float64 resolves
    assert (k2[far] > 0).all() and (k3[far] > 0).all()
    same = case | {"ref_logprobs": case["logprobs"]}
    for estimate in (kl_k1, kl_k2, kl_k3):
        assert (estimate(**same) == 0).all()
    assert (kl_ratio_k3(old_logprobs=case["ref_logprobs"], **same) == 0).all()


def test_the_four_gradients_are_different():
    """Or the table above could not fail."""
    assert KL_GRADIENT.abs().max() > 0.05
    assert world.cosine(KL_GRADIENT, FORWARD_GRADIENT) < 0.95


def off_policy(estimate):
    """Whole sequences drawn by OLD, weighted by policy / OLD, in value and gradient."""
    old = world.sequence_logprobs(OLD)[:, None]

    def value(rows, logprobs, mask):
        column = torch.ones(len(rows), 1, dtype=torch.bool)
        reference = REF_LOGPROBS[rows].sum(1, keepdim=True)
        policy = logprobs.sum(1, keepdim=True)
        return estimate(policy, old[rows], reference, column).sum()

    return value


def ratio_times(estimate):
    def weighted(logprobs, old_logprobs, ref_logprobs, mask):
        ratio = (logprobs - old_logprobs).exp()
        return ratio * estimate(logprobs, ref_logprobs, mask)

    return weighted


@pytest.mark.parametrize("weighted", [kl_ratio_k3, ratio_times(kl_k1)])
def test_the_ratio_makes_value_and_gradient_right_off_policy(weighted):
    """And not of k2."""
    close(world.expectation(off_policy(weighted), POLICY, behaviour=OLD), KL)
    slope = world.expected_gradient(off_policy(weighted), POLICY, behaviour=OLD)
    close(slope, KL_GRADIENT)


def test_the_ratio_does_not_mend_k2():
    loss = off_policy(ratio_times(kl_k2))
    slope = world.expected_gradient(loss, POLICY, behaviour=OLD)
    assert (slope - KL_GRADIENT).abs().max() > 0.05


def kl_of_choices(logits, reference, visits):
    """Σ over prefixes of how often each is visited x the KL of the choice there."""
    log_policy = torch.log_softmax(logits, -1)
    log_reference = torch.log_softmax(reference, -1)
    return (visits * (log_policy.exp() * (log_policy - log_reference)).sum(-1)).sum()


def visits(logits):
    """(7,): the probability that a response of this policy passes each prefix."""
    total = torch.zeros(len(world.PREFIXES), dtype=torch.float64)
    for weight, response in zip(
        world.probabilities(logits), world.RESPONSES, strict=True
    ):
        for t in range(len(response)):
            total[world.PREFIXES.index(response[:t])] += weight
    return total


def test_per_token_sums_miss_what_a_token_does_to_later_ones():
    """K2 and ratio x k3 have each choice's own KL gradient, k3 the forward.

    With the visits to each prefix held fixed; the KL gradient proper moves them too.
    """
    fixed = visits(POLICY)
    close(kl_of_choices(POLICY, REFERENCE, fixed), KL)
    local = world.gradient(lambda x: kl_of_choices(x, REFERENCE, fixed), POLICY)
    forward = world.gradient(lambda x: kl_of_choices(REFERENCE, x, fixed), POLICY)
    ratio_k3 = on_policy(kl_ratio_k3)
    expected = {kl_k1: ZERO, kl_k2: local, ratio_k3: local, kl_k3: forward}
    for estimate, slope in expected.items():
        close(world.expected_gradient(per_token(estimate), POLICY), slope)
    assert (local - KL_GRADIENT).abs().max() > 0.05
    assert (forward - FORWARD_GRADIENT).abs().max() > 0.05


def test_per_token_k2_is_k1_times_the_score():
    """Its expected gradient is E[Σ_t k1_t ∇ log π_t] ..."""

    def k1_times_score(rows, logprobs, mask):
        return (kl_k1(logprobs, REF_LOGPROBS[rows], mask).detach() * logprobs).sum()

    actual = world.expected_gradient(per_token(kl_k2), POLICY)
    close(actual, world.expected_gradient(k1_times_score, POLICY))


def test_reward_to_go_of_k1_has_the_whole_gradient():
    """... and k1 to go, detached, in the place of k1 recovers the rest."""

    def to_go(rows, logprobs, mask):
        k1 = kl_k1(logprobs, REF_LOGPROBS[rows], mask).detach()
        return (k1.flip(1).cumsum(1).flip(1) * logprobs).sum()

    close(world.expected_gradient(to_go, POLICY), KL_GRADIENT)


@given(PAIR)
def test_a_likelier_reference_lowers_k1(case):
    """The sign of the penalty."""
    nearer = case | {"ref_logprobs": case["ref_logprobs"] / 2 - 1e-3}
    moved = (nearer["ref_logprobs"] > case["ref_logprobs"]) & case["mask"]
    assert (kl_k1(**nearer) < kl_k1(**case))[moved].all()


# exact_kl


@given(LOGITS_PAIRS)
def test_exact_kl_against_loops(pair):
    """And it is never negative."""
    actual = exact_kl(*pair)
    for row in range(2):
        p, q = ([math.exp(x) for x in logits[row].tolist()] for logits in pair)
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        close(actual[row], tensor(expected))
    assert (actual >= -1e-14).all()
    assert (exact_kl(pair[0], pair[0]) == 0).all()


@given(LOGITS_PAIRS)
def test_exact_kl_adds_up_over_independent_choices(pair):
    """Two choices made apart are one choice among all pairs."""
    joint = [(x[0][:, None] + x[1][None, :]).flatten() for x in pair]
    close(exact_kl(*joint), exact_kl(*pair).sum())


def test_exact_kl_along_the_path_expects_the_sequence_kl():
    """With less noise than k1, for only the contexts are sampled."""
    exact = exact_kl(POLICY, REFERENCE)  # (7,)

    def path(rows, logprobs, mask):
        return masked_sum(exact[world.STATES[rows]], mask).sum()

    def squared(value):
        return lambda *args: value(*args) ** 2

    close(world.expectation(path, POLICY), KL)
    noise = world.expectation(squared(path), POLICY)
    assert noise < world.expectation(squared(per_token(kl_k1)), POLICY)


def test_exact_kl_in_half_precision_is_computed_in_float32():
    low = THREE.bfloat16(), THREE_REF.bfloat16()
    actual = exact_kl(*low)
    assert actual.dtype == torch.float32
    close(actual, exact_kl(*(x.float() for x in low)))
