"""Which KL estimate has which value and which gradient: lesson 17's table, row by row.

By enumeration, on fresh answers and on those of an older policy. Each row makes a claim
on the mean value and on the mean gradient of an estimate; the claim holds for this row,
and for no other.
"""

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor

from minialign.logprobs import kl_k1, kl_k2, kl_k3, kl_ratio_k3
from tests import enumeration as world
from tests.properties.common import close, float64

POLICY = world.random_logits(0)
REF = world.random_logits(1)
OLDER = POLICY + world.random_logits(5, scale=0.4)
REF_NATS = world.token_logprobs(REF)  # (15, 3)

# The estimates, of answers (B, 3): Estimate(logprobs, old, ref, mask) -> (B,)

Estimate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def per_token(kind) -> Estimate:
    """Σ of each token's."""

    def estimate(logprobs, old, ref, mask):
        if kind is kl_ratio_k3:
            return kind(logprobs, old, ref, mask).sum(1)
        return kind(logprobs, ref, mask).sum(1)

    return estimate


def whole(kind) -> Estimate:
    """That of the answer as one choice."""
    by_token = per_token(kind)

    def estimate(*nats_and_mask):
        *nats, mask = nats_and_mask
        sums = [x.sum(1, keepdim=True) for x in nats]
        return by_token(*sums, mask[:, :1])

    return estimate


def in_the_loss(estimate: Estimate, sampler: Tensor = POLICY) -> Tensor:
    """(7, 3): the mean gradient of the estimate, over answers of the sampler."""

    def loss(rows, logprobs, mask):
        old = world.token_logprobs(sampler)[rows]
        return estimate(logprobs, old, REF_NATS[rows], mask).sum()

    return world.expected_gradient(loss, POLICY, behaviour=sampler)


def in_the_reward(estimate: Estimate) -> Tensor:
    """(7, 3): the mean gradient of what is paid: E[k ∇ log π], k a constant."""

    def loss(rows, logprobs, mask):
        old = logprobs.detach()
        paid = estimate(old, old, REF_NATS[rows], mask)
        return (paid * logprobs.sum(1)).sum()

    return world.expected_gradient(loss, POLICY)


def value(estimate: Estimate, sampler: Tensor = POLICY) -> Tensor:
    nats = world.token_logprobs(POLICY)
    old = world.token_logprobs(sampler)
    each = estimate(nats, old, REF_NATS, world.MASK)  # (15,)
    return world.probabilities(sampler) @ each


# What may be claimed, by formulas of their own

KL = world.sequence_kl(POLICY, REF)
NOTHING = torch.zeros(7, 3, dtype=torch.float64)
REVERSE = world.gradient(lambda x: world.sequence_kl(x, REF), POLICY)
FORWARD = world.gradient(lambda x: world.sequence_kl(REF, x), POLICY)


def apart(logits: Tensor) -> Tensor:
    """(15, 3): log π − log π_ref of every token."""
    return world.token_logprobs(logits) - REF_NATS


def half_square(logits: Tensor, of_tokens: bool) -> Tensor:
    """E[d²/2], of the tokens or of the whole."""
    d = apart(logits)
    each = (d**2).sum(1) if of_tokens else d.sum(1) ** 2
    return world.probabilities(logits) @ each / 2


def of_choices(forward: bool) -> Tensor:
    """(7, 3): each prefix's own KL, as often as the policy comes there; how often it
    does is not differentiated."""
    through = torch.zeros(7, dtype=torch.float64)  # the chance to come to a prefix
    for chance, states, mask in zip(
        world.probabilities(POLICY), world.STATES, world.MASK, strict=True
    ):
        through[states[mask]] += chance

    def summed(logits):
        ours, theirs = logits.log_softmax(1), REF.log_softmax(1)
        first, second = (theirs, ours) if forward else (ours, theirs)
        return through @ (first.exp() * (first - second)).sum(1)

    return world.gradient(summed, POLICY)


K2 = half_square(POLICY, of_tokens=False)
K2_TOKENS = half_square(POLICY, of_tokens=True)
K2_SLOPE = world.gradient(lambda x: half_square(x, of_tokens=False), POLICY)
K2_TOKENS_SLOPE = world.gradient(lambda x: half_square(x, of_tokens=True), POLICY)

# estimate: (mean value, mean gradient). What is paid has the gradient of the value, but
# for that of the estimate itself: ∇E[k] = E[∇k] + E[k ∇ log π].
IN_THE_LOSS = {
    "k1": (per_token(kl_k1), KL, NOTHING),
    "k2 whole": (whole(kl_k2), K2, REVERSE),
    "k2 per token": (per_token(kl_k2), K2_TOKENS, of_choices(forward=False)),
    "k3 whole": (whole(kl_k3), KL, FORWARD),
    "k3 per token": (per_token(kl_k3), KL, of_choices(forward=True)),
    "ratio × k3 whole": (whole(kl_ratio_k3), KL, REVERSE),
    "ratio × k3 per token": (per_token(kl_ratio_k3), KL, of_choices(forward=False)),
}
IN_THE_REWARD = {
    "k1": (per_token(kl_k1), KL, REVERSE),
    "k2 whole": (whole(kl_k2), K2, K2_SLOPE - REVERSE),
    "k2 per token": (
        per_token(kl_k2),
        K2_TOKENS,
        K2_TOKENS_SLOPE - of_choices(forward=False),
    ),
    "k3 whole": (whole(kl_k3), KL, REVERSE - FORWARD),
    "k3 per token": (per_token(kl_k3), KL, REVERSE - of_choices(forward=True)),
}
PLACES = {"loss": (in_the_loss, IN_THE_LOSS), "reward": (in_the_reward, IN_THE_REWARD)}
ROWS = [(place, name) for place, (_, rows) in PLACES.items() for name in rows]


def holds(place: str, estimate: Estimate, mean: Tensor, slope: Tensor) -> bool:
    """Whether the claim on value and gradient is true of this estimate there."""
    gradient_of, _ = PLACES[place]
    right_value = torch.allclose(value(estimate), mean, rtol=0, atol=1e-10)
    found = gradient_of(estimate)
    return right_value and torch.allclose(found, slope, rtol=0, atol=1e-10)


@pytest.mark.parametrize("place, name", ROWS)
def test_a_row_of_the_table(place, name):
    assert holds(place, *PLACES[place][1][name])


@pytest.mark.parametrize("place", PLACES)
def test_no_row_is_its_neighbour(place):
    """What is claimed of one estimate is false of every other."""
    rows = PLACES[place][1]
    for one, other in permutations(rows, 2):
        _, *claim = rows[one]
        estimate, *_ = rows[other]
        assert not holds(place, estimate, *claim), f"{other} passes for {one}"


@pytest.mark.parametrize("name", IN_THE_LOSS.keys() & IN_THE_REWARD.keys())
def test_no_estimate_does_alike_in_the_loss_and_in_the_reward(name):
    estimate, *_ = IN_THE_LOSS[name]
    assert (in_the_loss(estimate) - in_the_reward(estimate)).abs().max() > 1e-3


def test_k1_of_the_whole_is_k1_summed_over_tokens():
    close(value(whole(kl_k1)), KL)
    close(in_the_loss(whole(kl_k1)), NOTHING)
    close(in_the_reward(whole(kl_k1)), REVERSE)


def test_on_an_older_policys_answers_one_estimate_is_left():
    """ratio × k3 of the whole keeps its value and its gradient; no other does."""
    for name, (estimate, mean, slope) in IN_THE_LOSS.items():
        kept = torch.allclose(value(estimate, OLDER), mean, rtol=0, atol=1e-10)
        found = in_the_loss(estimate, OLDER)
        kept = kept and torch.allclose(found, slope, rtol=0, atol=1e-10)
        assert kept == (name == "ratio × k3 whole"), name


# One choice among three tokens: numbers that were computed by hand, elsewhere

THREE = float64([0.5, -0.2, 0.1]).log_softmax(0)
THREE_REF = float64([0.0, 0.3, -0.4]).log_softmax(0)
PAID = {  # mean, deviation, E[k ∇ log π] by the logits
    "k1": (kl_k1, 0.102848, 0.420298, [0.105758, -0.176650, 0.070892]),
    "k2": (kl_k2, 0.093614, 0.070603, [-0.017766, 0.029674, -0.011909]),
    "k3": (kl_k3, 0.102848, 0.097856, [-0.024623, 0.041129, -0.016505]),
}


@pytest.mark.parametrize("name", PAID)
def test_k3_in_the_reward_has_the_right_value_and_points_the_other_way(name):
    kind, mean, deviation, slope = PAID[name]
    p = THREE.exp()
    mask = torch.ones(3, 1, dtype=torch.bool)
    k = kind(THREE[:, None], THREE_REF[:, None], mask)[:, 0]  # (3,)
    close(p @ k, mean, atol=1e-6)
    close((p @ k**2 - (p @ k) ** 2).sqrt(), deviation, atol=1e-6)
    close(p * (k - p @ k), slope, atol=1e-6)
    right = float64(PAID["k1"][3])
    assert (torch.tensor(slope).double() @ right > 0) == (name == "k1")
