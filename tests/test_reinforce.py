"""REINFORCE: what shortens its expected gradient, what turns it, and training."""

import copy
from dataclasses import replace

import pytest

from minialign.algorithms.reinforce import (
    batch_mean,
    moving_average,
    reinforce_loss,
)
from tests import enumeration as world
from tests.methods import METHODS
from tests.properties import training
from tests.properties.common import close
from tests.properties.policy_gradients import LOGITS, REWARDS, ascent
from tests.toy import (
    base,
    judged,
    row_nats,
    stretched,
    yes,
)

# Part 1: the expected gradient, over 15 responses (tests/enumeration.py)

GRADIENT = world.true_gradient(LOGITS, REWARDS)  # (7, 3), of E[r]


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_the_batch_mean_shortens_the_gradient(samples):
    """By (B - 1)/B exactly, and in no other direction: one answer is its own
    mean, and teaches nothing."""

    def loss(rows, logprobs, mask):
        rewards = REWARDS[rows]
        return reinforce_loss(logprobs, rewards - batch_mean(rewards, 0.0), mask)

    close(ascent(loss, samples), (samples - 1) / samples * GRADIENT)


def test_a_constant_divisor_shortens_it_too():
    def loss(rows, logprobs, mask):
        return reinforce_loss(logprobs, REWARDS[rows], mask, count=4)

    close(ascent(loss), GRADIENT / 4)


def test_a_baseline_that_looks_at_the_answer_turns_it():
    """It looks at the length."""

    def loss(rows, logprobs, mask):
        return reinforce_loss(logprobs, REWARDS[rows] - mask.sum(1), mask)

    assert world.cosine(ascent(loss), GRADIENT) < 0.9


def test_dividing_by_the_length_turns_it():
    """A negative control. And a constant baseline is no longer free."""

    def divided(baseline):
        def loss(rows, logprobs, mask):
            advantages = (REWARDS[rows] - baseline) / mask.sum(1)
            return reinforce_loss(logprobs, advantages, mask)

        return ascent(loss)

    assert world.cosine(divided(0.0), GRADIENT) < 0.98
    assert (divided(0.0) - divided(1.0)).abs().max() > 0.05


# Training, in a world where the answers are "y" and "no"

METHOD = METHODS["reinforce"]
CONFIG = METHOD.config
run = METHOD.run


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, row by row, against code of its own."""
    drawn = training.spied_draws(monkeypatch)
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


def test_the_moving_average_is_of_what_is_paid_and_may_be_0():
    """Of shaped rewards; a first batch that earned nothing is remembered as any is."""
    calls = []

    def first_never(problems, texts):
        calls.append(len(texts))
        return [float(text == "y" and len(calls) > 1) for text in texts]

    more = {"reference": stretched(), "beta": 0.5, "updates": 3}
    for reward, changes in ((first_never, {"updates": 3}), (None, more)):
        state, seen = {}, []

        def watch(rewards, memory, seen=seen):
            seen.append(rewards.mean().item())
            return moving_average(rewards, memory)

        steps = run(base(), None, reward or yes, baseline=watch, state=state, **changes)
        memory = None
        for _ in steps:
            memory = seen[-1] if memory is None else 0.8 * memory + 0.2 * seen[-1]
            assert state["memory"] == pytest.approx(memory, abs=1e-6)
