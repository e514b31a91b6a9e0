"""The room of lesson 80, beside the enumeration that the tests have of their own."""

import pytest
import torch

from minialign import exact_world as world
from tests import enumeration as own

SEEDS = range(3)


def policies(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return world.random_policy(draw), world.random_policy(draw)


def test_there_are_fifteen_answers_and_three_of_them_are_right():
    assert len(world.ANSWERS) == len(set(world.ANSWERS)) == 15
    right = [a for a, r in zip(world.ANSWERS, world.RIGHT, strict=True) if r]
    assert right == ["b.", "ab.", "ba."]
    ended = [a for a, e in zip(world.ANSWERS, world.ENDED, strict=True) if e]
    assert ended == [answer for answer in world.ANSWERS if "." in answer]
    assert world.LENGTHS.tolist() == [len(answer) for answer in world.ANSWERS]


@pytest.mark.parametrize("seed", SEEDS)
def test_chances_are_products_along_an_answer(seed):
    policy, _ = policies(seed)
    table = policy.softmax(1)
    by_hand = []
    for answer in world.ANSWERS:
        chance = 1.0
        for place, token in enumerate(answer):
            row = world.BEGINNINGS.index(answer[:place])
            chance *= table[row, "ab.".index(token)].item()
        by_hand.append(chance)
    assert world.chances(policy).tolist() == pytest.approx(by_hand, abs=1e-12)
    assert sum(by_hand) == pytest.approx(1, abs=1e-12)


def test_masked_slots_hold_nothing():
    policy, _ = policies(0)
    assert not world.token_logprobs(policy)[~world.MASK].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_is_zero_only_at_home_and_never_below(seed):
    policy, other = policies(seed)
    assert world.kl(policy, policy).item() == pytest.approx(0, abs=1e-12)
    p, q = world.chances(policy), world.chances(other)
    by_hand = (p * (p / q).log()).sum().item()
    assert world.kl(policy, other).item() == pytest.approx(by_hand) and by_hand > 0


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_beats_the_best_policy(seed, beta):
    reference, other = policies(seed)
    best = world.best_policy(reference, world.RIGHT, beta)
    tilted = world.chances(reference) * (world.RIGHT / beta).exp()
    assert torch.allclose(world.chances(best), tilted / tilted.sum(), atol=1e-12)

    def worth(policy):
        gain = world.chances(policy) @ world.RIGHT
        return gain - beta * world.kl(policy, reference)

    value = world.best_value(reference, world.RIGHT, beta)
    assert worth(best).item() == pytest.approx(value, abs=1e-12)
    assert world.gradient(worth, best).abs().max() < 1e-12
    for near in (other, best + 0.01 * other, reference):
        assert worth(near).item() < value


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_expected_gradient_is_that_of_the_enumeration(seed, size):
    """The mean of r x −log π over groups: of whatever size, −∇ E[r]."""
    policy, _ = policies(seed)
    every = torch.arange(15)
    groups = torch.cartesian_prod(*[every] * size).view(-1, size)
    chance = world.chances(policy)[groups].prod(1)

    def loss(logprobs):  # (N K, 3)
        weighed = world.RIGHT[groups.flatten()] * logprobs.sum(1)
        return -weighed.view(-1, size).mean(1).mean()

    found = world.expected_gradient(loss, policy, chance, groups)
    goal = world.gradient(lambda x: world.chances(x) @ world.RIGHT, policy)
    assert torch.allclose(-found, goal, atol=1e-12)


def test_the_two_worlds_are_one():
    """Prefix by prefix: this room counts a, b, `.` and so do the tests."""
    policy, _ = policies(0)
    here = dict(zip(world.ANSWERS, world.chances(policy).tolist(), strict=True))
    names = {0: "a", 1: "b", 2: "."}
    prefixes = ["".join(names[t] for t in prefix) for prefix in own.PREFIXES]
    rows = [world.BEGINNINGS.index(prefix) for prefix in prefixes]
    there = own.probabilities(policy[rows]).tolist()
    for response, chance in zip(own.RESPONSES, there, strict=True):
        answer = "".join(names[token] for token in response)
        assert here[answer] == pytest.approx(chance, abs=1e-12)
