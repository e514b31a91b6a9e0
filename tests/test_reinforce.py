"""REINFORCE: its expected gradient by enumeration, its loss, and training."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minialign.algorithms import reinforce
from minialign.algorithms.reinforce import (
    batch_mean,
    moving_average,
    no_baseline,
    reinforce_loss,
    shape_rewards,
)
from tests import enumeration as world
from tests import strategies
from tests.methods import METHODS
from tests.properties import common, training
from tests.toy import (
    base,
    judged,
    row_nats,
    stretched,
)

# Part 1: the expected gradient, over 15 responses (tests/enumeration.py)

LOGITS, REFERENCE = world.random_logits(0), world.random_logits(1)
REF_LOGPROBS = world.token_logprobs(REFERENCE)  # (15, 3)
REWARDS = world.random_logits(2).flatten()[:15]  # any numbers will do


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def ascent(loss, samples=1):
    """(7, 3): what the policy moves along, in expectation: -E[∇ loss]."""
    return -world.expected_gradient(loss, LOGITS, samples)


def with_baseline(baseline, memory=0.7):
    def loss(rows, logprobs, mask):
        rewards = REWARDS[rows]
        return reinforce_loss(logprobs, rewards - baseline(rewards, memory), mask)

    return loss


def constant(rewards, memory):
    return torch.full_like(rewards, 5.0)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("baseline", [no_baseline, moving_average, constant])
def test_a_baseline_that_has_not_seen_the_answer_costs_nothing(baseline, samples):
    """PG-1: the expected gradient is the gradient of E[r]."""
    actual = ascent(with_baseline(baseline), samples)
    close(actual, world.true_gradient(LOGITS, REWARDS))


def test_a_baseline_that_looks_at_the_answer_is_biased():
    """PG-1, the negative control."""
    expected = world.true_gradient(LOGITS, REWARDS)

    def loss(rows, logprobs, mask):
        return reinforce_loss(logprobs, REWARDS[rows] - mask.sum(1).double(), mask)

    actual = ascent(loss)
    assert (actual - expected).abs().max() > 0.1
    assert world.cosine(actual, expected) < 0.9


@pytest.mark.parametrize("samples", [2, 3])
def test_the_batch_mean_shortens_the_gradient(samples):
    """PG-3: by (B - 1)/B exactly, and in no other direction."""
    expected = (samples - 1) / samples * world.true_gradient(LOGITS, REWARDS)
    close(ascent(with_baseline(batch_mean), samples), expected)


def test_one_answer_is_its_own_mean():
    close(ascent(with_baseline(batch_mean), 1), 0.0)


def test_dividing_by_the_length_turns_the_gradient():
    """PG-5, a negative control: and makes a constant baseline matter."""
    expected = world.true_gradient(LOGITS, REWARDS)

    def divided(baseline):
        def loss(rows, logprobs, mask):
            advantages = (REWARDS[rows] - baseline) / mask.sum(1)
            return reinforce_loss(logprobs, advantages, mask)

        return ascent(loss)

    assert world.cosine(divided(0.0), expected) < 0.98
    assert (divided(0.0) - divided(1.0)).abs().max() > 0.05

    def by_a_constant(rows, logprobs, mask):
        return reinforce_loss(logprobs, REWARDS[rows], mask, count=4)

    close(ascent(by_a_constant), expected / 4)


def penalised(shape):
    def loss(rows, logprobs, mask):
        shaped = shape(REWARDS[rows], logprobs, REF_LOGPROBS[rows], mask)
        return reinforce_loss(logprobs, shaped, mask)

    return loss


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_the_kl_in_the_reward_has_the_gradient_of_the_objective(beta):
    """PG-7: that of E[r] - beta KL(policy ‖ reference), over whole answers."""
    expected = world.true_gradient(LOGITS, REWARDS, REFERENCE, beta)
    close(ascent(penalised(partial(shape_rewards, beta=beta))), expected)
    assert beta == 0 or (expected - world.true_gradient(LOGITS, REWARDS)).norm() > 0.05


def swapped(rewards, logprobs, ref_logprobs, mask):
    return shape_rewards(rewards, ref_logprobs, logprobs, mask, beta=2.0)


def per_token(rewards, logprobs, ref_logprobs, mask):
    shaped = shape_rewards(rewards, logprobs, ref_logprobs, mask, beta=2.0)
    return rewards + (shaped - rewards) / mask.sum(1)


def ignored(rewards, logprobs, ref_logprobs, mask):
    return shape_rewards(rewards, logprobs, ref_logprobs, mask, beta=0.0)


@pytest.mark.parametrize("wrong", [swapped, per_token, ignored])
def test_wrong_penalties_are_seen(wrong):
    """PG-7, negative controls."""
    expected = world.true_gradient(LOGITS, REWARDS, REFERENCE, 2.0)
    assert (ascent(penalised(wrong)) - expected).abs().max() > 0.05


def test_nothing_moves_at_the_optimum():
    """X-1: at reference exp(r / beta) / Z every answer has the same shaped reward."""
    best, value = world.optimum(REWARDS, REFERENCE, beta=0.5)
    logits = world.logits_of(best)
    logprobs = world.token_logprobs(logits)
    shaped = shape_rewards(REWARDS, logprobs, REF_LOGPROBS, world.MASK, beta=0.5)
    close(shaped, value)


def test_a_flipped_sign_descends():
    expected = world.true_gradient(LOGITS, REWARDS)
    right = with_baseline(no_baseline)
    assert world.cosine(ascent(lambda *args: -right(*args)), expected) < -0.999


# Part 2: the loss

float64 = partial(torch.tensor, dtype=torch.float64)
CASES = strategies.batches(logprobs=strategies.logprobs, rows=("advantages",))
CASE = {
    "logprobs": float64([[-0.5, -1.5, -2.0], [-0.1, -3.0, -9.0]]),
    "advantages": float64([2.0, -1.0]),
    "mask": torch.tensor([[True, True, True], [True, True, False]]),
}
SHAPED = {
    "rewards": float64([1.0, 0.0]),
    "logprobs": CASE["logprobs"],
    "ref_logprobs": float64([[-1.5, -1.0, -2.0], [-0.2, -1.0, -0.5]]),
    "mask": CASE["mask"],
}


def test_loss_by_hand():
    """-(2 (-0.5 - 1.5 - 2) - 1 (-0.1 - 3)) / 2, and -A / B for every live token."""
    leaf = CASE["logprobs"].clone().requires_grad_()
    loss = reinforce_loss(leaf, CASE["advantages"], CASE["mask"])
    close(loss, 2.45)
    (slope,) = torch.autograd.grad(loss, leaf)
    assert slope.tolist() == [[-1.0, -1.0, -1.0], [0.5, 0.5, 0.0]]


def test_shaped_rewards_by_hand():
    """1 - 0.5 (1.0 - 0.5 + 0.0) and 0 - 0.5 (0.1 - 2.0)."""
    shaped = shape_rewards(**SHAPED, beta=0.5)
    assert shaped.tolist() == pytest.approx([0.75, 0.95])


def test_the_loss_owes_what_every_loss_owes():
    """C-1 to C-12."""
    common.check_mask_is_inert(reinforce_loss, CASES)
    common.check_microbatches(reinforce_loss, CASES, common.live_rows)
    common.check_permutation(reinforce_loss, CASES)
    common.check_shapes_refused(reinforce_loss, CASE)
    common.check_no_gradient_to(reinforce_loss, CASES, ["advantages"])
    common.check_gradient_reaches(reinforce_loss, CASE)
    common.check_pure(reinforce_loss, CASES)
    common.check_dtype(reinforce_loss, CASES)
    common.check_duplication(reinforce_loss, CASES)


def test_shaping_owes_it_too():
    """Row by row; no gradient to anything, for R is a constant of the policy."""
    shape = partial(shape_rewards, beta=0.3)
    full_rows = strategies.batches(
        logprobs=strategies.logprobs,
        ref_logprobs=strategies.logprobs,
        rows=("rewards",),
    ).filter(lambda case: bool(case["mask"].any(1).all()))
    common.check_mask_is_inert(shape, full_rows)
    common.check_permutation(shape, full_rows)
    common.check_shapes_refused(shape, SHAPED)
    names = ["rewards", "logprobs", "ref_logprobs"]
    common.check_no_gradient_to(shape, full_rows, names)
    common.check_pure(shape, full_rows)
    common.check_dtype(shape, full_rows, names)
    betas = {str(b): partial(shape_rewards, beta=b) for b in (0, 0.1, 0.3)}
    common.check_option_matters(
        {b: lambda s=s, **case: s(**case).sum() for b, s in betas.items()}, SHAPED
    )


def by_multiplication(logprobs, advantages, mask, count=None):
    """nan * 0 is nan."""
    rows = mask.any(1).sum() if count is None else count
    return -(logprobs * advantages.detach()[:, None] * mask).sum() / rows


def token_normalised(logprobs, advantages, mask, count=None):
    """The token mean of other codes: its divisor depends on the policy's lengths."""
    live = mask.any(1).sum() if count is None else count
    return reinforce_loss(logprobs, advantages, mask, count) * live / mask.sum()


def broadcast(logprobs, advantages, mask, count=None):
    """(B, 1) advantages, or (1, B), or one for all, are as welcome as (B,)."""
    rows = advantages.detach().expand(len(mask), -1)[:, 0]
    return reinforce_loss(logprobs, rows, mask, count)


@pytest.mark.parametrize(
    "check, wrong, cases",
    [
        (common.check_mask_is_inert, by_multiplication, CASES),
        (common.check_shapes_refused, broadcast, CASE),
        (
            partial(common.check_microbatches, count=common.live_rows),
            token_normalised,
            CASES,
        ),
    ],
)
def test_the_properties_find_wrong_losses(check, wrong, cases):
    assert common.refutes(check, wrong, cases)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["logprobs", "advantages"])
def test_the_loss_refuses_what_is_not_finite(name, bad):
    case = {**CASE, name: CASE[name].clone()}
    case[name][1] = bad
    common.assert_refused(reinforce_loss, case, ValueError, f"{bad}", [name])


@pytest.mark.parametrize("name", ["rewards", "logprobs", "ref_logprobs"])
def test_shaping_refuses_what_is_not_finite(name):
    case = {**SHAPED, name: SHAPED[name].clone()}
    case[name][1] = math.nan
    shape = partial(shape_rewards, beta=0.0)
    common.assert_refused(shape, case, ValueError, "nan", [name])


def test_probabilities_above_1_and_empty_batches_are_refused():
    case = {**CASE, "logprobs": -CASE["logprobs"]}
    common.assert_refused(reinforce_loss, case, ValueError, "above 0", ["logprobs"])
    case = {**CASE, "mask": torch.zeros_like(CASE["mask"])}
    common.assert_refused(reinforce_loss, case, ValueError, "no live token", ["mask"])


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_shaping_refuses_the_beta(beta):
    with pytest.raises(ValueError, match="beta: got"):
        shape_rewards(**SHAPED, beta=beta)


@given(strategies.rewards((5,)), st.sampled_from([0.0, 0.25, -3.0]))
def test_baselines(rewards, memory):
    close(no_baseline(rewards, memory), 0.0)
    close(moving_average(rewards, memory), memory)
    close(batch_mean(rewards, memory), sum(rewards.tolist()) / 5)
    for baseline in (no_baseline, moving_average, batch_mean):
        assert baseline(rewards, memory).shape == ()


# Part 3: training, in a world where the answers are "y" and "no"

METHOD = METHODS["reinforce"]
CONFIG = METHOD.config
run = METHOD.run


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, row by row, against code of its own."""
    drawn = training.spied(monkeypatch, reinforce, "generate")
    config = replace(CONFIG, beta=0.5, temperature=temperature)
    policy, reference = stretched(), base()
    twin = copy.deepcopy(policy)
    metrics = next(run(policy, config, reference=reference, baseline=batch_mean))

    ((_, rollout),) = drawn
    rewards = judged(rollout)  # (12,)
    nats = row_nats(twin, rollout, temperature)  # (12,)
    k1 = (nats - row_nats(reference, rollout, temperature)).detach()
    shaped = rewards - 0.5 * k1
    advantages = shaped - shaped.mean()
    loss = -(advantages * nats).mean()
    expected = {
        "completions": 12,
        "baseline": shaped.mean().item(),
        "loss": loss.item(),
        "grad_norm": training.gradient_norm(loss, twin),
        "kl": k1.mean().item(),
    }
    training.assert_metrics(metrics, rollout, expected)


def test_the_moving_average_remembers_earlier_batches():
    """First nothing, then the first mean, then decay x memory + (1 - decay) x mean."""
    config = replace(CONFIG, memory_decay=0.75)
    state = {}
    metrics = list(run(base(), config, baseline=moving_average, state=state))
    rewards = [row["reward"] for row in metrics]
    memory, expected = rewards[0], [0.0]
    for reward in rewards[1:]:
        expected.append(memory)
        memory = 0.75 * memory + 0.25 * reward
    assert [row["baseline"] for row in metrics] == pytest.approx(expected, abs=1e-6)
    assert state["memory"] == pytest.approx(memory, abs=1e-6)
    assert len(set(rewards)) > 2
