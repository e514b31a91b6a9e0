"""Simulated people, and a model that has learnt from such: rewards with a mind."""

import itertools
import math
import warnings
from collections import Counter
from fractions import Fraction

import pytest
import torch

from minialign.algorithms import rloo
from minialign.problems import Problem
from minialign.rewards import (
    MANY,
    Counted,
    LearnedReward,
    RewardModel,
    agreement,
    careful,
    lazy,
    rank,
    score,
    verifier,
)
from minialign.sampling import collate
from tests.properties.evaluation import THREE
from tests.properties.evaluation import TOKENIZER as LETTERS
from tests.properties.evaluation import saying as rollout
from tests.toy import PROBLEMS, TOKENIZER, always, base, generator, new_gpt

TWO_STEPS = Problem("What is 2 * 3 + 4?", Fraction(10), "sum", 2, "c")
WORKED = "<<2*3=6>>\n<<6+4=10>>\n#### 10"
LONGER = WORKED.replace("<<6+4=10>>", "<<6+4=10>>\n<<10*1=10>>\n<<10+0=10>>")
SHOWY = "Happy to help!\n" + WORKED.replace("\n####", "\nCheck: <<10-4=6>>\n####")
TEXTS = [
    WORKED,
    LONGER,
    "#### 10",
    SHOWY,
    WORKED.replace("10", "11"),
    "<<2*3=6>>\n#### 6",
    "#### 9",
    "",
]


# What people like


def test_a_careful_person_likes_right_then_worked_then_short():
    likings = careful([TWO_STEPS] * len(TEXTS), TEXTS)
    by_hand = [
        2 + 0.5,
        2 + 0.5 - 0.35,
        2.0,
        2 - 0.35,
        0.5,
        0.0,
        0.0,
        0.0,
    ]
    assert likings == pytest.approx(by_hand)
    endless = WORKED.replace("#", " " * 900 + "#", 1)  # worked, right, and far too long
    worst_right, best_wrong = careful([TWO_STEPS] * 2, [endless, TEXTS[4]])
    assert worst_right > best_wrong


def test_a_lazy_person_likes_words_and_length_and_checks_nothing():
    likings = lazy([TWO_STEPS] * len(TEXTS), TEXTS)
    by_hand = [
        1.0,
        1.25,
        0.0,
        2.25,
        1.0,
        1.0,
        0.0,
        0.0,
    ]
    assert likings == pytest.approx(by_hand)
    assert lazy([THREE] * len(TEXTS), TEXTS) == likings
    assert lazy([TWO_STEPS], ["a" * 999]) == [2.0]


@pytest.mark.parametrize("person", [careful, lazy])
def test_people_refuse_unequal_counts(person):
    with pytest.raises(ValueError, match=f"{person.__name__}: 1 problems but 2 texts"):
        person([THREE], ["a", "b"])


# What people say

LIKED = torch.tensor([[0.0, 1.0, 2.5]]).double()
MANY_TIMES = 40_000


def said(sharpness, seed=0):
    """How often each order is said."""
    likings = LIKED.expand(MANY_TIMES, 3)
    orders = rank(likings, sharpness, torch.Generator().manual_seed(seed))
    counts = Counter(map(tuple, orders.tolist()))
    return {order: counts[order] / MANY_TIMES for order in all_orders()}


def all_orders():
    return list(itertools.permutations(range(3)))


@pytest.mark.parametrize("sharpness", [0.0, 0.7, 2.0])
def test_orders_are_said_as_plackett_and_luce_have_it(sharpness):
    """The best of those left is named first, with a chance that is its share of all."""
    shares = said(sharpness)
    weights = [math.exp(sharpness * liking) for liking in LIKED[0].tolist()]
    for order, share in shares.items():
        chance = 1.0
        left = sum(weights)
        for answer in order:
            chance *= weights[answer] / left
            left -= weights[answer]
        assert share == pytest.approx(chance, abs=4 * (0.25 / MANY_TIMES) ** 0.5)


@pytest.mark.parametrize("sharpness", [0.5, 1.5])
def test_pairs_are_ordered_as_bradley_and_terry_have_it(sharpness):
    shares = said(sharpness)
    for better, worse in ((2, 0), (2, 1), (1, 0)):
        found = sum(
            share for o, share in shares.items() if o.index(better) < o.index(worse)
        )
        gap = (LIKED[0, better] - LIKED[0, worse]).item()
        chance = 1 / (1 + math.exp(-sharpness * gap))
        assert found == pytest.approx(chance, abs=4 * (0.25 / MANY_TIMES) ** 0.5)


def test_without_noise_the_order_is_that_of_the_likings_and_ties_are_drawn():
    likings = torch.tensor([[0.3, 0.3, -1.0, 5.0]]).expand(200, 4)
    orders = rank(likings, math.inf, generator()).tolist()
    assert {order[0] for order in orders} == {3}
    assert {order[3] for order in orders} == {2}
    assert {tuple(order[1:3]) for order in orders} == {(0, 1), (1, 0)}


def test_agreement_by_hand():
    """Gaps of 1, 1.5 and 2.5, and none between equals."""
    likings = torch.cat((LIKED, torch.ones(1, 3).double()))
    chances = [1 / (1 + math.exp(-0.8 * gap)) for gap in (1.0, 1.5, 2.5)]
    both = sum(p * p + (1 - p) * (1 - p) for p in chances) / 3
    assert agreement(likings, 0.8) == pytest.approx((both, sum(chances) / 3))
    assert agreement(likings, math.inf) == (1.0, 1.0)
    assert agreement(likings, 0.0) == (0.5, 0.5)


def test_two_people_agree_as_often_as_is_said():
    likings = torch.tensor([[0.0, 1.2]]).expand(MANY_TIMES, 2)
    first = rank(likings, 1.0, torch.Generator().manual_seed(1))
    second = rank(likings, 1.0, torch.Generator().manual_seed(2))
    found = (first == second).all(1).double().mean().item()
    assert found == pytest.approx(agreement(likings, 1.0)[0], abs=0.01)


def test_a_sharpness_beyond_float32_is_one_without_noise():
    likings = torch.tensor([[0.0, 1.0]])
    assert rank(likings, 1e39, generator()).tolist() == [[1, 0]]


@pytest.mark.parametrize("sharpness", [-0.1, math.nan])
def test_a_sharpness_is_not_below_zero(sharpness):
    with pytest.raises(ValueError, match="sharpness"):
        rank(LIKED, sharpness, generator())
    with pytest.raises(ValueError, match="sharpness"):
        agreement(LIKED, sharpness)


def test_nobody_agrees_on_equals():
    with pytest.raises(ValueError, match="liked alike"):
        agreement(torch.ones(2, 3), 1.0)


# A learned reward


def reward_model(seed=1):
    """A model whose head says something."""
    model = RewardModel(new_gpt(seed))
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(seed))
        model.head.bias.fill_(0.3)
    return model


def by_hand(model, question, text):
    """The head at EOS, of one answer alone."""
    ids = [*TOKENIZER.encode_prompt(question), *TOKENIZER.encode_response(text)]
    assert ids[-1] == TOKENIZER.eos_id
    hidden = model.body(torch.tensor([ids]))[0, -1]
    return (hidden @ model.head.weight + model.head.bias).item()


def test_the_number_is_read_at_eos_and_not_in_the_padding():
    model = reward_model()
    texts = ["y", "no", "maybe", ""]
    examples = []
    for text in texts:
        prompt = TOKENIZER.encode_prompt("a")
        examples.append((prompt, TOKENIZER.encode_response(text)))
    tokens, mask = collate(examples, TOKENIZER.pad_id)
    with torch.no_grad():
        numbers = model(tokens, mask)
        expected = [by_hand(model, "a", text) for text in texts]
        assert numbers.tolist() == pytest.approx(expected, abs=1e-5)
        assert len({round(number, 3) for number in expected}) == 4
        other = tokens.masked_fill(tokens == TOKENIZER.pad_id, 65)
        assert torch.equal(model(other, mask), numbers)


def test_a_new_model_says_zero_and_leaves_the_policy_alone():
    policy = base()
    model = RewardModel(policy)
    tokens, mask = collate([([1, 2], [3, 4])], TOKENIZER.pad_id)
    number = model(tokens, mask)
    assert number.tolist() == [0.0]
    with torch.no_grad():
        model.body.embed_tokens.weight.zero_()
    assert policy.embed_tokens.weight.abs().sum() > 0
    frozen = RewardModel(base().requires_grad_(False))
    still = [name for name, x in frozen.named_parameters() if not x.requires_grad]
    assert still == ["head.bias"]


def test_tokens_and_mask_must_agree():
    tokens, mask = collate([([1, 2], [3, 4])] * 3, TOKENIZER.pad_id)
    for other in (tokens[:1], tokens[:, :-1], torch.cat((tokens, tokens), 1)):
        with pytest.raises(ValueError, match="mask"):
            reward_model()(other, mask)


def test_an_answer_without_a_token_is_refused():
    tokens, mask = collate([([1, 2], [3, 4])] * 2, TOKENIZER.pad_id)
    mask[1] = False
    with pytest.raises(ValueError, match="answer 1 has no token"):
        reward_model()(tokens, mask)


def test_zero_and_unit_are_those_of_held_out_answers():
    model = reward_model()
    reward = LearnedReward(model, TOKENIZER, micro_batch=2)
    texts = ["y", "no", "ye", "nn", "o"]
    scores = reward.scores(PROBLEMS, texts)
    model.fix_scale(scores)
    earned = torch.tensor(reward(PROBLEMS, texts))
    assert earned.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert earned.std().item() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(earned.argsort(), scores.argsort())
    assert torch.equal(reward.scores(PROBLEMS, texts), scores)
    again = RewardModel(new_gpt(1))
    again.load_state_dict(model.state_dict())
    other = LearnedReward(again, TOKENIZER, micro_batch=5)(PROBLEMS, texts)
    assert other == pytest.approx(earned.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "scores", [torch.ones(4), torch.ones(1), torch.ones(2, 2), torch.tensor([1.0])]
)
def test_a_scale_needs_scores_that_differ(scores):
    with pytest.raises(ValueError, match="scores: got"):
        reward_model().fix_scale(scores)


def test_a_learned_reward_refuses_unequal_counts_and_none():
    reward = LearnedReward(reward_model(), TOKENIZER)
    with pytest.raises(ValueError, match="5 problems but 1 texts"):
        reward(PROBLEMS, ["y"])
    with pytest.raises(ValueError, match="examples: got none"):
        reward([], [])


def test_a_text_that_is_too_long_is_read_as_far_as_there_is_room():
    """A context of 16: what comes after the 13th letter is not read, and EOS is."""
    reward = LearnedReward(reward_model(), TOKENIZER)
    context = reward.model.body.config.context
    room = context - len(TOKENIZER.encode_prompt("a")) - 1
    longest = "y" * room
    with torch.no_grad():
        expected = by_hand(reward.model, "a", longest)
    texts = [longest, longest + "n", longest + "y" * 40]
    found = reward.scores([PROBLEMS[0]] * 3, texts).tolist()
    assert found == pytest.approx([expected] * 3, abs=1e-5)


def test_a_model_in_float64_is_read_as_well():
    model = RewardModel(base().double())
    tokens, mask = collate([([1, 2], [3, 4])], TOKENIZER.pad_id)
    assert model(tokens, mask).dtype == torch.float64


def test_a_policy_learns_from_a_learned_reward():
    """A model that likes "y": it is paid as any reward is, and its cost is counted."""
    model = RewardModel(base())
    prefers = torch.optim.Adam(model.parameters(), lr=1e-2)
    examples = []
    for problem in PROBLEMS:
        prompt = TOKENIZER.encode_prompt(problem.question)
        for text in ("y", "no"):
            examples.append((prompt, TOKENIZER.encode_response(text)))
    tokens, mask = collate(examples, TOKENIZER.pad_id)
    for _ in range(20):
        liked, disliked = model(tokens, mask).view(-1, 2).unbind(1)
        loss = -torch.nn.functional.logsigmoid(liked - disliked).mean()
        prefers.zero_grad()
        loss.backward()
        prefers.step()
    reward = LearnedReward(model, TOKENIZER)
    model.fix_scale(reward.scores(PROBLEMS * 2, ["y"] * 5 + ["no"] * 5))
    counted = Counted(reward)
    config = rloo.RlooConfig(
        updates=12,
        prompts=5,
        samples=4,
        max_new_tokens=4,
        lr=1e-2,
        warmup=0,
        truncated_reward=-3.0,
    )
    policy = base()
    steps = list(
        rloo.train(policy, TOKENIZER, PROBLEMS, counted, config, generator=generator())
    )
    assert counted.calls == 12
    assert counted.answers == 12 * 20
    assert counted.seconds > 0
    assert steps[-1]["reward"] > steps[0]["reward"] + 0.5


# A reward that says nothing


def test_a_constant_reward_is_warned_of_once_with_the_count():
    held = rollout(["#### 4"] * MANY)
    problems = [THREE] * MANY

    def indifferent(problems, texts):
        return [0.25] * len(texts)

    with pytest.warns(RuntimeWarning, match=f"indifferent: all {MANY} .* earned 0.25"):
        score(indifferent, problems, held, LETTERS)
    with pytest.warns(RuntimeWarning, match="always: all 64"):
        score(Counted(always), problems, held, LETTERS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(indifferent, problems, held, LETTERS)  # it has been said
        cut = rollout(["#### 4"] * MANY, cut=[5])  # one of them earns something else
        score(lambda p, t: [0.25] * len(t), problems, cut, LETTERS)
        score(always, problems[1:], rollout(["#### 4"] * (MANY - 1)), LETTERS)
        score(
            verifier, problems, rollout(["#### 4"] * (MANY - 1) + ["#### 3"]), LETTERS
        )
