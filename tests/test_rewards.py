"""Rewards: the verifier, and what `score` asks of any reward."""

import numpy as np
import pytest
import torch

from minialign.problems import Problem
from minialign.rewards import score, verifier
from tests.properties.evaluation import FOUR, THREE, TOKENIZER
from tests.properties.evaluation import saying as rollout

WORD = Problem("Which is larger, 3 or 9?", "9", "larger", 0, "c")


def test_verifier_is_one_for_right_and_zero_for_all_else():
    texts = ["<<1+2=3>>\n#### 3", "#### 3", "#### 4", "3", "", " 9\n", "#### 9"]
    problems = [THREE] * 5 + [WORD] * 2
    assert verifier(problems, texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("texts", [[], ["#### 3"] * 3])
def test_verifier_refuses_unequal_counts(texts):
    with pytest.raises(ValueError, match=f"2 problems but {len(texts)} texts"):
        verifier([THREE, FOUR], texts)


def test_score_pairs_each_problem_with_its_own_samples():
    said = ["#### 3", "#### 4", "#### 3", "#### 4"]
    rewards = score(verifier, [THREE, FOUR], rollout(said, samples=2), TOKENIZER)
    assert rewards.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert rewards.shape == (4,) and rewards.dtype == torch.float32


def test_the_reward_is_asked_once_with_texts_up_to_eos():
    calls = []

    def spy(problems, texts):
        calls.append((list(problems), list(texts)))
        return [0.25, 0.5, -1.0, 2.0]

    said = ["#### 3", "", "#### 4", "a"]
    rewards = score(spy, [THREE, FOUR], rollout(said, samples=2), TOKENIZER)
    assert calls == [([THREE, THREE, FOUR, FOUR], said)]
    assert rewards.tolist() == [0.25, 0.5, -1.0, 2.0]


def test_an_answer_that_did_not_end_earns_nothing():
    said = ["#### 3", "#### 3", "#### 3"]
    rewards = score(verifier, [THREE] * 3, rollout(said, cut=[1]), TOKENIZER)
    assert rewards.tolist() == [1.0, 0.0, 1.0]
    # Neither does it lose anything, where rewards can be negative.
    rewards = score(
        lambda problems, texts: [-5.0] * 3,
        [THREE] * 3,
        rollout(said, cut=[1]),
        TOKENIZER,
    )
    assert rewards.tolist() == [-5.0, 0.0, -5.0]


@pytest.mark.parametrize(
    "given",
    [
        [1, 0],
        [True, False],
        (1.0, 0.0),
        np.array([1.0, 0.0]),
        torch.tensor([1.0, 0.0], requires_grad=True),
        [torch.tensor(1.0), torch.tensor(0.0)],
    ],
)
def test_any_sequence_of_numbers_is_a_reward(given):
    problems = [THREE, FOUR]
    rewards = score(lambda *_: given, problems, rollout(["", ""]), TOKENIZER)
    assert rewards.tolist() == [1.0, 0.0]
    assert rewards.dtype == torch.float32 and not rewards.requires_grad


@pytest.mark.parametrize(
    "given", [[1.0], [1.0] * 3, [], torch.zeros(2, 1), torch.zeros(1, 2), 1.0]
)
def test_another_count_is_refused(given):
    with pytest.raises(ValueError, match="one number per answer"):
        score(lambda *_: given, [THREE, FOUR], rollout(["", ""]), TOKENIZER)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_rewards_that_are_not_finite_are_refused_with_the_answer(bad):
    with pytest.raises(ValueError, match="answer 1 is .*not finite: '#### 4'"):
        score(
            lambda *_: [0.0, bad],
            [THREE, FOUR],
            rollout(["#### 3", "#### 4"]),
            TOKENIZER,
        )


@pytest.mark.parametrize(
    "given", [None, ["1", "0"], [None, 1.0], {"a": 1.0}, (x for x in (1.0, 0.0))]
)
def test_what_is_not_numbers_is_refused(given):
    with pytest.raises(TypeError, match="must give a sequence of numbers"):
        score(lambda *_: given, [THREE, FOUR], rollout(["", ""]), TOKENIZER)


@pytest.mark.parametrize("problems", [[], [THREE], [THREE] * 4])
def test_problems_and_rollout_must_agree(problems):
    with pytest.raises(ValueError, match="x 2 samples but the rollout has 4"):
        score(verifier, problems, rollout([""] * 4, samples=2), TOKENIZER)
