"""PPO: its expected gradient by enumeration, its parts one by one, and training."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from minialign.algorithms import ppo, reinforce
from minialign.algorithms.ppo import (
    Critic,
    adapt_beta,
    explained_variance,
    gae,
    policy_loss,
    score_tokens,
    shape_token_rewards,
    value_loss,
    whiten,
)
from minialign.logprobs import token_logprobs
from tests import enumeration as world
from tests import strategies
from tests.methods import CRITICS, METHODS, NoCritic, opinionated
from tests.properties import common, training
from tests.toy import (
    TOKENIZER,
    base,
    base_weights,
    generator,
    judged,
    new_gpt,
    stretched,
)

# Part 1: the expected gradient, over 15 responses (tests/enumeration.py)

LOGITS, REFERENCE = world.random_logits(0), world.random_logits(1)
REF_LOGPROBS = world.token_logprobs(REFERENCE)  # (15, 3)
REWARDS = world.random_logits(2).flatten()[:15]  # any numbers will do
GUESSES = world.random_logits(3)[:, 0]  # (7,) any value for each prefix
BAND = {"eps_low": 0.2, "eps_high": 0.3}


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def true_values():
    """(7,): what the policy earns from each prefix on, by summing over responses."""
    odds, total, mass = world.probabilities(LOGITS), torch.zeros(7), torch.zeros(7)
    total, mass = total.double(), mass.double()
    for weight, earned, states, mask in zip(
        odds, REWARDS, world.STATES, world.MASK, strict=True
    ):
        total[states[mask]] += weight * earned
        mass[states[mask]] += weight
    return total / mass


def expected_ascent(
    values, lam, beta=0.0, *, samples=1, shift=0, shape=shape_token_rewards
):
    """-E[∇ loss] of the whole chain: shaped rewards, GAE, clipped surrogate."""

    def loss(rows, logprobs, mask):
        guesses = values[world.STATES[rows]].roll(-shift, 1)  # (samples, 3)
        paid = REWARDS[rows], logprobs, REF_LOGPROBS[rows], mask
        token_rewards = shape(*paid, beta)
        advantages = gae(token_rewards, guesses, mask, 1.0, lam)
        return policy_loss(logprobs, logprobs.detach(), advantages, mask, **BAND)

    return -world.expected_gradient(loss, LOGITS, samples)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("values", [torch.zeros(7).double(), GUESSES])
def test_lambda_1_is_exact_whatever_the_critic_says(values, samples):
    """PG-1, PG-6: a guess made before the token is a baseline of its prefix."""
    expected = world.true_gradient(LOGITS, REWARDS)
    close(expected_ascent(values, 1.0, samples=samples), expected)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_a_smaller_lambda_is_exact_only_with_the_true_values(lam):
    expected = world.true_gradient(LOGITS, REWARDS)
    close(expected_ascent(true_values(), lam), expected)
    assert (expected_ascent(GUESSES, lam) - expected).abs().max() > 0.003


def test_a_value_of_the_state_after_the_token_is_biased():
    """Off by one: the baseline has seen the action. A negative control."""
    expected = world.true_gradient(LOGITS, REWARDS)
    assert (expected_ascent(GUESSES, 1.0, shift=1) - expected).abs().max() > 0.05


@pytest.mark.parametrize("beta", [0.3, 2.0])
@pytest.mark.parametrize("values", [torch.zeros(7).double(), GUESSES])
def test_the_kl_in_the_token_rewards_has_the_gradient_of_the_objective(values, beta):
    """PG-7; each token pays for the KL from itself on: what came before is spent."""
    expected = world.true_gradient(LOGITS, REWARDS, REFERENCE, beta)
    close(expected_ascent(values, 1.0, beta), expected)
    assert (expected - world.true_gradient(LOGITS, REWARDS)).norm() > 0.05


def swapped(rewards, logprobs, ref_logprobs, mask, beta):
    return shape_token_rewards(rewards, ref_logprobs, logprobs, mask, beta)


def reversed_in_time(rewards, logprobs, ref_logprobs, mask, beta):
    """The score on the first slot."""
    return shape_token_rewards(rewards, logprobs, ref_logprobs, mask, beta).flip(1)


@pytest.mark.parametrize("wrong", [swapped, reversed_in_time])
def test_wrong_token_rewards_are_seen(wrong):
    expected = world.true_gradient(LOGITS, REWARDS, REFERENCE, 2.0)
    actual = expected_ascent(GUESSES, 1.0, 2.0, shape=wrong)
    assert (actual - expected).abs().max() > 0.05


def test_a_token_that_pays_only_for_itself_is_biased():
    """ReMax's code: what a token does to the KL of later ones is missing."""
    expected = world.true_gradient(LOGITS, REWARDS, REFERENCE, 2.0)

    def loss(rows, logprobs, mask):
        k1 = (logprobs - REF_LOGPROBS[rows]).detach()
        A = torch.where(mask, REWARDS[rows][:, None] - 2.0 * k1, 0.0)
        return policy_loss(logprobs, logprobs.detach(), A, mask, **BAND)

    actual = -world.expected_gradient(loss, LOGITS)
    assert (actual - expected).abs().max() > 0.05


def test_at_ratio_1_it_is_reinforce():
    """X-3, X-6: with γ = λ = 1, V = 0, β = 0 the same numbers, bit by bit."""
    logprobs, mask = world.token_logprobs(LOGITS), world.MASK
    paid = shape_token_rewards(REWARDS, logprobs, REF_LOGPROBS, mask, 0.0)
    A = gae(paid, torch.zeros_like(paid), mask, 1.0, 1.0)
    assert torch.equal(A, torch.where(mask, REWARDS[:, None], 0.0))  # GAE-12
    leaf = logprobs.clone().requires_grad_()
    losses = (
        policy_loss(leaf, logprobs, A, mask, **BAND),
        reinforce.reinforce_loss(leaf, REWARDS, mask),
    )
    assert torch.equal(*(torch.autograd.grad(loss, leaf)[0] for loss in losses))


def test_a_flipped_sign_descends():
    expected = world.true_gradient(LOGITS, REWARDS)
    assert world.cosine(-expected_ascent(GUESSES, 1.0), expected) < -0.999


# Part 2: the parts

float64 = partial(torch.tensor, dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
near = partial(strategies.tensors, elements=strategies.numbers(-3.0, 3.0))
CASES = strategies.batches(
    shape=(2, 4),
    logprobs=partial(strategies.logprobs, low=-3.0),
    old_logprobs=partial(strategies.logprobs, low=-3.0),
    advantages=near,
)
CASE = {
    "logprobs": float64([[-0.5, -1.5, -2.0], [-0.1, -3.0, -9.0]]),
    "old_logprobs": float64([[-0.6, -1.4, -2.0], [-0.2, -2.9, -1.0]]),
    "advantages": float64([[2.0, -1.0, 0.5], [-1.0, 3.0, 7.0]]),
    "mask": MASK,
}
VALUES = strategies.batches(shape=(2, 3), values=near, old_values=near, returns=near)
VALUE_CASE = {
    "values": float64([[0.5, 0.2, 0.1], [0.9, 0.3, 9.0]]),
    "old_values": float64([[0.4, 0.6, 0.0], [0.7, 0.3, 9.0]]),
    "returns": float64([[1.0, 1.0, 0.3], [0.0, 0.1, 9.0]]),
    "mask": MASK,
}
clipped = partial(policy_loss, **BAND)
clipped_value = partial(value_loss, clip=0.25)


def test_policy_loss_by_hand():
    """Ratios e^.1, e^-.1, 1; e^.1, e^-.1: all within the band."""
    up, down = math.exp(0.1), math.exp(-0.1)
    expected = -(2 * up - down + 0.5 - up + 3 * down) / 2
    close(clipped(**CASE), expected)


@pytest.mark.parametrize("A", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.29, 1.31, 4.0])
def test_the_slope_is_0_where_the_clip_acts_and_only_there(A, ratio):
    """PPO-3, in every quadrant, with an asymmetric band (0.8, 1.3)."""
    old = float64([[-3.0]])
    leaf = (old + math.log(ratio)).requires_grad_()
    mask = torch.tensor([[True]])
    loss = clipped(leaf, old, float64([[A]]), mask)
    (slope,) = torch.autograd.grad(loss, leaf)
    flat = (A > 0 and ratio > 1.3) or (A < 0 and ratio < 0.8)
    close(slope, 0.0 if flat else -A * ratio)
    close(loss.detach(), -min(A * ratio, A * min(max(ratio, 0.8), 1.3)))
    assert loss >= -A * ratio - 1e-12  # PPO-4: never better than unclipped


def test_at_the_kink_the_side_that_moves_counts():
    old, mask = float64([[-3.0, -3.0]]), torch.tensor([[True, True]])
    leaf = (old + float64([[0.5, -0.5]])).requires_grad_()
    high, low = (leaf.detach() - old).exp()[0].tolist()
    A = float64([[1.0, -1.0]])
    loss = policy_loss(leaf, old, A, mask, eps_low=1 - low, eps_high=high - 1)
    (slope,) = torch.autograd.grad(loss, leaf)
    close(slope, float64([[-high, low]]))


def test_no_advantage_no_slope():
    nothing = {**CASE, "advantages": torch.zeros_like(CASE["advantages"])}
    value, slopes = common.value_and_gradients(clipped, nothing)
    assert value == 0 and (slopes["logprobs"] == 0).all()


def test_a_wide_band_weighs_by_the_ratio():
    """PPO-5: the importance-weighted loss; shifts of both cancel; homogeneous in A."""
    wide = partial(policy_loss, eps_low=1.0, eps_high=1e9)

    @common.forall(CASES)
    def holds(case):
        mask, A = case["mask"], case["advantages"]
        ratio = (case["logprobs"] - case["old_logprobs"]).exp()
        rows = mask.any(1).sum()
        close(wide(**case), -(ratio * A)[mask].sum() / rows, atol=1e-9)
        shift = {k: case[k] - 1.5 for k in ("logprobs", "old_logprobs")}
        close(wide(**{**case, **shift}), wide(**case), atol=1e-8)
        close(clipped(**{**case, "advantages": 3 * A}), 3 * clipped(**case), atol=1e-9)
        assert clipped(**case) >= wide(**case) - 1e-12

    holds()


def test_the_policy_loss_owes_what_every_loss_owes():
    """C-1 to C-12, PPO-8."""
    common.check_mask_is_inert(clipped, CASES)
    common.check_microbatches(clipped, CASES, common.live_rows)  # PPO-9
    common.check_permutation(clipped, CASES)
    common.check_shapes_refused(clipped, CASE)
    common.check_no_gradient_to(clipped, CASES, ["old_logprobs", "advantages"])
    common.check_gradient_reaches(clipped, CASE)
    common.check_pure(clipped, CASES)
    common.check_dtype(clipped, CASES)
    common.check_duplication(clipped, CASES)
    far = {**CASE, "old_logprobs": float64([[-1.5, -0.5, -2.0], [-0.2, -2.9, -1.0]])}
    bands = [(0.2, 0.3), (0.3, 0.2), (0.2, 0.2), (0.2, 1e9), (1.0, 0.2)]
    losses = {b: partial(policy_loss, eps_low=b[0], eps_high=b[1]) for b in bands}
    common.check_option_matters({str(b): losses[b] for b in losses}, far)


def without_pessimism(logprobs, old_logprobs, advantages, mask, count=None):
    """The clipped branch alone: what moved the wrong way is not pulled back."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp().clamp(0.8, 1.3)
    rows = mask.any(1).sum() if count is None else count
    return -torch.where(mask, ratio * advantages, 0.0).sum() / rows


def masked_too_late(logprobs, old_logprobs, advantages, mask, count=None):
    ratio = (logprobs - old_logprobs.detach()).exp()
    A = advantages.detach()
    surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.3) * A)
    rows = mask.any(1).sum() if count is None else count
    return -torch.where(mask, surrogate, 0.0).sum() / rows


def test_the_properties_find_wrong_policy_losses():
    assert common.refutes(common.check_mask_is_inert, masked_too_late, CASES)
    back = {**CASE, "old_logprobs": CASE["logprobs"] + 1}  # ratio e^-1, and A = 2
    back["old_logprobs"] = back["old_logprobs"].clamp(max=0.0)
    assert clipped(**back) > without_pessimism(**back)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages"])
def test_the_policy_loss_refuses_what_is_not_finite(name, bad):
    case = {**CASE, name: CASE[name].clone()}
    case[name][1, 0] = bad
    common.assert_refused(clipped, case, ValueError, f"{bad}", [name])


def test_the_policy_loss_refuses_impossible_numbers():
    for name in ("logprobs", "old_logprobs"):
        case = {**CASE, name: -CASE[name]}
        common.assert_refused(clipped, case, ValueError, "above 0", [name])
    case = {**CASE, "old_logprobs": CASE["old_logprobs"] - 1000}
    common.assert_refused(clipped, case, ValueError, "80 nats", ["old_logprobs"])
    value, slopes = common.value_and_gradients(
        clipped, {**CASE, "logprobs": CASE["logprobs"] - 1000}
    )
    assert value.isfinite() and slopes["logprobs"].isfinite().all()
    case = {**CASE, "mask": torch.zeros_like(MASK)}
    common.assert_refused(clipped, case, ValueError, "no live token", ["mask"])


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.1, math.nan])
def test_bands_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="eps_low: got"):
        policy_loss(**CASE, eps_low=bad, eps_high=0.2)
    if bad != 1.1:
        with pytest.raises(ValueError, match="eps_high: got"):
            policy_loss(**CASE, eps_low=0.2, eps_high=bad)
        with pytest.raises(ValueError, match="clip: got"):
            value_loss(**VALUE_CASE, clip=bad)


def test_slopes_are_right_by_finite_differences():
    """PPO-7, away from kinks."""
    A, old = CASE["advantages"], CASE["old_logprobs"]
    leaf = CASE["logprobs"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped(x, old, A, MASK), leaf)
    leaf = VALUE_CASE["values"].clone().requires_grad_()
    fixed = VALUE_CASE["old_values"], VALUE_CASE["returns"], MASK
    assert torch.autograd.gradcheck(lambda x: clipped_value(x, *fixed), leaf)


# --- the critic's loss


def test_value_loss_is_flat_once_it_has_moved_far_enough():
    """VC-1, VC-2: slope V - R, but 0 beyond the clip on the way to R."""

    @common.forall(VALUES)
    def holds(case):
        v, old, R, mask = case.values()
        _, slopes = common.value_and_gradients(clipped_value, case, ["values"])
        near = old + (v - old).clamp(-0.25, 0.25)
        clear = ((v - old).abs() - 0.25).abs() > 1e-6
        flat = ((v - old).abs() > 0.25) & ((near - R).abs() > (v - R).abs())
        expected = torch.where(flat, 0.0, v - R) / mask.sum()
        seen = mask & clear & (((near - R).abs() - (v - R).abs()).abs() > 1e-9)
        seen = mask & clear & (seen | ((v - old).abs() < 0.25))
        close(slopes["values"][seen], expected[seen])
        plain = value_loss(**case)
        close(plain, 0.5 * ((v - R)[mask] ** 2).mean(), atol=1e-9)
        assert clipped_value(**case) >= plain - 1e-12
        assert torch.equal(value_loss(**case, clip=math.inf), plain)
        same = {**case, "old_values": v}
        close(clipped_value(**same), plain, atol=1e-12)
        moved = {name: case[name] + 1 for name in ("values", "old_values", "returns")}
        close(clipped_value(**{**case, **moved}), clipped_value(**case), atol=1e-9)

    holds()


def test_value_loss_by_hand():
    """Only V = 0.2 is far from its V_old: it is worse at 0.2 than clipped, at 0.35."""
    errors = [0.5**2, 0.8**2, 0.2**2, 0.9**2, 0.2**2]
    close(clipped_value(**VALUE_CASE), sum(errors) / 10)
    flat = {**VALUE_CASE, "returns": VALUE_CASE["values"] - 0.3}
    flat["old_values"] = VALUE_CASE["values"]
    close(clipped_value(**flat), 0.5 * 0.3**2)  # VC-3
    closer = {**VALUE_CASE, "old_values": VALUE_CASE["values"] - 1.0}
    closer["returns"] = VALUE_CASE["values"]  # there already: judged 0.75 short
    close(clipped_value(**closer), 0.5 * 0.75**2)


def test_the_value_loss_owes_what_every_loss_owes():
    owed, names = clipped_value, ["values"]
    common.check_mask_is_inert(owed, VALUES, names)
    common.check_microbatches(owed, VALUES, common.live_tokens, names)
    common.check_permutation(owed, VALUES, names)
    common.check_shapes_refused(owed, VALUE_CASE)
    common.check_no_gradient_to(owed, VALUES, ["old_values", "returns"])
    common.check_gradient_reaches(value_loss, VALUE_CASE, names)
    common.check_pure(owed, VALUES)
    common.check_dtype(owed, VALUES, names)
    common.check_duplication(owed, VALUES, names)
    losses = {str(c): partial(value_loss, clip=c) for c in (None, 0.1, 0.25)}
    moved = {**VALUE_CASE, "returns": VALUE_CASE["values"]}
    common.check_option_matters(losses, moved)


# --- rewards per token


PAID = strategies.batches(
    shape=(2, 4),
    logprobs=strategies.logprobs,
    ref_logprobs=strategies.logprobs,
    rows=("rewards",),
).map(lambda case: case | {"mask": case["mask"] | ~case["mask"].any(1, keepdim=True)})
PAID_CASE = {
    "rewards": float64([1.0, 0.5]),
    "logprobs": CASE["logprobs"],
    "ref_logprobs": float64([[-1.5, -1.0, -2.0], [-0.2, -1.0, -0.5]]),
    "mask": MASK,
}


def test_token_rewards_by_hand():
    """The score is on the last live token, never on the padding after it."""
    actual = shape_token_rewards(**PAID_CASE, beta=0.5)
    close(actual, float64([[-0.5, 0.25, 1.0], [-0.05, 1.5, 0.0]]))


def test_token_rewards_add_up():
    """GAE-12, KL-10: Σ = score - β Σ k1, and a likelier reference lowers the price."""
    shape = partial(shape_token_rewards, beta=0.3)

    @common.forall(PAID)
    def holds(case):
        k1 = torch.where(case["mask"], case["logprobs"] - case["ref_logprobs"], 0.0)
        close(shape(**case).sum(1), case["rewards"] - 0.3 * k1.sum(1))
        dearer = {**case, "ref_logprobs": case["ref_logprobs"] - 1.0}
        assert (shape(**dearer).sum(1) < shape(**case).sum(1)).all()

    holds()
    names = ["rewards", "logprobs", "ref_logprobs"]
    common.check_mask_is_inert(shape, PAID)
    common.check_permutation(shape, PAID)
    common.check_shapes_refused(shape, PAID_CASE)
    common.check_no_gradient_to(shape, PAID, names)
    common.check_dtype(shape, PAID, names)
    assert common.refutes(common.check_mask_is_inert, score_on_the_last_slot, PAID)


def score_on_the_last_slot(rewards, logprobs, ref_logprobs, mask):
    """On padding, where the mask deletes it."""
    shaped = -0.3 * torch.where(mask, logprobs - ref_logprobs, 0.0).detach()
    shaped[:, -1] += rewards
    return shaped


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_shaping_refuses_the_beta(beta):
    with pytest.raises(ValueError, match="beta: got"):
        shape_token_rewards(**PAID_CASE, beta=beta)


def test_a_row_without_a_token_has_nowhere_to_put_its_reward():
    case = {**PAID_CASE, "mask": MASK & torch.tensor([[True], [False]])}
    common.assert_refused(
        partial(shape_token_rewards, beta=0.0), case, ValueError, "empty", ["mask"]
    )


# --- advantages


STEPS = strategies.batches(shape=(2, 5), token_rewards=near, values=near)
STEPS_CASE = {
    "token_rewards": float64([[0.0, 0.1, 1.0], [0.0, 1.0, 9.0]]),
    "values": float64([[0.2, 0.5, 0.8], [0.4, 0.6, 9.0]]),
    "mask": MASK,
}
GAMMAS = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def explicit(r, V, gamma, lam):
    """GAE-1: Σ_j (γλ)^j δ_{t+j}, with δ from the definition and nothing at the end."""
    V = [*V, 0.0]
    n = len(r)
    delta = [r[t] + gamma * V[t + 1] - V[t] for t in range(n)]
    return [
        sum((gamma * lam) ** j * delta[t + j] for j in range(n - t)) for t in range(n)
    ]


def on_each_row(gamma, lam, advantages, token_rewards, values, mask):
    for row, live in enumerate(mask):
        r, V = token_rewards[row][live].tolist(), values[row][live].tolist()
        close(advantages[row][live], float64(explicit(r, V, gamma, lam)), atol=1e-9)
        assert (advantages[row][~live] == 0).all()


def test_gae_golden():
    r, V = float64([[0.0, 0.0, 1.0]]), float64([[0.2, 0.5, 0.8]])
    A = gae(r, V, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.95)
    close(A, float64([[0.7655, 0.49, 0.2]]))
    close(A + V, float64([[0.9655, 0.99, 1.0]]))


def check_gae(advantage):
    """GAE-1, 11: the sum over live tokens, wherever the masked ones lie; the rest."""

    @common.forall(st.tuples(STEPS, GAMMAS, GAMMAS))
    def holds(drawn):
        case, gamma, lam = drawn
        r, V, mask = case.values()
        A = advantage(r, V, mask, gamma, lam)
        on_each_row(gamma, lam, A, **case)
        close(advantage(r, V, mask, 0.0, lam), torch.where(mask, r - V, 0.0))  # GAE-3
        double = advantage(2 * r + 1, 2 * V - 1, mask, gamma, lam)  # GAE-4
        ones = torch.ones_like(r)
        close(double, 2 * A + advantage(ones, -ones, mask, gamma, lam), atol=1e-9)
        zero = torch.zeros_like(r)
        earned = advantage(r, zero, mask, gamma, 1.0)  # GAE-2: λ = 1, return less V
        whole = advantage(r, V, mask, gamma, 1.0)
        close(whole, torch.where(mask, earned - V, 0.0), atol=1e-9)
        perfect = advantage(r, earned, mask, gamma, lam)  # GAE-10: nothing to regret
        close(perfect, 0.0, atol=1e-9)

    holds()


def lambda_forgotten(r, V, mask, gamma, lam):
    return gae(r, V, mask, gamma, 1.0)


def gamma_forgotten(r, V, mask, gamma, lam):
    return gae(r, V, mask, 1.0, lam)


def padding_bootstraps(r, V, mask, gamma, lam):
    """Masked slots are steps too: their values reach live tokens, λ counts them."""
    everywhere = torch.ones_like(mask)
    A = gae(torch.where(mask, r, 0.0), V, everywhere, gamma, lam)
    return torch.where(mask, A, 0.0)


def masked_slots_count(r, V, mask, gamma, lam):
    """Their values are gone, but each costs one γλ."""
    return padding_bootstraps(r, torch.where(mask, V, 0.0), mask, gamma, lam)


def test_gae_is_the_sum_over_live_tokens():
    check_gae(gae)


@pytest.mark.parametrize(
    "wrong", [lambda_forgotten, gamma_forgotten, padding_bootstraps, masked_slots_count]
)
def test_wrong_advantages_are_found(wrong):
    assert common.refutes(check_gae, wrong)


def test_what_is_known_beforehand_changes_nothing():
    """GAE-5: γΦ' - Φ in the reward with V - Φ; Φ is 0 at the end. GAE-6, GAE-7."""

    @common.forall(st.tuples(STEPS, near((1, 5)), GAMMAS, GAMMAS))
    def holds(drawn):
        case, potential, gamma, lam = drawn
        r, V, _ = case.values()
        mask = torch.ones_like(case["mask"])
        phi = potential.expand_as(r)
        after = torch.cat((phi[:, 1:], torch.zeros_like(phi[:, :1])), 1)
        A = gae(r, V, mask, gamma, lam)
        shaped = gae(r + gamma * after - phi, V - phi, mask, gamma, lam)
        close(shaped, A, atol=1e-9)
        # GAE-6 fails at the end alone, where V is 0 and not c: -c λ^(steps to go).
        to_go = torch.arange(r.shape[1]).flip(0).double()
        raised = gae(r, V + 2.0, mask, 1.0, lam)
        close(raised, gae(r, V, mask, 1.0, lam) - 2.0 * lam**to_go, atol=1e-9)
        R = A + V
        later = [torch.cat((x[:, 1:], 0 * x[:, :1]), 1) for x in (V, R)]
        close(R, r + gamma * ((1 - lam) * later[0] + lam * later[1]), atol=1e-9)

    holds()


def test_one_token():
    """GAE-13, GAE-9: terminal; whatever stands behind it is not looked at."""
    mask = torch.tensor([[True, False]])
    A = gae(float64([[1.0, 5.0]]), float64([[0.3, 7.0]]), mask, 0.9, 0.9)
    close(A, float64([[0.7, 0.0]]))


def test_gae_owes_what_every_loss_owes():
    owed = partial(gae, gamma=0.9, lam=0.8)
    names = ["token_rewards", "values"]
    common.check_mask_is_inert(owed, STEPS, names)
    common.check_permutation(owed, STEPS, names)  # rows are episodes: GAE-8
    common.check_shapes_refused(owed, STEPS_CASE)
    common.check_no_gradient_to(owed, STEPS, names)
    common.check_pure(owed, STEPS)
    common.check_dtype(owed, STEPS, names)
    settings = [(1.0, 0.95), (1.0, 0.5), (0.9, 0.95)]
    options = {
        str(s): lambda s=s, **case: gae(**case, gamma=s[0], lam=s[1]).sum()
        for s in settings
    }
    common.check_option_matters(options, STEPS_CASE)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_gae_refuses_gamma_and_lambda(bad):
    for options in ({"gamma": bad, "lam": 1.0}, {"gamma": 1.0, "lam": bad}):
        with pytest.raises(ValueError, match="gamma, lam: got"):
            gae(**STEPS_CASE, **options)


SPREAD = strategies.batches(shape=(2, 4), x=near)


def check_whitening(scale):
    """WH-1 to WH-4."""

    @common.forall(SPREAD)
    def holds(case):
        x, mask = case["x"], case["mask"]
        y = scale(x, mask)
        live, given = y[mask], x[mask]
        assert (y[~mask] == 0).all()
        if given.min() == given.max():
            assert (y == 0).all()
        elif given.var(correction=0) > 0.01:
            close(live.mean(), 0.0)
            close(live.square().mean(), 1.0, atol=1e-5)
            close(scale(3 * x + 7, mask), y, atol=1e-5)
            close(scale(y, mask), y, atol=1e-5)
        assert (live.diff().sign() * given.diff().sign() >= 0).all()

    holds()
    common.check_mask_is_inert(scale, SPREAD, ["x"])


def unmasked(x, mask):
    return torch.where(mask, (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt(), 0.0)


def with_bessel(x, mask):
    live = x[mask] - x[mask].mean()
    scaled = live / (live.square().sum() / (len(live) - 1) + 1e-8).sqrt()
    return torch.zeros_like(x).masked_scatter(mask, scaled)


def test_whitening():
    check_whitening(whiten)
    common.check_no_gradient_to(whiten, SPREAD, ["x"])
    common.check_pure(whiten, SPREAD)
    x = torch.full((3, 7), 0.1)  # whose float32 mean is not 0.1
    assert (whiten(x, torch.ones(3, 7, dtype=torch.bool)) == 0).all()
    assert (whiten(x, torch.arange(21).reshape(3, 7) == 4) == 0).all()


@pytest.mark.parametrize("wrong", [unmasked, with_bessel])
def test_wrong_whitening_is_found(wrong):
    assert common.refutes(check_whitening, wrong)


def test_explained_variance():
    """1 for the truth, whatever its mean; 0 for a constant; below 0 for worse."""
    R = float64([[0.0, 1.0, 1.0], [0.0, 1.0, 9.0]])
    measure = partial(explained_variance, returns=R, mask=MASK)
    junk = torch.full_like(R, math.nan)
    assert measure(torch.where(MASK, R + 5, junk)) == pytest.approx(1)
    assert measure(torch.where(MASK, 0.7, junk)) == pytest.approx(0)
    assert measure(-R) == pytest.approx(-3)
    assert measure(R / 2) == pytest.approx(0.75)
    assert explained_variance(R, torch.full_like(R, 0.1), MASK) == 0.0
    with pytest.raises(ValueError, match="returns"):
        explained_variance(R, R[:, :2], MASK)


def test_the_price_of_kl_follows_the_measured_kl():
    """KL-11: fixed at the target, up above it, down below, by bounded steps."""
    adapt = partial(adapt_beta, target=6.0, horizon=10_000, completions=512)
    assert adapt(0.15, 6.0) == 0.15
    assert adapt(0.15, 6.6) == pytest.approx(0.15 * (1 + 0.1 * 0.0512))
    for kl, factor in ((1e6, 0.2), (8.0, 0.2), (0.0, -0.2), (-3.0, -0.2)):
        assert adapt(0.15, kl) == pytest.approx(0.15 * (1 + factor * 0.0512))
    assert adapt(0.0, 100.0) == 0.0
    for bad in ({"target": 0.0}, {"target": math.nan}, {"horizon": 100}):
        with pytest.raises(ValueError, match="target: got|completions: got"):
            partial(adapt, **bad)(0.15, 6.0)


# Part 3: training, in a world where the answers are "y" and "no"

METHOD = METHODS["ppo"]
CONFIG = METHOD.config
run = METHOD.run


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_by_brute_force(shared, temperature):
    """Row by row, without padding: the value stands *before* the token it goes with."""
    policy = base().double()
    tokens = torch.randint(5, 200, (3, 9), generator=generator())
    critic = opinionated(policy, shared)
    if not shared:
        critic.trunk.load_state_dict(new_gpt(3).state_dict(), strict=False)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 3:7] = mask[1, 2] = mask[2, 4:8] = True
    scores = score_tokens(policy, critic, tokens, mask, temperature)
    close(scores[0], token_logprobs(policy, tokens, mask, temperature))
    for row, slot in mask.nonzero().tolist():
        seen = tokens[row, : slot + 1][None]  # what was known at that choice
        hidden = policy(seen)
        odds = (policy.logits(hidden)[0, -1] / temperature).softmax(-1)
        trunk = hidden if shared else critic.trunk(seen)
        value = (trunk[0, -1] * critic.head.weight).sum() + critic.head.bias
        close(scores[1][row, slot], value.item())
        close(scores[2][row, slot], -(odds * odds.log()).sum().item())
    assert all((x[~mask] == 0).all() for x in scores)
    assert scores[1][mask].std() > 0.01 and scores[1].dtype == torch.float64


def test_who_learns_from_which_loss():
    """C-8: the value loss moves a shared trunk, not a policy with a critic apart."""
    tokens = torch.randint(5, 200, (2, 6), generator=generator())
    mask = torch.ones(2, 5, dtype=torch.bool)
    for shared in (False, True):
        policy = base()
        critic = opinionated(policy, shared)
        _, values, entropies = score_tokens(policy, critic, tokens, mask, 1.0)
        values.sum().backward()
        moved = [name for name, p in policy.named_parameters() if p.grad is not None]
        assert bool(moved) == shared and "lm_head.weight" not in moved
        assert all(p.grad is not None for p in critic.parameters())
        (slope,) = torch.autograd.grad(entropies.sum(), policy.lm_head.weight)
        assert slope.norm() > 0
    own = {p.data_ptr() for p in Critic(policy).parameters()}
    assert own.isdisjoint(p.data_ptr() for p in policy.parameters())
    assert [*Critic(policy, shared=True).state_dict()] == ["head.weight", "head.bias"]


def test_the_critic_comes_to_know_which_token_decides():
    """After "n" nothing can be earned any more, and after "y" nearly all."""
    policy = base()
    critic = Critic(policy)
    config = replace(CONFIG, updates=8, prompts=5, lr=0.0, critic_lr=2e-2)
    config = replace(config, value_clip=None, micro_batch=30)
    metrics = list(run(policy, config, critic=critic))
    assert metrics[0]["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["explained_variance"] > 0.3
    values = {}
    for text in ("y", "no"):
        said = [*TOKENIZER.encode_prompt("a"), *TOKENIZER.encode(text)]
        ids = torch.tensor([[*said, TOKENIZER.eos_id]])
        mask = torch.ones(1, ids.shape[1] - 1, dtype=torch.bool)
        values[text] = score_tokens(policy, critic, ids, mask, 1.0)[1][0]
    start = len(TOKENIZER.encode_prompt("a")) - 1
    close(values["y"][start], values["no"][start].item(), atol=1e-5)
    assert values["y"][start + 1] > values["y"][start] > values["no"][start + 1]


def row_scores(policy, critic, rollout, temperature):
    """[(logprobs, values, entropies)] of each answer: alone, without padding."""
    scores = []
    for row, response in enumerate(rollout.responses()):
        start = rollout.prompt_lengths[row].item()
        ids = rollout.tokens[row, : start + len(response)]
        hidden = policy(ids[None, :-1])
        every = policy.logits(hidden)[0, start - 1 :].div(temperature).log_softmax(-1)
        values = critic.head(critic.trunk(ids[None, :-1]))[0, start - 1 :]
        logprobs = -F.nll_loss(every, ids[start:], reduction="none")
        scores.append((logprobs, values, -(every.exp() * every).sum(-1)))
    return scores


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, answer by answer, against code of its own."""
    rollouts = training.spied(monkeypatch, ppo, "generate")
    config = replace(CONFIG, beta=0.5, temperature=temperature, epochs=1, lam=0.8)
    policy, reference = stretched(), base()
    critic = opinionated(policy)
    twins = copy.deepcopy((policy, critic))
    metrics = next(run(policy, config, reference=reference, critic=critic))

    ((_, rollout),) = rollouts
    scores = row_scores(*twins, rollout, temperature)
    k1s, advantages, earned, values = [], [], [], []
    others = row_scores(reference, twins[1], rollout, temperature)
    for reward, (nats, guess, _), (ref, _, _) in zip(
        judged(rollout).tolist(), scores, others, strict=True
    ):
        k1 = (nats - ref).tolist()
        paid = [-0.5 * x for x in k1]
        paid[-1] += reward
        k1s.append(sum(k1))
        advantages += explicit(paid, guess.tolist(), 1.0, 0.8)
        earned += [sum(paid[t:]) for t in range(len(paid))]
        values += guess.tolist()
    A, R, V = map(torch.tensor, (advantages, earned, values))
    white = (A - A.mean()) / A.std(correction=0)
    nats = torch.cat([x[0] for x in scores])
    expected = {
        "completions": 12,
        "loss": 0.0,  # whitened, at ratio 1
        "value_loss": 0.5 * A.square().mean().item(),  # V - R is -A, before whitening
        "entropy": torch.cat([x[2] for x in scores]).mean().item(),
        "explained_variance": 1 - ((R - V).var() / R.var()).item(),
        "grad_norm": training.gradient_norm(-(white * nats).sum() / 12, twins[0]),
        "kl": sum(k1s) / 12,
        "ratio_first": 0.0,
        "approx_kl": 0.0,
        "clip_fraction": 0.0,
        "epochs_done": 1.0,
        "stopped_early": 0.0,
        "beta": 0.5,
    }
    training.assert_metrics(metrics, rollout, expected, rel=2e-4, floor=2e-5)


@pytest.mark.parametrize("layout", CRITICS)
def test_the_first_ratio_is_exactly_1(layout):
    """PPO-1: bit by bit, whatever the minibatches; PPO-2: and then no more."""
    config = replace(CONFIG, updates=2, minibatches=3, micro_batch=3, temperature=0.8)
    metrics = list(run(base(), config, critic=CRITICS[layout]))
    assert [row["ratio_first"] for row in metrics] == [0.0] * 2
    assert all(row["approx_kl"] > 0 for row in metrics)


def test_without_steps_the_ratio_stays_1():
    """PPO-1: lr 0, all epochs."""
    policy = base()
    critic = Critic(policy)
    config = replace(CONFIG, lr=0.0, epochs=3, updates=2)
    metrics = list(run(policy, config, critic=critic))
    for row in metrics:
        assert row["approx_kl"] == row["clip_fraction"] == 0.0
        assert row["epochs_done"] == 3
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))
    assert (critic.head.weight != 0).any()  # the critic has a rate of its own


def test_it_stops_an_update_that_has_moved_too_far():
    """The weights are those of a run that planned one epoch; the step is not taken."""
    ends = []
    for epochs, stop in ((1, None), (3, 1e-9), (3, 1e9), (3, None)):
        state = {}
        config = replace(CONFIG, epochs=epochs, kl_stop=stop, updates=2)
        metrics = list(run(base(), config, state=state))
        ends.append((training.weights_of(state), metrics[-1]))
    (one, _), (stopped, last), (on, _), (never, untouched) = ends
    assert torch.equal(one, stopped) and torch.equal(on, never)
    assert not torch.equal(one, never)
    assert last["stopped_early"] == 1 and last["epochs_done"] == 1
    assert last["approx_kl"] > 1e-9
    assert untouched["stopped_early"] == 0 and untouched["epochs_done"] == 3


def test_each_epoch_uses_each_answer_once(monkeypatch):
    """PPO-9, in another order each time; divided by the minibatch, not its parts."""
    drawn = training.spied(monkeypatch, ppo, "generate")
    calls = training.spied(monkeypatch, ppo, "policy_loss")
    config = replace(CONFIG, minibatches=2, micro_batch=4, prompts=5, updates=1)
    metrics = next(run(base(), config))
    assert metrics["epochs_done"] == 2
    sizes = [(len(args[0]), args[-1]) for args, _ in calls]
    assert [n for n, _ in sizes] == [4, 4, 4, 3] * 4
    assert {count for _, count in sizes} == {15}
    ((_, rollout),) = drawn
    lengths = rollout.lengths().tolist()
    epochs = [calls[:8], calls[8:]]
    for epoch in epochs:
        seen = [n for args, _ in epoch for n in args[3].sum(1).tolist()]
        assert sorted(seen) == sorted(lengths)
    halves = [
        torch.cat([F.pad(args[1], (0, 20))[:, :20] for args, _ in half]).sum()
        for half in (calls[:4], calls[8:12])
    ]
    assert halves[0] != halves[1]


def test_one_step_without_a_critic_is_reinforce():
    """X-6 for the whole run: the same weights, bit by bit, after every update."""
    bare = {"epochs": 1, "lam": 1.0, "gamma": 1.0, "beta": 0.0}
    ours, theirs = base(), base()
    config = replace(CONFIG, **bare)
    fields = {"updates", "prompts", "samples", "max_new_tokens", "lr", "warmup"}
    shared = {name: getattr(config, name) for name in fields | {"micro_batch"}}
    twin = METHODS["reinforce"].run(theirs, reinforce.ReinforceConfig(**shared))
    steps = run(ours, config, critic=NoCritic(), scale=lambda x, mask: x)
    for row, expected in zip(steps, twin, strict=True):
        training.assert_same_bits(dict(ours.state_dict()), dict(theirs.state_dict()))
        for name in ("reward", "length", "truncated", "grad_norm"):
            assert row[name] == expected[name]


@pytest.mark.parametrize("layout", CRITICS)
def test_half_precision_is_scored_in_float32(layout):
    policy = base().bfloat16()
    critic = CRITICS[layout](policy)
    tokens, mask = torch.ones(2, 5).long(), torch.ones(2, 4).bool()
    scored = ppo.score_tokens(policy, critic, tokens, mask, 1.0)
    assert {x.dtype for x in scored} == {torch.float32}
    metrics = list(run(policy, replace(CONFIG, updates=2), critic=critic))
    assert metrics[0]["ratio_first"] == 0 and metrics[-1]["grad_norm"] > 0


def test_an_update_may_stop_before_its_first_step(monkeypatch):
    """As where the policy drops out units, and scores an answer differently twice."""
    score, calls = ppo.score_tokens, []

    def unsteady(*args):
        calls.append(args)
        logprobs, *others = score(*args)
        return logprobs * (1 + 0.1 * len(calls)), *others

    monkeypatch.setattr(ppo, "score_tokens", unsteady)
    policy, config = base(), replace(CONFIG, updates=1, kl_stop=1e-9)
    (metrics,) = run(policy, config)
    assert metrics["epochs_done"] == metrics["grad_norm"] == 0
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))


def test_the_critics_target_is_not_whitened(monkeypatch):
    """Contract 6: R = A + V first; the scaling sees the whole batch, not its parts."""
    advantages = training.spied(monkeypatch, ppo, "gae")
    white = training.spied(monkeypatch, ppo, "whiten")
    losses = training.spied(monkeypatch, ppo, "value_loss")
    config = replace(CONFIG, epochs=1, micro_batch=99, updates=1)
    more = {"critic": opinionated, "scale": lambda *args: ppo.whiten(*args)}
    next(run(base(), config, **more))
    (r, V, mask, *_), A = advantages[0]
    assert [args[0].shape for args, _ in white] == [A.shape]
    ((_, _, R, live, *_), _) = losses[0]
    order = sorted((A + V)[mask].tolist())
    assert sorted(R[live].tolist()) == pytest.approx(order)
    assert r.sum() != 0 and abs(R[live].mean()) > 0.05


def test_the_loss_of_a_separate_critic_does_not_reach_the_policy():
    """Nor does its gradient's length: the two are clipped apart."""
    for shared, same in ((False, True), (True, False)):
        ends = []
        for weight in (0.1, 3.0):
            state, critic = {}, partial(opinionated, shared=shared)
            config = replace(CONFIG, value_coef=weight, updates=1)
            list(run(base(), config, critic=critic, state=state))
            ends.append(training.weights_of(state))
        assert torch.equal(*ends) == same


def test_the_entropy_bonus_keeps_the_policy_undecided():
    """It lowers the loss; without any reward it makes answers more random."""
    ends = {}
    for weight in (0.0, 1.0):
        config = replace(CONFIG, entropy_coef=weight)
        steps = run(base(), config, lambda _, texts: [0.0] * len(texts))
        ends[weight] = list(steps)[-1]["entropy"]
    assert ends[1.0] > ends[0.0] + 0.1


def test_the_price_of_kl_adapts_and_is_remembered():
    """KL-12: by the KL that is reported; `beta` is the price from here on."""
    state = {}
    adapt = partial(adapt_beta, target=0.05, horizon=50, completions=12)
    config = replace(CONFIG, beta=0.2, updates=4)
    steps = run(base(), config, reference=base(), next_beta=adapt, state=state)
    beta = 0.2
    for row in steps:
        beta = adapt(beta, row["kl"])
        assert row["beta"] == beta == state["beta"]
    assert beta != 0.2
