"""GRPO: its expected gradient by enumeration, its parts, and training."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minialign.algorithms import grpo
from minialign.algorithms.grpo import (
    by_constant,
    centred_advantages,
    clipped_loss,
    group_advantages,
    k1_term,
    k2_term,
    k3_term,
    per_sequence,
    per_token,
)
from minialign.logprobs import kl_ratio_k3, probability_ratio
from minialign.sampling import generate
from tests import enumeration as world
from tests import strategies
from tests.methods import METHODS
from tests.properties import common, training
from tests.toy import (
    PROBLEMS,
    TOKENIZER,
    base,
    base_weights,
    generator,
    judged,
    never,
    stretched,
    token_nats,
)

# Part 1: the expected gradient, over 15 responses (tests/enumeration.py)

LOGITS, REFERENCE = world.random_logits(0), world.random_logits(1)
REF_LOGPROBS = world.token_logprobs(REFERENCE)  # (15, 3)
REWARDS = world.random_logits(2).flatten()[:15]  # any numbers will do
VERDICTS = (REWARDS > 0.3).double()  # right or wrong


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def ascent(advantage, reduction=by_constant, sign=1):
    """(7, 3): what a group of two fresh answers moves the policy along: -E[∇ loss]."""

    def loss(rows, logprobs, mask):
        A = advantage(REWARDS[rows][None])[0]  # (2,)
        losses = clipped_loss(logprobs, logprobs.detach(), A, mask)
        return sign * (reduction(mask, 4) * losses).sum()

    return -world.expected_gradient(loss, LOGITS, 2)


def ascent_of_groups(advantage, K, rewards):
    """(7, 3): of K answers, each summed over its tokens; all tuples in one call."""
    rows = torch.cartesian_prod(*[torch.arange(15)] * K)  # (15^K, K)
    chance = world.probabilities(LOGITS)[rows].prod(1, keepdim=True)  # (15^K, 1)
    weight = torch.zeros(15, dtype=torch.float64)
    each = chance * advantage(rewards[rows]) / K  # (15^K, K)
    weight.index_add_(0, rows.flatten(), each.flatten())
    return world.gradient(lambda x: weight @ world.sequence_logprobs(x), LOGITS)


def test_centred_by_a_constant_is_a_rescaling_of_the_true_gradient():
    """PG-3, PG-6, X-3: by (K - 1)/K, for the answer is part of its own mean."""
    expected = world.true_gradient(LOGITS, REWARDS)
    close(ascent(centred_advantages), expected / 2 / 4)
    for K in (2, 3, 4):
        found = ascent_of_groups(centred_advantages, K, REWARDS)
        close(found, (K - 1) / K * expected)


def test_the_std_turns_the_gradient():
    """PG-4, negative control: of two answers only who is better is left."""
    expected = world.true_gradient(LOGITS, REWARDS)
    assert world.cosine(ascent(group_advantages), expected) < 0.98
    assert world.cosine(ascent(centred_advantages), expected) > 1 - 1e-12


@pytest.mark.parametrize("K", [2, 3, 4])
def test_of_right_or_wrong_the_std_only_weighs_the_problem(K):
    """One problem with chance p: the gradient of p, times

    Σ_c Bin(c; K, p) c (K - c) / K² / (s_c + 1e-4) / (p (1 - p)), s_c the sample std.
    """
    p = (world.probabilities(LOGITS) * VERDICTS).sum().item()
    weight = 0.0
    for c in range(1, K):
        chance = math.comb(K, c) * p**c * (1 - p) ** (K - c)
        std = math.sqrt(c * (K - c) / K / (K - 1))
        weight += chance * c * (K - c) / K**2 / (std + 1e-4) / (p * (1 - p))
    expected = weight * world.true_gradient(LOGITS, VERDICTS)
    close(ascent_of_groups(group_advantages, K, VERDICTS), expected)
    assert 0.2 < p < 0.8 and abs(weight - (K - 1) / K) > 0.1


@pytest.mark.parametrize("reduction", [per_sequence, per_token])
def test_dividing_by_lengths_turns_the_gradient(reduction):
    """PG-5, negative control: these divisors depend on what the policy answered."""
    expected = world.true_gradient(LOGITS, REWARDS)
    actual = ascent(centred_advantages, reduction)
    assert 1 - world.cosine(actual, expected) > 1e-3
    assert 1 - world.cosine(ascent(centred_advantages), expected) < 1e-12


def test_a_flipped_sign_descends():
    expected = world.true_gradient(LOGITS, REWARDS)
    assert world.cosine(ascent(centred_advantages, sign=-1), expected) < -0.999


def kl_gradient(term, reduction=by_constant):
    """(7, 3): E[∇ Σ_t term_t] on fresh samples, or with other weights."""

    def loss(rows, logprobs, mask):
        args = logprobs, logprobs.detach(), REF_LOGPROBS[rows], mask
        return 4 * (reduction(mask, 4) * term(*args)).sum()

    return world.expected_gradient(loss, LOGITS)


def choice_by_choice(divergence):
    """(7, 3): ∇ Σ_prefixes chance of coming by x divergence of the choice there."""
    live = world.probabilities(LOGITS)[:, None].expand(15, 3)[world.MASK]
    visits = torch.zeros(7, dtype=torch.float64)
    visits.index_add_(0, world.STATES[world.MASK], live)

    def total(logits):
        policy, reference = logits.log_softmax(-1), REFERENCE.log_softmax(-1)
        return (visits * divergence(policy, reference)).sum()

    return world.gradient(total, LOGITS)


def reverse(policy, reference):
    return (policy.exp() * (policy - reference)).sum(-1)


def forward(policy, reference):
    return reverse(reference, policy)


def nothing(policy, reference):
    return 0.0 * policy.sum(-1)


@pytest.mark.parametrize(
    "term, divergence",
    [
        (k1_term, nothing),
        (k2_term, reverse),
        (k3_term, forward),
        (kl_ratio_k3, reverse),
    ],
)
def test_each_kl_term_has_the_gradient_it_claims(term, divergence):
    """KL-5 to KL-9, T46: and none of them that of the KL over whole answers."""
    close(kl_gradient(term), choice_by_choice(divergence))
    whole = world.gradient(lambda x: world.sequence_kl(x, REFERENCE), LOGITS)
    assert (kl_gradient(term) - whole).abs().max() > 0.02
    # The control: divided by lengths, k1 has a gradient, the others have another one.
    divided, claim = kl_gradient(term, per_sequence), choice_by_choice(divergence)
    assert divided.norm() > 0.01
    assert term is k1_term or 1 - world.cosine(divided, claim) > 1e-3


def test_k1_divided_by_lengths_pays_for_length_whatever_the_reference():
    """E[(1 / |y|) ∇ log π(y)] = ∇ E[1 / |y|]: descent makes answers longer."""
    slope = world.gradient(
        lambda x: world.probabilities(x) @ (1 / world.MASK.sum(1).double()), LOGITS
    )
    close(kl_gradient(k1_term, per_sequence), 4 * slope)


# Part 2: advantages, weights and the clip

float64 = partial(torch.tensor, dtype=torch.float64)
exact = partial(group_advantages, epsilon=0.0)


def leave_one_out(rewards):
    """RLOO, by the book: each minus the mean of the others."""
    rows = []
    for row in rewards.tolist():
        others = [row[:i] + row[i + 1 :] for i in range(len(row))]
        rows.append([r - sum(o) / len(o) for r, o in zip(row, others, strict=True)])
    return float64(rows)


def test_advantages_by_hand():
    """The golden numbers: they tell K - 1 from K in the std (ADV-6)."""
    rewards = float64([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    a, centred = math.sqrt(3) / 2, [[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25]]
    close(exact(rewards), float64([[a, -a, -a, a], [1.5, -0.5, -0.5, -0.5]]))
    close(centred_advantages(rewards), float64(centred))
    std = math.sqrt(1 / 3)
    close(group_advantages(rewards)[0], exact(rewards)[0] * std / (std + 1e-4))
    close(exact(float64([[3.0, 1.0]])), float64([[1, -1]]) / math.sqrt(2))


@settings(max_examples=25)
@given(strategies.groups())
def test_advantages_of_any_group(rewards):
    """ADV-1, 4, 6, 7 and X-4."""
    K = rewards.shape[1]
    centred, scaled = centred_advantages(rewards), exact(rewards)
    close(centred, (K - 1) / K * leave_one_out(rewards))
    close(centred, scaled * rewards.std(1, keepdim=True))
    unequal = rewards.amax(1) > rewards.amin(1)
    close(scaled.sum(1), 0.0)
    close(scaled.square().sum(1), torch.where(unequal, K - 1.0, 0.0))
    assert scaled.abs().max() <= (K - 1) / math.sqrt(K) + 1e-9
    assert (group_advantages(rewards).abs() <= scaled.abs() + 1e-12).all()


@settings(max_examples=25)
@given(strategies.groups(max_prompts=2), st.sampled_from([-3.0, 0.25, 40.0]))
def test_advantages_know_their_own_group_only(rewards, number):
    """ADV-5, ADV-8, T50: another group changes nothing, nor does a constant."""
    for advantage in (centred_advantages, group_advantages):
        own = advantage(rewards)
        close(advantage(rewards[:1]), own[:1])
        close(advantage(rewards.flip(1)), own.flip(1))
        close(advantage(rewards + number), own)
    close(centred_advantages(number * rewards), number * centred_advantages(rewards))
    sign = math.copysign(1.0, number)
    close(exact(number * rewards), sign * exact(rewards))
    s = rewards.std(1, keepdim=True)  # (P, 1)
    law = (s + 1e-4) / (s + 1e-4 / abs(number))
    close(group_advantages(number * rewards), sign * group_advantages(rewards) * law)


@pytest.mark.parametrize("value", [0.1, 123.456, 1 / 3, -7e-5, 0.0])
@pytest.mark.parametrize("advantage", [centred_advantages, group_advantages, exact])
def test_equal_rewards_give_exact_zeros(advantage, value):
    """ADV-9, T51: in float32, where their mean is not their value."""
    for K in range(2, 65):
        zeros = advantage(torch.full((2, K), value))
        assert (zeros == 0).all()


def test_a_std_of_rounding_would_be_found():
    """The negative control: the plain formula makes noise of unit size."""
    rewards = torch.full((1, 7), 0.1)
    plain = (rewards - rewards.mean(1)) / (rewards.std(1) + 1e-8)
    assert plain.abs().max() > 0.1


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 2, 2), (0, 2), (2, 0), ()])
def test_rewards_of_another_shape_are_refused(shape):
    """ADV-12."""
    for advantage in (centred_advantages, group_advantages):
        case = {"rewards": torch.zeros(shape)}
        common.assert_refused(advantage, case, ValueError, f"{shape}", ["rewards"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_and_epsilon_must_be_finite(bad):
    case = {"rewards": float64([[0.0, bad]])}
    common.assert_refused(group_advantages, case, ValueError, "bad", ["rewards"])
    for epsilon in (bad, -1e-9):
        with pytest.raises(ValueError, match="epsilon: got"):
            group_advantages(float64([[0.0, 1.0]]), epsilon)
    for dtype in (torch.int64, torch.bfloat16):
        with pytest.raises(TypeError, match="rewards"):
            centred_advantages(torch.zeros((1, 2), dtype=dtype))


def test_no_gradient_through_the_advantages():
    rewards = float64([[0.0, 1.0]]).requires_grad_()
    assert not group_advantages(rewards).requires_grad
    assert not centred_advantages(rewards).requires_grad


MASK = torch.tensor([[False, True, True, True], [True, False, False, False]])


def test_weights_by_hand():
    """Answers of 3 and 1 tokens: each answer 1/2, or each token 1/4, or 1/(2 x 10)."""
    close(per_sequence(MASK, 10)[0], float64([0, 1, 1, 1]) / 6)
    close(per_sequence(MASK, 10)[1], float64([1, 0, 0, 0]) / 2)
    close(per_token(MASK, 10), MASK.double() / 4)
    close(by_constant(MASK, 10), MASK.double() / 20)


@settings(max_examples=25)
@given(strategies.shapes().flatmap(strategies.masks))
def test_weights_of_any_mask(mask):
    """C-3, C-5, C-12: what is reduced is 1 everywhere; dead rows count nowhere."""
    rows, live = mask.any(1).double(), mask.sum(1).double()
    B = rows.sum()
    close(per_sequence(mask, 9).sum(1), rows / B)
    close(per_token(mask, 9).sum(1), live / live.sum())
    close(by_constant(mask, 9).sum(1), live / B / 9)
    for reduction in (per_sequence, per_token, by_constant):
        weights = reduction(mask, 9)
        assert weights.dtype == torch.float64 and (weights[~mask] == 0).all()
        close(reduction(mask.flip(0), 9), weights.flip(0))
        close(reduction(torch.cat((mask, mask)), 9), torch.cat((weights, weights)) / 2)


def test_the_value_of_the_first_loss():
    """ADV-10: 0 by sequence, not by token, and its gradient is not 0."""
    A = centred_advantages(float64([[1.0, 0.0]]))[0]
    logprobs = (-MASK.double()).requires_grad_()
    losses = clipped_loss(logprobs, logprobs.detach(), A, MASK)
    by_sequence = (per_sequence(MASK, 10) * losses).sum()
    close(by_sequence, 0.0)
    close((per_token(MASK, 10) * losses).sum(), -(3 * 0.5 - 1 * 0.5) / 4)
    (slope,) = torch.autograd.grad(by_sequence, logprobs)
    close(slope[0], -float64([0, 1, 1, 1]) / 12)


CASES = strategies.batches(
    logprobs=strategies.logprobs,
    old_logprobs=strategies.logprobs,
    rows=("advantages",),
)
CASE = {
    "logprobs": float64([[-0.5, -1.5, -2.0], [-0.1, -3.0, -9.0]]),
    "old_logprobs": float64([[-0.4, -2.5, -2.1], [-0.6, -2.0, -0.5]]),
    "advantages": float64([2.0, -1.0]),
    "mask": torch.tensor([[True, True, True], [True, True, False]]),
}


def test_the_clip_by_hand():
    """Ratios e^-0.1, e^1 and e^0.1 for A = 2; e^0.5 and e^-1 for A = -1."""
    losses = clipped_loss(**CASE, eps_low=0.2, eps_high=0.3)
    first = [-2 * math.exp(-0.1), -2 * 1.3, -2 * math.exp(0.1)]
    close(losses, float64([first, [math.exp(0.5), 0.8, 0.0]]))


def test_the_clip_owes_what_every_loss_owes():
    """C-1 to C-11, PPO-8."""
    common.check_mask_is_inert(clipped_loss, CASES)
    common.check_permutation(clipped_loss, CASES)
    common.check_shapes_refused(clipped_loss, CASE)
    common.check_no_gradient_to(clipped_loss, CASES, ["advantages", "old_logprobs"])
    wide = partial(clipped_loss, eps_low=1.0, eps_high=1e9)
    common.check_gradient_reaches(wide, CASE)
    common.check_pure(clipped_loss, CASES)
    # Of whole numbers, so that float32 does not fall on the other side of a kink.
    common.check_dtype(wide, CASES)
    options = {str(e): partial(clipped_loss, eps_low=e, eps_high=f) for e, f in EPS}
    common.check_option_matters(
        {e: lambda o=o, **case: o(**case).sum() for e, o in options.items()}, CASE
    )


EPS = [(0.2, 0.2), (0.1, 0.3), (0.3, 0.1), (1.0, 1e9)]


def by_multiplication(logprobs, old_logprobs, advantages, mask):
    """nan * 0 is nan."""
    ratio = (logprobs - old_logprobs.detach()).exp()
    A = advantages.detach()[:, None]
    return -torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) * mask


def masked_after(logprobs, old_logprobs, advantages, mask):
    """The value is right and the gradient nan."""
    return torch.where(mask, by_multiplication(**locals()), 0.0)


@pytest.mark.parametrize("wrong", [by_multiplication, masked_after])
def test_a_mask_after_the_arithmetic_would_be_found(wrong):
    assert common.refutes(common.check_mask_is_inert, wrong, CASES)


def check_quadrants(loss):
    """PPO-3, PPO-4: value and gradient for either sign of A on all sides of the band.

    No gradient where A > 0 and ratio > 1 + eps_high or A < 0 and ratio < 1 - eps_low,
    else -ratio A; and never less than without the clip.
    """

    @common.forall(CASES, 40)
    def holds(case):
        old = case["old_logprobs"]
        # Near the old ones, where the band is; and away from its edges.
        logprobs = (old + 0.1 * case["logprobs"] + 0.4).clamp(max=0.0)
        ratio = (logprobs - old).exp()
        assume(
            ((ratio - 1.4).abs() > 1e-6).all() and ((ratio - 0.8).abs() > 1e-6).all()
        )
        case = {**case, "logprobs": logprobs}
        value, slopes = common.value_and_gradients(summed(loss), case)
        A = case["advantages"][:, None].expand_as(ratio)
        flat = ((A > 0) & (ratio > 1.4)) | ((A < 0) & (ratio < 0.8))
        live = case["mask"]
        close(slopes["logprobs"], torch.where(flat | ~live, 0.0, -ratio * A))
        edge = torch.where(A > 0, 1.4, 0.8).double().round(decimals=1)
        close(value, -torch.where(live, torch.where(flat, edge, ratio) * A, 0.0).sum())
        assert value >= -(ratio * A)[live].sum() - 1e-9

    holds()


def summed(loss):
    return lambda **case: loss(**case, eps_low=0.2, eps_high=0.4).sum()


def test_where_the_clip_lets_go():
    check_quadrants(clipped_loss)


def variant(combine):
    """A wrong clip, right in all else."""

    def loss(logprobs, old_logprobs, advantages, mask, eps_low, eps_high):
        ratio = probability_ratio(logprobs, old_logprobs, mask)
        A = torch.where(mask, advantages[:, None], 0.0)
        return -combine(ratio, A, eps_low, eps_high)

    return loss


@pytest.mark.parametrize(
    "combine",
    [
        lambda r, A, low, high: r * A,
        lambda r, A, low, high: r.clamp(1 - low, 1 + high) * A,
        lambda r, A, low, high: torch.maximum(r * A, r.clamp(1 - low, 1 + high) * A),
        lambda r, A, low, high: torch.minimum(r * A, r.clamp(1 - high, 1 + low) * A),
        lambda r, A, low, high: torch.minimum(r * A, r.clamp(max=1 + high) * A),
        lambda r, A, low, high: torch.minimum(r * A, r.clamp(min=1 - low) * A),
        lambda r, A, low, high: -torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A),
        lambda r, A, low, high: torch.minimum(r, r.clamp(1 - low, 1 + high)) * A,
    ],
    ids=["none", "blind", "max", "swapped", "upper", "lower", "sign", "ratio"],
)
def test_wrong_clips_are_found(combine):
    assert common.refutes(check_quadrants, variant(combine))


@settings(max_examples=25)
@given(CASES, st.sampled_from([0.25, 3.0]))
def test_without_a_clip_it_is_the_ratio(case, c):
    """PPO-5: eps to infinity; a shift of both log-probs cancels; linear in A > 0."""
    loss = partial(clipped_loss, eps_low=1.0, eps_high=1e9)
    A, logprobs, old = case["advantages"], case["logprobs"], case["old_logprobs"]
    expected = -torch.where(case["mask"], (logprobs - old).exp() * A[:, None], 0.0)
    torch.testing.assert_close(loss(**case), expected, rtol=1e-9, atol=1e-10)
    shifted = {**case, "logprobs": logprobs - c, "old_logprobs": old - c}
    for a, b in ((loss, 1e-9), (clipped_loss, 1e-9)):
        torch.testing.assert_close(a(**shifted), a(**case), rtol=b, atol=1e-10)
        scaled = a(**{**case, "advantages": c * A})
        torch.testing.assert_close(scaled, c * a(**case), rtol=b, atol=1e-10)


def test_the_gradient_is_that_of_the_value():
    """PPO-7, away from the kinks."""
    leaf = CASE["logprobs"].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: clipped_loss(**{**CASE, "logprobs": x}), leaf
    )


def test_extreme_log_probs():
    """A token that has all but vanished: ratio 0, the clip binds below. T = 1."""
    one = torch.ones((1, 1), dtype=torch.bool)
    for A, value in ((1.0, 0.0), (-1.0, 0.8)):
        leaf = float64([[-1000.0]]).requires_grad_()
        loss = clipped_loss(leaf, float64([[-1.0]]), float64([A]), one)
        close(loss, value)
        assert torch.autograd.grad(loss.sum(), leaf)[0].item() == 0
    case = {"logprobs": float64([[-1.0]]), "old_logprobs": float64([[-1000.0]])}
    case |= {"advantages": float64([0.0]), "mask": one}
    names = ["logprobs - old_logprobs"]
    common.assert_refused(clipped_loss, case, ValueError, "a ratio of inf", names)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages"])
def test_what_is_not_finite_is_refused(name, bad):
    case = {**CASE, name: CASE[name].clone()}
    case[name][1] = bad
    common.assert_refused(clipped_loss, case, ValueError, f"{bad}", [name])


def test_probabilities_above_1_and_empty_batches_are_refused():
    case = {**CASE, "logprobs": -CASE["logprobs"]}
    common.assert_refused(clipped_loss, case, ValueError, "above 0", ["logprobs"])
    case = {**CASE, "mask": torch.zeros_like(CASE["mask"])}
    common.assert_refused(clipped_loss, case, ValueError, "no live token", ["mask"])


@pytest.mark.parametrize("eps", [(0.0, 0.2), (1.1, 0.2), (0.2, 0.0), (math.nan, 0.2)])
def test_a_band_that_is_none_is_refused(eps):
    with pytest.raises(ValueError, match="eps_low, eps_high: got"):
        clipped_loss(**CASE, eps_low=eps[0], eps_high=eps[1])


# Part 3: training, in a world where the answers are "y" and "no"

METHOD = METHODS["grpo"]
CONFIG = METHOD.config
run = METHOD.run


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, token by token, against code of its own."""
    drawn = training.spied(monkeypatch, grpo, "generate")
    config = replace(CONFIG, beta=0.5, temperature=temperature)
    policy, reference = stretched(), base()
    twin = copy.deepcopy(policy)
    metrics = next(run(policy, config, reference=reference))

    ((_, rollout),) = drawn
    groups = judged(rollout).view(2, 6)
    advantages = (groups - groups.mean(1, keepdim=True)).flatten()
    advantages = advantages / (groups.std(1) + 1e-4).repeat_interleave(6)
    nats = token_nats(twin, rollout, temperature)
    ref = [row.detach() for row in token_nats(reference, rollout, temperature)]
    loss, kl = torch.zeros(()), 0.0
    for A, ours, theirs in zip(advantages, nats, ref, strict=True):
        k3 = torch.exp(theirs - ours) - 1 - (theirs - ours)
        loss = loss - (A * (ours - ours.detach()).exp() - 0.5 * k3).mean() / 12
        kl += (ours - theirs).sum().item() / 12
    lengths = torch.tensor([float(len(row)) for row in nats])
    expected = {
        "completions": 12,
        "length_up": lengths[advantages > 0].mean().item(),
        "length_down": lengths[advantages < 0].mean().item(),
        "dead": 0.0,
        "ratio_first": 0.0,
        "clip_fraction": 0.0,
        "loss": loss.item(),
        "grad_norm": training.gradient_norm(loss, twin),
        "kl": kl,
    }
    training.assert_metrics(metrics, rollout, expected)
    assert 0 < groups[0].mean() < 1 and 0 < groups[1].mean() < 1


@pytest.mark.parametrize("minibatches", [1, 3])
def test_the_first_ratio_is_exactly_1(monkeypatch, minibatches):
    """PPO-1, contract 13: not about 1; and a wrong old log-prob shows."""
    config = replace(CONFIG, minibatches=minibatches, temperature=0.6, micro_batch=3)
    assert all(row["ratio_first"] == 0.0 for row in run(base(), config))
    right = grpo.rescore
    monkeypatch.setattr(grpo, "rescore", lambda *args: right(*args) - 0.01)
    metrics = next(run(base(), config))
    assert metrics["ratio_first"] == pytest.approx(math.exp(0.01) - 1, abs=1e-5)


def test_without_a_step_no_ratio_moves(monkeypatch):
    """PPO-1, PPO-2: lr 0 keeps them all at 1 to rounding, through four passes."""
    ratios = training.spied(monkeypatch, grpo, "probability_ratio")
    config = replace(CONFIG, epochs=4, minibatches=2, updates=1)
    for lr, still in ((0.0, True), (1e-2, False)):
        ratios.clear()
        (metrics,) = run(base(), replace(config, lr=lr))
        off = max((ratio.detach() - 1).abs().max().item() for _, ratio in ratios)
        assert (off < 1e-5) == still and (metrics["clip_fraction"] == 0) == still


def test_old_log_probs_are_those_of_the_draw(monkeypatch):
    """Throughout the passes; and the sampler's agree with them to rounding."""
    drawn = training.spied(monkeypatch, grpo, "generate")
    losses = training.spied(monkeypatch, grpo, "clipped_loss")
    list(run(base(), replace(CONFIG, epochs=3, updates=1, temperature=0.6)))
    ((_, rollout),) = drawn
    parts = rollout.micro_batches(CONFIG.micro_batch)
    assert len(losses) == 3 * len(parts)
    for (args, _), rows in zip(losses, 3 * parts, strict=True):
        close(args[1], rollout.select(rows).logprobs, atol=1e-5)
        assert not args[1].requires_grad


def test_the_clip_fraction_counts_tokens_without_a_gradient(monkeypatch):
    """PPO-6: of live tokens, on average over steps; those with A = 0 are no such."""
    losses = training.spied(monkeypatch, grpo, "clipped_loss")
    config = replace(CONFIG, epochs=3, updates=1, eps_low=0.1, eps_high=0.02)
    (metrics,) = run(base(), config)
    stopped, live = 0, 0
    for (logprobs, old, A, mask, *eps), _ in losses:
        leaf = logprobs.detach().clone().requires_grad_()
        loss = clipped_loss(leaf, old, A, mask, *eps).sum()
        (slope,) = torch.autograd.grad(loss, leaf)
        stopped += ((slope == 0) & mask & (A != 0)[:, None]).sum().item()
        live += mask.sum().item()
        assert eps == [0.1, 0.02]
    assert metrics["clip_fraction"] == pytest.approx(stopped / live) and stopped > 5


def test_a_pass_deals_every_answer_once():
    """PPO-9. One minibatch: in the rollout's own order, without chance."""
    prompts = [TOKENIZER.encode_prompt(problem.question) for problem in PROBLEMS]
    options = {"max_new_tokens": 3, "samples": 3, "generator": generator()}
    ids = {"eos_id": TOKENIZER.eos_id, "pad_id": TOKENIZER.pad_id}
    rollout = generate(base(), prompts, **ids, **options)
    steps = rollout.deal(2, 4, 3, generator())
    assert [len(torch.cat(step)) for step in steps] == 2 * [4, 4, 4, 3]
    assert max(len(rows) for step in steps for rows in step) == 3
    passes = [torch.cat([torch.cat(s) for s in steps[i : i + 4]]) for i in (0, 4)]
    for order in passes:
        assert order.sort()[0].tolist() == list(range(15))
    assert not torch.equal(*passes)
    draw = generator()
    (step,) = rollout.deal(1, 1, 3, draw)
    training.assert_same_bits(draw.get_state(), generator().get_state())
    training.assert_same_bits(step, rollout.micro_batches(3))


@pytest.mark.parametrize("reduction", [per_sequence, per_token])
def test_a_minibatch_is_weighed_by_itself(reduction):
    """C-3: with A = 1 everywhere and ratios at 1, the loss of each step is -1."""
    config = replace(CONFIG, minibatches=3, epochs=2, updates=1, lr=0.0)
    more = {"advantage": torch.ones_like, "reduction": reduction}
    (metrics,) = run(base(), config, **more)
    assert metrics["loss"] == pytest.approx(-1, abs=1e-5)


def test_groups_without_a_difference_are_counted_and_move_nothing():
    """In float32 0.1, whose mean is not 0.1; T55: the loss is 0 when they are dead."""
    policy = base()
    config = replace(CONFIG, samples=7)
    metrics = next(run(policy, config, lambda _, texts: [0.1] * len(texts)))
    assert metrics["dead"] == 1.0 and metrics["loss"] == 0 == metrics["grad_norm"]
    assert metrics["length_up"] == 0 == metrics["length_down"] < metrics["length"]
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))

    def half(problems, texts):
        return [float(i) if i < 6 else 1.0 for i in range(len(texts))]

    assert next(run(base(), CONFIG, half))["dead"] == 0.5


def test_the_kl_term_brings_a_policy_home_even_from_dead_groups():
    """Whichever has a gradient; k1 as a loss only adds noise (KL-5): the control."""
    away = base()
    list(run(away, replace(CONFIG, updates=3, prompts=5, lr=4e-3)))
    config = replace(CONFIG, beta=1.0, updates=12, prompts=5, lr=2e-3, samples=20)
    config = replace(config, micro_batch=100)
    ends = {}
    for term in (k1_term, k2_term, k3_term):
        more = {"reference": base(), "kl_term": term}
        metrics = list(run(copy.deepcopy(away), config, never, **more))
        assert metrics[0]["dead"] == 1 and metrics[0]["kl"] > 0.7
        ends[term.__name__] = metrics[-1]["kl"]
    assert ends.pop("k1_term") > 0.7
    assert max(ends.values()) < 0.2


def test_ratio_k3_and_k2_are_one_gradient_at_ratio_1():
    """Sample by sample: one step a draw cannot tell them apart. Later steps can."""
    ref, mask = torch.tensor([[-0.5, -4.0, -1.0]]), torch.ones((1, 3), dtype=torch.bool)
    for moved, same in ((0.0, True), (0.3, False)):
        slopes = []
        for term in (k2_term, kl_ratio_k3):
            logprobs = torch.tensor([[-2.0, -0.1, -1.5]]).requires_grad_()
            old = logprobs.detach() - moved
            total = term(logprobs, old, ref, mask).sum()
            slopes.append(torch.autograd.grad(total, logprobs)[0])
        assert torch.allclose(*slopes, atol=1e-5) == same


def test_every_kl_term_is_used():
    """C-10: other weights after two updates."""
    ends = []
    for term in (k1_term, k2_term, k3_term, kl_ratio_k3):
        state = {}
        config = replace(CONFIG, updates=2, beta=1.0, max_grad_norm=1e9, epochs=2)
        list(run(base(), config, reference=base(), state=state, kl_term=term))
        ends.append(training.weights_of(state))
    assert all(not torch.equal(a, b) for i, a in enumerate(ends) for b in ends[:i])
