"""RLOO: what leave-one-out is beside unbiased, and training."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from minialign.algorithms.rloo import leave_one_out, rloo_loss
from tests import enumeration as world
from tests.methods import METHODS
from tests.mutants import (
    leave_one_out_of_nothing,
    leave_one_out_of_the_best,
    leave_one_out_over_k,
)
from tests.mutants import leave_one_out_one_too_far as neighbours
from tests.properties import training
from tests.properties.common import close
from tests.properties.policy_gradients import LOGITS, REWARDS, ascent, ascent_of_groups
from tests.toy import (
    PROBLEMS,
    base,
    base_weights,
    judged,
    never,
    new_gpt,
    row_nats,
    stretched,
)

# Part 1: the expected gradient, over all K-tuples of 15 responses

GRADIENT = world.true_gradient(LOGITS, REWARDS)  # (7, 3), of E[r]


def test_the_loss_of_groups_is_what_the_properties_enumerate():
    """They weigh all tuples in one call; here the loss is called on each pair alone."""

    def loss(rows, logprobs, mask):
        return rloo_loss(logprobs, leave_one_out(REWARDS[rows][None])[0], mask)

    close(ascent(loss, samples=2), GRADIENT)
    close(ascent_of_groups(leave_one_out, 2), GRADIENT)


@pytest.mark.parametrize(
    "other",
    [leave_one_out_of_nothing, leave_one_out_over_k, leave_one_out_of_the_best],
)
def test_being_unbiased_does_not_make_it_leave_one_out(other):
    """Whatever the others earned, it is a baseline that costs nothing."""
    close(ascent_of_groups(other, 3), GRADIENT)


def best_of_the_group(rewards):
    """A baseline that looks at the answer itself."""
    return rewards - rewards.amax(1, keepdim=True)


def test_a_baseline_that_looks_at_the_answer_is_biased():
    """The negative control. With rewards of 0 and 1 it still ascends, but each
    problem by 1 - (chance of wrong)^(K - 1) of its gradient."""
    actual = ascent_of_groups(best_of_the_group, 3)
    assert (actual - GRADIENT).abs().max() > 0.05
    assert world.cosine(actual, GRADIENT) < 0.995
    right = (REWARDS > 0).double()
    chance = world.probabilities(LOGITS) @ right
    expected = (1 - (1 - chance) ** 2) * world.true_gradient(LOGITS, right)
    close(ascent_of_groups(best_of_the_group, 3, right), expected)


@pytest.mark.parametrize("K", [2, 3])
def test_a_neighbours_advantage_turns_the_gradient_round(K):
    """A shift by one row: what y_i is paid contains -r_i / (K - 1), and nothing else of
    it."""
    close(ascent_of_groups(neighbours, K), -GRADIENT / (K - 1))


@pytest.mark.parametrize("K", [2, 5])
def test_a_group_is_a_sample_covariance(K):
    """(1/K) Σ A g = Σ (r - mean r)(g - mean g) / (K - 1), for any numbers g."""
    rewards, g = world.random_logits(K).flatten()[: 2 * K].view(2, K)
    actual = (leave_one_out(rewards[None])[0] * g).mean()
    close(actual, torch.cov(torch.stack((rewards, g)))[0, 1])


# Training, in a world where the answers are "y" and "no"

METHOD = METHODS["rloo"]
CONFIG = METHOD.config
run = METHOD.run


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, row by row, against code of its own."""
    drawn = training.spied_draws(monkeypatch)
    config = replace(CONFIG, beta=0.5, temperature=temperature)
    policy, reference = stretched(), base()
    twin = copy.deepcopy(policy)
    metrics = next(run(policy, config, reference=reference))

    ((_, rollout),) = drawn
    rewards = judged(rollout)  # (12,)
    nats = row_nats(twin, rollout, temperature)  # (12,)
    k1 = (nats - row_nats(reference, rollout, temperature)).detach()
    shaped = rewards - 0.5 * k1
    groups = shaped.tolist()[:6], shaped.tolist()[6:]  # one after the other
    advantages = torch.tensor([r - (sum(g) - r) / 5 for g in groups for r in g])
    loss = -(advantages * nats).mean()
    expected = {
        "completions": 12,
        "dead": sum(len(set(g)) == 1 for g in rewards.view(2, 6).tolist()) / 2,
        "advantage_std": advantages.square().mean().sqrt().item(),  # their mean is 0
        "loss": loss.item(),
        "grad_norm": training.gradient_norm(loss, twin),
        "kl": k1.mean().item(),
    }
    training.assert_metrics(metrics, rollout, expected)


def test_dead_groups_are_counted_and_teach_nothing(monkeypatch):
    """Right and wrong by problem, not by answer: whole groups tie, and only those."""

    def by_problem(problems, texts):
        right = [problem.question in "ac" for problem in problems]
        right[problems.index(PROBLEMS[4])] = True
        return [float(one) for one in right]

    config = replace(CONFIG, prompts=5, samples=4, updates=1, max_new_tokens=4)
    (metrics,) = run(base(), config, by_problem)
    assert metrics["dead"] == pytest.approx(4 / 5)
    # Of e: one 1 among four; A is 1 and three times -1/3, over 20 answers.
    assert metrics["advantage_std"] == pytest.approx(math.sqrt((1 + 3 / 9) / 20))

    policy = base()
    state = {}
    (metrics,) = run(policy, config, never, reference=base(), state=state)
    assert metrics["dead"] == 1 and metrics["advantage_std"] == 0
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0
    training.assert_same_bits(dict(state["policy"]), dict(base_weights()))
    # With a price on KL answers differ all the same; dead still means the reward.
    config = replace(config, beta=0.5)
    policy = new_gpt(3)
    (metrics,) = run(policy, config, never, reference=base())
    assert metrics["dead"] == 1 and metrics["advantage_std"] > 0
