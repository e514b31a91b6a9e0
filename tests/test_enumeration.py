"""The harness itself, against plain Python, finite differences and identities."""

import math

import pytest
import torch
from hypothesis import given

from tests import enumeration as world
from tests import strategies

LOGITS = world.random_logits(0)
REFERENCE = world.random_logits(1)
REWARDS = torch.tensor(
    [0.3, 1.0, -0.5, 0.0, 2.0, 1.0, 0.1, -1.0, 0.7, 0.0, 1.5, 0.2, 0.0, -0.3, 1.0],
    dtype=torch.float64,
)
TABLES = strategies.logits((7, 3))


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The same world in plain Python: dicts, loops, math.exp, and no mask or padding.


def by_hand(logits):
    """{response: probability}, by walking the tree of prefixes."""
    rows = dict(zip(world.PREFIXES, logits.tolist(), strict=True))
    finished = {}

    def walk(prefix, probability):
        weights = [math.exp(x) for x in rows[prefix]]
        for token, weight in enumerate(weights):
            response, odds = (*prefix, token), probability * weight / sum(weights)
            if token == 2 or len(response) == 3:
                finished[response] = odds
            else:
                walk(response, odds)

    walk((), 1.0)
    return finished


def objective_by_hand(logits, rewards, reference, beta):
    policy, other = by_hand(logits), by_hand(reference)
    total = 0.0
    for response, reward in zip(world.RESPONSES, rewards.tolist(), strict=True):
        p, q = policy[response], other[response]
        total += p * (reward - beta * math.log(p / q))
    return total


def gradient_by_hand(logits, rewards, reference, beta):
    """Σ_y p(y) (r(y) - beta log p/q) Σ_t (onehot - softmax): no autograd."""
    policy, other = by_hand(logits), by_hand(reference)
    slope = torch.zeros(7, 3, dtype=torch.float64)
    for response, reward in zip(world.RESPONSES, rewards.tolist(), strict=True):
        p, q = policy[response], other[response]
        for t, token in enumerate(response):
            row = world.PREFIXES.index(response[:t])
            weights = [math.exp(x) for x in logits[row].tolist()]
            for v, weight in enumerate(weights):
                score = (v == token) - weight / sum(weights)
                slope[row, v] += p * (reward - beta * math.log(p / q)) * score
    return slope


def test_there_are_15_responses_of_unequal_length():
    assert len(world.RESPONSES) == len(set(world.RESPONSES)) == 15
    assert world.LENGTHS.bincount().tolist() == [0, 1, 2, 12]
    for response in world.RESPONSES:
        assert world.END not in response[:-1]
        assert response[-1] == world.END or len(response) == 3


@given(TABLES)
def test_probabilities_are_those_of_the_tree_and_sum_to_1(logits):
    odds = by_hand(logits)
    expected = torch.tensor([odds[y] for y in world.RESPONSES], dtype=torch.float64)
    actual = world.probabilities(logits)
    close(actual, expected)
    close(actual.sum(), torch.ones((), dtype=torch.float64))
    assert (world.token_logprobs(logits)[~world.MASK] == 0).all()


@given(TABLES)
def test_any_distribution_has_a_table(logits):
    distribution = world.probabilities(logits)
    close(world.probabilities(world.logits_of(distribution)), distribution)


@given(TABLES)
def test_expected_score_is_0(logits):
    """E[∇ log π] = 0: why a constant baseline is free and k1 is no loss."""
    expected = world.expected_gradient(lambda rows, x, mask: x[mask].sum(), logits)
    close(expected, torch.zeros(7, 3, dtype=torch.float64))
    one = world.gradient(lambda x: world.sequence_logprobs(x)[0], logits)
    assert one.abs().sum() > 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 2.0])
def test_objective_and_gradient_against_plain_python(beta):
    args = REWARDS, REFERENCE, beta
    assert math.isclose(
        world.objective(LOGITS, *args).item(), objective_by_hand(LOGITS, *args)
    )
    actual = world.true_gradient(LOGITS, *args)
    close(actual, gradient_by_hand(LOGITS, *args))
    step = 1e-5
    for i in range(7):
        for j in range(3):
            nudge = torch.zeros(7, 3, dtype=torch.float64)
            nudge[i, j] = step
            rise = objective_by_hand(LOGITS + nudge, *args)
            fall = objective_by_hand(LOGITS - nudge, *args)
            assert abs(actual[i, j].item() - (rise - fall) / (2 * step)) < 1e-8
    assert actual.abs().max() > 0.01


def test_expected_gradient_of_the_score_function_is_the_true_gradient():
    def surrogate(rows, logprobs, mask):
        return REWARDS[rows[0]] * logprobs[0][mask[0]].sum()

    expected = world.true_gradient(LOGITS, REWARDS)
    close(world.expected_gradient(surrogate, LOGITS), expected)
    # Negative controls: another response's reward, and another policy's draws.
    shifted = REWARDS.roll(1)

    def wrong(rows, logprobs, mask):
        return shifted[rows[0]] * logprobs[0][mask[0]].sum()

    assert world.cosine(world.expected_gradient(wrong, LOGITS), expected) < 0.9
    off_policy = world.expected_gradient(surrogate, LOGITS, behaviour=REFERENCE)
    assert (off_policy - expected).abs().max() > 0.05


def test_importance_weights_undo_the_behaviour_policy():
    old = world.sequence_logprobs(REFERENCE)

    def surrogate(rows, logprobs, mask):
        ratio = (logprobs.sum(1) - old[rows]).exp()
        return (ratio * REWARDS[rows]).sum()

    actual = world.expected_gradient(surrogate, LOGITS, behaviour=REFERENCE)
    close(actual, world.true_gradient(LOGITS, REWARDS))


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_tuples_are_independent_draws(samples):
    """The weights sum to 1, and each place of the tuple has the policy's marginal."""
    one = world.expectation(lambda rows, *_: torch.ones(()), LOGITS, samples)
    close(one, torch.ones((), dtype=torch.float64))
    for place in range(samples):
        actual = world.expectation(
            lambda rows, *_, place=place: REWARDS[rows[place]], LOGITS, samples
        )
        close(actual, (world.probabilities(LOGITS) * REWARDS).sum())


def test_pairs_see_both_samples():
    """E[(r1 - r2)^2] / 2 is the variance: a fact about pairs, not about one place."""
    p = world.probabilities(LOGITS)
    variance = (p * REWARDS**2).sum() - (p * REWARDS).sum() ** 2
    actual = world.expectation(
        lambda rows, *_: (REWARDS[rows[0]] - REWARDS[rows[1]]) ** 2 / 2, LOGITS, 2
    )
    close(actual, variance)


def test_a_pair_baseline_is_unbiased_and_its_own_mean_shrinks_by_half():
    """Both estimators at k = 2, written out: what RLOO and GRPO will be held to."""

    def surrogate(others):
        def loss(rows, logprobs, mask):
            rewards = REWARDS[rows]
            baseline = rewards.flip(0) if others else rewards.mean()
            return ((rewards - baseline) * logprobs.sum(1)).mean()

        return loss

    expected = world.true_gradient(LOGITS, REWARDS)
    close(world.expected_gradient(surrogate(others=True), LOGITS, 2), expected)
    close(world.expected_gradient(surrogate(others=False), LOGITS, 2), expected / 2)


def test_dividing_by_the_own_length_changes_the_direction():
    """The harness sees length bias."""

    def surrogate(rows, logprobs, mask):
        return (REWARDS[rows] * logprobs.sum(1) / mask.sum(1)).sum()

    expected = world.true_gradient(LOGITS, REWARDS)
    assert world.cosine(world.expected_gradient(surrogate, LOGITS), expected) < 0.95


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_optimum_is_a_maximum_worth_beta_log_z(beta):
    """At pi* = ref exp(r / beta) / Z the gradient is 0, and nothing is better."""
    best, value = world.optimum(REWARDS, REFERENCE, beta)
    logits = world.logits_of(best)
    close(world.objective(logits, REWARDS, REFERENCE, beta), value)
    slope = world.true_gradient(logits, REWARDS, REFERENCE, beta)
    close(slope, torch.zeros(7, 3, dtype=torch.float64))
    for seed in range(20):
        other = logits + world.random_logits(seed, scale=0.3)
        assert world.objective(other, REWARDS, REFERENCE, beta) < value
    assert world.true_gradient(LOGITS, REWARDS, REFERENCE, beta).abs().max() > 0.01


def test_detached_losses_expect_no_gradient():
    expected = world.expected_gradient(lambda rows, x, mask: x.detach().sum(), LOGITS)
    close(expected, torch.zeros(7, 3, dtype=torch.float64))


def test_cosine():
    assert world.cosine(LOGITS, 3 * LOGITS) == pytest.approx(1)
    assert world.cosine(LOGITS, -LOGITS) == pytest.approx(-1)
