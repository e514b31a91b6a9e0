"""Rewards: the verifier, and what `score` asks of any reward."""

import warnings

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
        return [0.25, 0.5, 0.0, 2.0]

    said = ["#### 3", "", "#### 4", "a"]
    rewards = score(spy, [THREE, FOUR], rollout(said, samples=2), TOKENIZER)
    assert calls == [([THREE, THREE, FOUR, FOUR], said)]
    assert rewards.tolist() == [0.25, 0.5, 0.0, 2.0]


def test_an_answer_that_did_not_end_earns_nothing():
    said = ["#### 3", "#### 3", "#### 3"]
    rewards = score(verifier, [THREE] * 3, rollout(said, cut=[1]), TOKENIZER)
    assert rewards.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.filterwarnings("ignore:.*not to end pays")
@pytest.mark.parametrize("worth", [-2.0, 0.0, 0.5])
def test_what_did_not_end_earns_what_it_is_told_to(worth):
    said = ["#### 3", "#### 3", "#### 4"]
    held = rollout(said, cut=[1])
    problems = [THREE] * 3
    rewards = score(verifier, problems, held, TOKENIZER, truncated_reward=worth)
    assert rewards.tolist() == [1.0, worth, 0.0]


@pytest.mark.parametrize("worth", [float("nan"), float("inf"), -float("inf")])
def test_what_did_not_end_earns_a_finite_number(worth):
    with pytest.raises(ValueError, match=r"truncated_reward"):
        score(verifier, [THREE], rollout(["#### 3"]), TOKENIZER, worth)


def test_that_not_ending_pays_is_said_once_with_the_count():
    """Three answers that ended earned less than the one that did not."""

    def harsh(problems, texts):
        return [-1.0, -0.5, -2.0, 1.0, -3.0]

    held = rollout(["a", "b", "c", "d", "e"], cut=[4])
    problems = [THREE] * 5
    with pytest.warns(RuntimeWarning, match=r"harsh.*3 of 4 answers.*truncated_reward"):
        score(harsh, problems, held, TOKENIZER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(harsh, problems, held, TOKENIZER)  # it has been said
        score(verifier, problems, held, TOKENIZER)  # nothing is below 0
    with pytest.warns(RuntimeWarning, match="2 of 4 answers"):
        score(harsh, problems, held, TOKENIZER, truncated_reward=-0.9)


def test_every_reward_is_warned_of():
    """Two that have one name are two."""
    rewards = [lambda problems, texts, worth=worth: [worth] for worth in (-1.0, -2.0)]
    for reward in rewards:
        with pytest.warns(RuntimeWarning, match="1 of 1 answers"):
            score(reward, [THREE], rollout(["a"]), TOKENIZER)


def test_nothing_is_said_where_not_ending_does_not_pay():
    """Equal rewards, and answers that did not end themselves, are no reason."""

    def mild(problems, texts):
        return [-1.0, -0.5, -9.0]

    held = rollout(["a", "b", "c"], cut=[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(mild, [THREE] * 3, held, TOKENIZER, truncated_reward=-1.0)


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
