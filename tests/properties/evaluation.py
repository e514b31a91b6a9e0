"""What judging owes: properties of rewards and of the numbers made of them."""

import itertools

import numpy as np
import pytest
from hypothesis import strategies as st

from minialign.rewards import verifier
from tests import test_evaluation as judged
from tests import test_rewards as paid
from tests.properties.common import forall


def check_samples_meet_their_problem(score) -> None:
    """Answer b is to problem b // K."""
    said = ["#### 3", "#### 4", "#### 3", "#### 4"]
    rollout = paid.rollout(said, samples=2)
    rewards = score(verifier, [paid.THREE, paid.FOUR], rollout, paid.TOKENIZER)
    assert rewards.tolist() == [1.0, 0.0, 0.0, 1.0]


def check_cut_answers_earn_nothing(score) -> None:
    """An answer that did not end earns 0, whatever stands in it or would be lost."""
    rollout = paid.rollout(["#### 3"] * 3, cut=[1])
    call = [paid.THREE] * 3, rollout, paid.TOKENIZER
    assert score(verifier, *call).tolist() == [1.0, 0.0, 1.0]
    assert score(lambda *_: [-5.0] * 3, *call).tolist() == [-5.0, 0.0, -5.0]


def check_pass_is_the_average_over_subsets(pass_at_k) -> None:
    """The share of all k-subsets of the answers that hold a right one."""

    @forall(st.tuples(judged.TABLES, st.integers(1, 6)), examples=20)
    def holds(drawn):
        table, k = drawn
        k = min(k, len(table[0]))
        subsets = [list(itertools.combinations(row, k)) for row in table]
        expected = [sum(map(any, each)) / len(each) for each in subsets]
        np.testing.assert_allclose(pass_at_k(np.array(table), k), expected, atol=1e-12)

    holds()


def check_best_is_the_average_over_subsets(best_of_n) -> None:
    """Of each n-subset the value of the best score; equals share evenly."""

    @forall(st.tuples(judged.SCORES, st.integers(1, 6)), examples=30)
    def holds(drawn):
        pairs, n = drawn
        n = min(n, len(pairs))

        def winners(subset):
            best = max(score for score, _ in subset)
            return judged.mean(value for score, value in subset if score == best)

        expected = judged.mean(map(winners, itertools.combinations(pairs, n)))
        scores, values = np.array(pairs).T
        actual = best_of_n([scores], [values], n)[0]
        assert actual == pytest.approx(expected, abs=1e-10)

    holds()


def check_expected_kl(measured_kl) -> None:
    """Over all answers of two prompts, the expectation is the KL of whole answers."""
    policy, reference = judged.tiny(0), judged.tiny(1)
    for temperature in (1.0, 0.6):
        rollout, rows = judged.every_answer([[1, 3], [3, 1, 1, 0]], temperature)
        nats, others = (
            np.array([judged.answer_logprob(each, *row, temperature) for row in rows])
            for each in (policy, reference)
        )
        chance = np.exp(nats)
        truth = (chance * (nats - others)).reshape(2, -1).sum(1)
        measured = measured_kl(policy, reference, rollout).numpy()
        expected = (chance * measured).reshape(2, -1).sum(1)
        np.testing.assert_allclose(expected, truth, atol=1e-10)
