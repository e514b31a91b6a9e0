"""What judging owes: properties of rewards and of the numbers made of them."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from minialign.model import GPT, GPTConfig
from minialign.problems import Problem
from minialign.rewards import verifier
from minialign.sampling import Rollout
from minialign.tokenizer import Tokenizer, train_bpe
from tests.properties.common import forall

# Answers that say something


TOKENIZER = Tokenizer(train_bpe(["<<1+2=3>>\n#### 3"], 264))


THREE = Problem("What is 1 + 2?", Fraction(3), "sum", 1, "a")


FOUR = Problem("What is 2 + 2?", Fraction(4), "sum", 1, "b")


def saying(texts, samples=1, cut=()):
    """A rollout whose row b says texts[b]; the rows in `cut` never end."""
    prompt = [TOKENIZER.bos_id, TOKENIZER.answer_id]
    said = [
        TOKENIZER.encode(text) + ([] if b in cut else [TOKENIZER.eos_id])
        for b, text in enumerate(texts)
    ]
    T = len(prompt) + max(map(len, said))
    tokens = torch.full((len(texts), T), TOKENIZER.pad_id)
    mask = torch.zeros(len(texts), T - 1, dtype=torch.bool)
    for b, ids in enumerate(said):
        end = len(prompt) + len(ids)
        tokens[b, :end] = torch.tensor(prompt + ids)
        mask[b, len(prompt) - 1 : end - 1] = True
    return Rollout(
        tokens=tokens,
        mask=mask,
        logprobs=torch.zeros(mask.shape),
        prompt_lengths=torch.full((len(texts),), len(prompt)),
        truncated=torch.tensor([b in cut for b in range(len(texts))]),
        temperature=1.0,
        samples=samples,
    )


# Tables of answers, and all answers that a small model can give

TABLES = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.booleans(), min_size=n, max_size=n), min_size=2, max_size=4
    )
)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


SCORES = st.integers(1, 6).flatmap(
    lambda K: st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 0.1, 2.0]), st.floats(-5, 5)),
        min_size=K,
        max_size=K,
    )
)

END, PAD, STEPS = 2, 0, 3


TINY = {"context": 8, "dim": 8, "layers": 1, "heads": 2, "kv_heads": 2, "hidden": 16}


def tiny(seed, vocab_size=4):
    config = GPTConfig(vocab_size=vocab_size, **TINY)
    return GPT(config, torch.Generator().manual_seed(seed)).double()


def check_credit_is_for_numbers_alone(credit) -> None:
    """A wrong number earns a tenth; no number, or two, after #### earn nothing."""
    texts = ["#### 3", "<<1+3=4>>\n#### 4", "3", "", "<<1+2=3>>", "#### 3 or 4"]
    asked = [THREE] * len(texts)
    assert credit(asked, texts) == [1.0, 0.1, 0.0, 0.0, 0.0, 0.0]
    assert credit(asked, texts, wrong=0.0) == verifier(asked, texts)


def rollout_of(rows, truncated, samples, temperature=1.0):
    """A rollout with these (prompt, response) ids in its rows."""
    T = max(len(prompt) + len(ids) for prompt, ids in rows)
    tokens = torch.full((len(rows), T), PAD)
    mask = torch.zeros(len(rows), T - 1, dtype=torch.bool)
    for b, (prompt, ids) in enumerate(rows):
        end = len(prompt) + len(ids)
        tokens[b, :end] = torch.tensor([*prompt, *ids])
        mask[b, len(prompt) - 1 : end - 1] = True
    return Rollout(
        tokens=tokens,
        mask=mask,
        logprobs=torch.zeros(mask.shape),
        prompt_lengths=torch.tensor([len(prompt) for prompt, _ in rows]),
        truncated=torch.tensor(truncated),
        temperature=temperature,
        samples=samples,
    )


def every_answer(prompts, temperature):
    """A rollout of all answers to each prompt, and the ids of its rows."""
    answers = [
        (*body, last)
        for length in range(STEPS)
        for body in itertools.product((0, 1, 3), repeat=length)
        for last in (range(4) if length == STEPS - 1 else (END,))
    ]
    rows = [(prompt, answer) for prompt in prompts for answer in answers]
    truncated = [answer[-1] != END for _, answer in rows]
    return rollout_of(rows, truncated, len(answers), temperature), rows


def answer_logprob(model, prompt, answer, temperature):
    with torch.no_grad():
        hidden = model(torch.tensor([[*prompt, *answer]]))
        logprobs = torch.log_softmax(model.logits(hidden)[0] / temperature, dim=-1)
    return sum(
        logprobs[len(prompt) + t - 1, token].item() for t, token in enumerate(answer)
    )


# Properties


def check_samples_meet_their_problem(score) -> None:
    """Answer b is to problem b // K."""
    said = ["#### 3", "#### 4", "#### 3", "#### 4"]
    rollout = saying(said, samples=2)
    rewards = score(verifier, [THREE, FOUR], rollout, TOKENIZER)
    assert rewards.tolist() == [1.0, 0.0, 0.0, 1.0]


def check_cut_answers_earn_nothing(score) -> None:
    """An answer that did not end earns 0, whatever stands in it or would be lost."""
    rollout = saying(["#### 3"] * 3, cut=[1])
    call = [THREE] * 3, rollout, TOKENIZER
    assert score(verifier, *call).tolist() == [1.0, 0.0, 1.0]
    assert score(lambda *_: [5.0] * 3, *call, -2.0).tolist() == [5.0, -2.0, 5.0]


def check_pass_is_the_average_over_subsets(pass_at_k) -> None:
    """The share of all k-subsets of the answers that hold a right one."""

    @forall(st.tuples(TABLES, st.integers(1, 6)), examples=20)
    def holds(drawn):
        table, k = drawn
        k = min(k, len(table[0]))
        subsets = [list(itertools.combinations(row, k)) for row in table]
        expected = [sum(map(any, each)) / len(each) for each in subsets]
        np.testing.assert_allclose(pass_at_k(np.array(table), k), expected, atol=1e-12)

    holds()


def check_best_is_the_average_over_subsets(best_of_n) -> None:
    """Of each n-subset the value of the best score; equals share evenly."""

    @forall(st.tuples(SCORES, st.integers(1, 6)), examples=30)
    def holds(drawn):
        pairs, n = drawn
        n = min(n, len(pairs))

        def winners(subset):
            best = max(score for score, _ in subset)
            return mean(value for score, value in subset if score == best)

        expected = mean(map(winners, itertools.combinations(pairs, n)))
        scores, values = np.array(pairs).T
        actual = best_of_n([scores], [values], n)[0]
        assert actual == pytest.approx(expected, abs=1e-10)

    holds()


def check_expected_kl(measured_kl) -> None:
    """Over all answers of two prompts, the expectation is the KL of whole answers."""
    policy, reference = tiny(0), tiny(1)
    for temperature in (1.0, 0.6):
        rollout, rows = every_answer([[1, 3], [3, 1, 1, 0]], temperature)
        nats, others = (
            np.array([answer_logprob(each, *row, temperature) for row in rows])
            for each in (policy, reference)
        )
        chance = np.exp(nats)
        truth = (chance * (nats - others)).reshape(2, -1).sum(1)
        measured = measured_kl(policy, reference, rollout).numpy()
        expected = (chance * measured).reshape(2, -1).sum(1)
        np.testing.assert_allclose(expected, truth, atol=1e-10)
