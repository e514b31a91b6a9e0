"""Identities across files: no algorithm imports another, and these tests tie them.

Each test states under which conditions two methods are one, and then drops a condition
and sees them part.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from minialign.algorithms import (
    dpo,
    grpo,
    ppo,
    reinforce,
    rejection_sampling,
    remax,
    rloo,
    rrhf,
    sft,
)
from minialign.problems import Problem
from tests import enumeration as world
from tests.toy import PROBLEMS, TOKENIZER, base

REFERENCE = world.random_logits(1)
REF_LOGPROBS = world.token_logprobs(REFERENCE)  # (15, 3)
REWARDS = world.random_logits(2).flatten()[:15]  # distinct: any numbers will do
RIGHT = (REWARDS > 0.3).double()  # (15,), some 0 and some 1
BETA = 0.5


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def far(actual, expected, distance=0.01):
    assert (actual - expected).abs().max() > distance


# One batch with rows of unequal length: what is the same on it needs no expectation

draw = torch.Generator().manual_seed(3)
MASK = torch.tensor([[True] * n + [False] * (5 - n) for n in (5, 2, 3, 1, 4, 5)])
LOGPROBS = -3 * torch.rand(6, 5, generator=draw, dtype=torch.float64)  # (6, 5)
OTHERS = -3 * torch.rand(6, 5, generator=draw, dtype=torch.float64)  # (6, 5)
A = torch.randn(6, generator=draw, dtype=torch.float64)  # (6,), both signs
NEAR = LOGPROBS - 0.3 * torch.rand(6, 5, generator=draw, dtype=torch.float64)


def slope(loss, logprobs=LOGPROBS):
    """(6, 5): the gradient of a loss of log-probs."""
    leaf = logprobs.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def reinforced(advantages=A):
    return slope(lambda x: reinforce.reinforce_loss(x, advantages, MASK))


def test_the_batch_tells_signs_and_lengths_apart():
    assert (A > 0).any() and (A < 0).any() and len(set(MASK.sum(1).tolist())) > 3


# Whose expected gradient vanishes at pi* = reference exp(r / beta) / Z


def shaped(rows, logprobs, mask, beta=BETA):
    ref_logprobs = REF_LOGPROBS[rows]
    return reinforce.shape_rewards(REWARDS[rows], logprobs, ref_logprobs, mask, beta)


def reinforce_method(rows, logprobs, mask):
    return reinforce.reinforce_loss(logprobs, shaped(rows, logprobs, mask), mask)


def remax_method(rows, logprobs, mask):
    """Greedy is response 4, whatever the policy: a baseline looks at no sample."""
    advantages = remax.remax_advantages(REWARDS[rows][:, None], REWARDS[[4]])[:, 0]
    k1 = (logprobs - REF_LOGPROBS[rows]).detach()
    weights = remax.whole_answer(advantages, k1, mask, BETA)
    return remax.remax_loss(logprobs, weights, mask)


def rloo_method(rows, logprobs, mask):
    advantages = rloo.leave_one_out(shaped(rows, logprobs, mask)[None])[0]
    return rloo.rloo_loss(logprobs, advantages, mask)


def grpo_method(rows, logprobs, mask, rewards=None, **price):
    """With std and lengths, and the KL in the reward."""
    rewards = shaped(rows, logprobs, mask) if rewards is None else rewards
    advantages = grpo.group_advantages(rewards[None])[0]
    return grpo.grpo_loss(logprobs, logprobs.detach(), advantages, mask, **price)


def ppo_method(rows, logprobs, mask, lam=1.0):
    """A critic that says 0, λ = 1, no whitening, the first step of a draw."""
    paid = REWARDS[rows], logprobs, REF_LOGPROBS[rows], mask, BETA
    token_rewards = ppo.shape_token_rewards(*paid)
    zeros = torch.zeros_like(token_rewards)
    advantages = ppo.gae(token_rewards, zeros, mask, 1.0, lam)
    fixed = logprobs.detach(), advantages, mask, 0.2, 0.2
    return ppo.policy_loss(logprobs, *fixed)


def dpo_pair(rows, logprobs, mask, weights):
    """Both orders of a pair, each with the chance that it is labelled so."""
    sums, refs = logprobs.sum(1), REF_LOGPROBS[rows].sum(1)
    total = torch.zeros((), dtype=sums.dtype)
    for (won, lost), weight in zip(([0, 1], [1, 0]), weights, strict=True):
        pair = sums[[won]], sums[[lost]], refs[[won]], refs[[lost]]
        total = total + weight * dpo.dpo_loss(*pair, BETA)
    return total


def dpo_method(rows, logprobs, mask):
    """Bradley-Terry labels: y_i is preferred with chance σ(r_i − r_j)."""
    gap = REWARDS[rows[0]] - REWARDS[rows[1]]
    return dpo_pair(rows, logprobs, mask, (gap.sigmoid(), (-gap).sigmoid()))


def regression_method(rows, logprobs, mask):
    """Reward-weighted regression: imitation, weighted by exp(r / beta)."""
    weights = (REWARDS[rows] / BETA).exp()
    return rejection_sampling.likelihood_loss(logprobs, weights, mask)


# Loss, answers per group, who draws them (None: the policy that is trained).
STILL = {
    "reinforce": (reinforce_method, 1, None),
    "remax": (remax_method, 1, None),
    "rloo": (rloo_method, 2, None),
    "grpo, k1 in the reward": (grpo_method, 2, None),
    "ppo": (ppo_method, 1, None),
    "dpo": (dpo_method, 2, world.random_logits(5)),  # anyone's answers will do
    "reward-weighted regression": (regression_method, 1, REFERENCE),
}


@pytest.mark.parametrize("loss, samples, behaviour", STILL.values(), ids=STILL)
def test_the_optimum_is_where_they_all_stand_still(loss, samples, behaviour):
    """At pi* for the *same* beta and reference. Elsewhere, even at the optimum for
    another beta, each of them moves."""
    at_best, elsewhere = (
        world.expected_gradient(loss, logits, samples, behaviour)
        for logits in (
            world.logits_of(world.optimum(REWARDS, REFERENCE, BETA)[0]),
            world.logits_of(world.optimum(REWARDS, REFERENCE, 2 * BETA)[0]),
        )
    )
    close(at_best, 0.0)
    far(elsewhere, 0.0)


def grpo_with_k3(rows, logprobs, mask):
    price = {"beta": BETA, "ref_logprobs": REF_LOGPROBS[rows]}
    return grpo_method(rows, logprobs, mask, REWARDS[rows], **price)


def dpo_without_doubt(rows, logprobs, mask):
    gap = REWARDS[rows[0]] - REWARDS[rows[1]]
    return dpo_pair(rows, logprobs, mask, ((gap > 0).double(), (gap < 0).double()))


def distrusting_ppo(rows, logprobs, mask):
    """λ < 1 trusts a critic that says 0: biased."""
    return ppo_method(rows, logprobs, mask, lam=0.5)


def unpriced(rows, logprobs, mask):
    return reinforce.reinforce_loss(logprobs, REWARDS[rows], mask)


def rrhf_method(rows, logprobs, mask):
    return rrhf.rrhf_loss(logprobs, REWARDS[rows][None], mask)


MOVING = {
    "grpo, k3 in the loss": (grpo_with_k3, 2, None),
    "dpo, always the better one": (dpo_without_doubt, 2, REFERENCE),
    "ppo, lambda < 1, no critic": (distrusting_ppo, 1, None),
    "reinforce, no KL": (unpriced, 1, None),
    "rrhf": (rrhf_method, 2, None),
    "regression, stale": (regression_method, 1, None),
}


@pytest.mark.parametrize("loss, samples, behaviour", MOVING.values(), ids=MOVING)
def test_the_others_leave_the_optimum(loss, samples, behaviour):
    """Each lacks one of the conditions above."""
    best = world.logits_of(world.optimum(REWARDS, REFERENCE, BETA)[0])
    far(world.expected_gradient(loss, best, samples, behaviour), 0.0)


# DPO and RLOO


def paired(logprobs, ref_logprobs, beta=BETA):
    """Rows 0, 2, 4 are preferred to rows 1, 3, 5."""
    sums, refs = (torch.where(MASK, x, 0.0).sum(1) for x in (logprobs, ref_logprobs))
    return dpo.dpo_loss(sums[0::2], sums[1::2], refs[0::2], refs[1::2], beta)


def test_dpo_starts_as_rloo():
    """Where the policy *is* the reference, DPO(beta) has the gradient, factor 1,
    of RLOO with K = 2 answers whose rewards differ by beta."""
    rewards = torch.tensor([[BETA, 0.0]], dtype=torch.float64).expand(3, 2)
    advantages = rloo.leave_one_out(rewards).flatten()
    expected = slope(lambda x: rloo.rloo_loss(x, advantages, MASK))
    close(slope(lambda x: paired(x, LOGPROBS)), expected)
    far(slope(lambda x: paired(x, LOGPROBS, 2 * BETA)), expected)


def test_away_from_the_reference_dpo_pulls_by_how_wrong_it_is():
    """The pair's pull is 2 σ(−β h) times RLOO's."""
    rewards = torch.tensor([[BETA, 0.0]], dtype=torch.float64).expand(3, 2)
    advantages = rloo.leave_one_out(rewards).flatten()
    expected = slope(lambda x: rloo.rloo_loss(x, advantages, MASK))
    change = torch.where(MASK, LOGPROBS - OTHERS, 0.0).sum(1)
    h = change[0::2] - change[1::2]  # (3,)
    factor = 2 * torch.sigmoid(-BETA * h).repeat_interleave(2)[:, None]
    actual = slope(lambda x: paired(x, OTHERS))
    close(actual, expected * factor)
    far(actual, expected)


# The first step of PPO and GRPO


def test_ppo_starts_as_reinforce():
    """At ratio 1 the clip is silent, so with one advantage for a whole answer PPO
    has REINFORCE's gradient. After a step the ratio weighs it and the clip cuts it."""
    whole = A[:, None].expand(6, 5)

    def loss(old):
        return slope(lambda x: ppo.policy_loss(x, old, whole, MASK, 0.2, 0.2))

    close(loss(LOGPROBS), reinforced())
    far(loss(OTHERS), reinforced())
    assert (loss(OTHERS)[MASK] == 0).any(), "nothing was clipped"


def grpo_slope(advantages, weights, old=LOGPROBS):
    def loss(x):
        return grpo.grpo_loss(x, old, advantages, MASK, weights)

    return slope(loss)


def test_grpo_starts_as_reinforce():
    """At ratio 1, with a constant divisor: REINFORCE over max_new_tokens. Divided
    by each answer's own length, short answers count for more: another direction."""
    close(5 * grpo_slope(A, grpo.by_constant(MASK, 5)), reinforced())
    actual = grpo_slope(A, grpo.per_sequence(MASK, 5))
    close(actual, reinforced(A / MASK.sum(1)))
    assert world.cosine(actual, reinforced()) < 0.98
    far(5 * grpo_slope(A, grpo.by_constant(MASK, 5), OTHERS), reinforced())


def test_grpo_and_ppo_clip_alike():
    """At *any* ratio, the same advantage at every token and the same reduction."""
    whole, weights = A[:, None].expand(6, 5), MASK.double() / 6

    def pair(old, low, high):
        band = {"eps_low": low, "eps_high": high}
        by_ppo = slope(lambda x: ppo.policy_loss(x, old, whole, MASK, **band))
        by_grpo = slope(lambda x: grpo.grpo_loss(x, old, A, MASK, weights, **band))
        return by_ppo, by_grpo

    for old in (NEAR, OTHERS):  # ratios of 1 to 1.35, and of any size
        close(*pair(old, 0.1, 0.3))
    far(pair(NEAR, 0.1, 0.3)[0], pair(NEAR, 0.1, 0.1)[1])


@pytest.mark.parametrize("groups", [3, 2])  # K = 2, 3
def test_grpo_without_std_is_rloo_but_for_its_own_share(groups):
    """(K − 1)/K times RLOO, at ratio 1, divided by a constant. With std each group
    has a factor of its own: no rescaling of the batch."""
    K = 6 // groups
    rewards = A.view(groups, K)
    expected = slope(
        lambda x: rloo.rloo_loss(x, rloo.leave_one_out(rewards).flatten(), MASK)
    )
    weights = 5 * grpo.by_constant(MASK, 5)
    centred = grpo_slope(grpo.centred_advantages(rewards).flatten(), weights)
    close(centred, (K - 1) / K * expected)
    divided = grpo_slope(grpo.group_advantages(rewards).flatten(), weights)
    assert world.cosine(centred, expected) > 1 - 1e-12
    assert world.cosine(divided, expected) < 0.99


def test_remax_without_its_baseline_is_reinforce():
    """A greedy answer that earns 0, beta 0. One that earns something makes another loss
    (of the same expected gradient)."""

    def loss(greedy):
        advantages = remax.remax_advantages(A[:, None], torch.full_like(A, greedy))
        weights = remax.whole_answer(advantages[:, 0], 0 * LOGPROBS, MASK, 0.0)
        return slope(lambda x: remax.remax_loss(x, weights, MASK))

    close(loss(0.0), reinforced())
    close(loss(1.0), reinforced(A - 1))
    far(loss(1.0), reinforced())


# Imitation


def kept(rewards, select=rejection_sampling.select_best):
    """Which of the answers (P, K) are kept; where nothing ties, lots do not matter."""
    return select(rewards, torch.ones_like(rewards), torch.Generator().manual_seed(0))


def best_of(K, rewards):
    """(15,): how often each response is drawn by the reference K times and kept."""
    rows = torch.tensor(list(product(range(15), repeat=K)))  # (15^K, K)
    chance = world.probabilities(REFERENCE)[rows].prod(1)  # (15^K,)
    weights = chance[:, None] * kept(rewards[rows])  # (15^K, K)
    total = torch.zeros(15, dtype=torch.float64)
    return total.index_add(0, rows.flatten(), weights.flatten())


def test_the_best_of_one_is_the_reference():
    """If every reward is above 0; answers that earned nothing are never kept. Of
    two, P(best has rank i) = F_i² − F_{i−1}², F the chance of rank i or lower (BON-1).
    """
    positive = REWARDS - REWARDS.min() + 1
    chance = world.probabilities(REFERENCE)
    close(best_of(1, positive), chance)
    order = REWARDS.argsort()
    below = chance[order].cumsum(0)  # (15,)
    squared = torch.cat((torch.zeros(1, dtype=torch.float64), below)) ** 2
    # A response drawn twice ties with itself: one of the two copies is kept.
    close(best_of(2, positive)[order], squared.diff())
    close(best_of(1, RIGHT), chance * RIGHT)
    far(best_of(1, RIGHT), chance)
    far(best_of(2, positive), chance)


def test_rejection_sampling_is_sft_on_the_best():
    """RAFT(K) = SFT on best-of-K, given the same normaliser: the live tokens that
    were kept. Divided by the answers drawn it is shorter, not other (RAFT-1)."""
    rewards = (A - A.min() + 1).view(2, 3)
    weights = kept(rewards).flatten()  # (6,)
    assert weights.tolist() == (rewards == rewards.amax(1)[:, None]).flatten().tolist()
    best = weights.nonzero()[:, 0]
    expected = torch.zeros_like(LOGPROBS)
    expected[best] = slope(lambda x: sft.sft_loss(x, MASK[best]), LOGPROBS[best])
    live = int(MASK[best].sum())

    def loss(count):
        w = weights.double()
        return slope(
            lambda x: rejection_sampling.likelihood_loss(x, w, MASK, count=count)
        )

    close(loss(live), expected)
    close(loss(None), expected * live / 6)
    far(loss(None), expected)
    far(slope(lambda x: sft.sft_loss(x, MASK)), expected)


def selected(count):
    """One answer, kept if right."""

    def loss(rows, logprobs, mask):
        weights = kept(RIGHT[rows][None], rejection_sampling.select_right)[0].double()
        return rejection_sampling.likelihood_loss(logprobs, weights, mask, count)

    return loss


def test_one_fresh_step_of_rejection_sampling_is_reinforce():
    """Rewards 0 and 1, answers of the policy itself, divided by the answers *drawn*.

    Divided by those kept it is 1/p as long, p the accuracy: the same direction. On
    answers of another policy it is another gradient.
    """
    expected = world.true_gradient(REFERENCE, RIGHT)
    p = (world.probabilities(REFERENCE) @ RIGHT).item()
    actual = world.expected_gradient(selected(1), REFERENCE)
    close(-actual, expected)

    def plain(rows, logprobs, mask):
        return reinforce.reinforce_loss(logprobs, RIGHT[rows], mask)

    close(actual, world.expected_gradient(plain, REFERENCE))
    close(-world.expected_gradient(selected(p), REFERENCE), expected / p)
    stale = world.expected_gradient(selected(1), REFERENCE, 1, world.random_logits(5))
    assert world.cosine(-stale, expected) < 0.98


# Through `train`, on a tiny GPT that answers "y" or "no"

COMMON = {
    "updates": 3,
    "prompts": 2,
    "samples": 4,
    "max_new_tokens": 3,
    "lr": 1e-2,
    "warmup": 2,
    "max_grad_norm": 100.0,
    "micro_batch": 5,
}
PLAIN = ppo.PPOConfig(
    **COMMON,
    epochs=1,
    minibatches=1,
    gamma=1.0,
    lam=1.0,
    beta=0.0,
    entropy_coef=0.0,
    kl_stop=None,
)


class Silent(torch.nn.Module):
    """A critic that has nothing to learn and always says 0."""

    def forward(self, inputs, hidden):
        return 0 * hidden[..., 0].detach()


def untouched(advantages, mask):
    return advantages


def rewarded(problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """Distinct for "y", "no" and the rest; the mean of a batch is not 0."""
    return [{"y": 1.4, "no": 0.1}.get(text, 0.6) for text in texts]


def trained(module, config, **options):
    """All weights after three updates, on answers drawn with the same seed.

    In float64: Adam divides by the gradient's size, and so enlarges its rounding.
    """
    policy, generator = base().double(), torch.Generator().manual_seed(1)
    options |= {"generator": generator}
    list(module.train(policy, TOKENIZER, PROBLEMS, rewarded, config, **options))
    return torch.cat([weight.detach().flatten() for weight in policy.parameters()])


@cache
def by_reinforce():
    return trained(reinforce, reinforce.ReinforceConfig(**COMMON))


def by_ppo(config=PLAIN, scale=untouched):
    return trained(ppo, config, critic=Silent(), scale=scale)


def test_training_by_reinforce_does_something():
    far(by_reinforce(), torch.cat([w.flatten() for w in base().parameters()]).double())


def test_ppo_trains_as_reinforce():
    """One epoch, one minibatch, gamma = lambda = 1, beta 0, no whitening, no early
    stop, a critic that says 0: the weights after three updates agree."""
    close(by_ppo(), by_reinforce(), atol=1e-8)


@pytest.mark.parametrize(
    "change, scale",
    [
        ({"epochs": 2}, untouched),
        ({"minibatches": 2}, untouched),
        ({"gamma": 0.5}, untouched),
        ({"lam": 0.5}, untouched),
        ({}, ppo.whiten),
    ],
    ids=["epochs", "minibatches", "gamma", "lam", "whiten"],
)
def test_ppo_with_any_of_its_ideas_is_not_reinforce(change, scale):
    """Each condition dropped."""
    far(by_ppo(replace(PLAIN, **change), scale), by_reinforce(), 1e-3)


def test_remax_trains_as_reinforce_where_the_greedy_answer_counts_for_nothing():
    """The greedy answers draw no random numbers, so the same samples are met."""
    config = remax.RemaxConfig(**COMMON)

    def ignore(rewards, greedy_rewards):
        return rewards

    close(trained(remax, config, compare=ignore), by_reinforce(), atol=1e-8)
    far(trained(remax, config), by_reinforce(), 1e-3)


def test_rloo_trains_as_reinforce_with_its_advantages_taken_away():
    """The advantages are all that is RLOO's own."""
    config = rloo.RlooConfig(**COMMON)
    raw = trained(rloo, config, compare=lambda rewards: rewards)
    close(raw, by_reinforce(), atol=1e-8)
    far(trained(rloo, config), by_reinforce(), 1e-3)


def test_grpo_trains_as_rloo():
    """Through `train`: no std, one step a draw, and weights that give back what the
    group's mean took, K/(K − 1), and divide by the answers only."""
    config = grpo.GRPOConfig(**COMMON, epochs=1, minibatches=1)

    def given_back(mask, max_new_tokens):
        K = config.samples
        return K / (K - 1) * max_new_tokens * grpo.by_constant(mask, max_new_tokens)

    options = {"advantage": grpo.centred_advantages, "reduction": given_back}
    expected = trained(rloo, rloo.RlooConfig(**COMMON))
    close(trained(grpo, config, **options), expected, atol=1e-6)  # float32 rewards
    far(trained(grpo, config), expected, 1e-3)
    twice = replace(config, epochs=2)
    far(trained(grpo, twice, **options), expected, 1e-3)
