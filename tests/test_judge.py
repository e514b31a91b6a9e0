"""The judge: what it reads, that it is asked both ways, and what a policy is paid."""

import pytest
import torch

from minialign import rewards
from minialign.model import GPT, GPTConfig
from minialign.rewards import Judge, JudgedReward, verdict_ids, verdict_prompt
from tests.toy import PROBLEMS, TOKENIZER

OURS = ["y", "no", "", "nn", "maybe"]
THEIRS = ["n", "yes", "o", "nn", "y"]


def opinionated(seed: int, context: int = 160) -> GPT:
    """A model of weights so large that its verdict depends on what it reads."""
    sizes = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "hidden": 48}
    config = GPTConfig(vocab_size=TOKENIZER.n_vocab, context=context, **sizes)
    model = GPT(config, torch.Generator().manual_seed(seed)).requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(1.5)
    return model


def by_hand(model: GPT, ids: list[int]) -> float:
    """Of the two verdicts alone, the chance of "1" after these tokens."""
    hidden = model(torch.tensor([ids]))
    logits = model.logits(hidden)[0, -1].double()
    one, two = logits[ord("1")].exp(), logits[ord("2")].exp()
    return (one / (one + two)).item()


def spell(question: str, first: str, second: str, working: str | None) -> list[int]:
    """What a judge reads, token by token."""
    ids = [TOKENIZER.bos_id, *question.encode(), TOKENIZER.answer_id]
    ids += [*first.encode(), TOKENIZER.eos_id, ord("1")]
    ids += [*second.encode(), TOKENIZER.eos_id, ord("2")]
    if working is not None:
        ids += [*working.encode(), TOKENIZER.eos_id]
    return ids


@pytest.mark.parametrize("working", [None, "", "<<1+1=2>>"])
def test_each_answer_is_followed_by_its_number_and_the_working_comes_last(working):
    ids = verdict_prompt(TOKENIZER, "a", "y", "no", working)
    assert ids == spell("a", "y", "no", working)
    assert verdict_ids(TOKENIZER) == (ord("1"), ord("2"))


def test_the_verdict_is_a_choice_between_two_tokens():
    """Of whatever length: padding is not read."""
    model = opinionated(0)
    expected = []
    for problem, ours, theirs in zip(PROBLEMS, OURS, THEIRS, strict=True):
        expected.append(by_hand(model, spell(problem.question, ours, theirs, None)))
    assert len({round(chance, 3) for chance in expected}) == 5
    for rows in (1, 2, 64):
        judge = Judge(model, TOKENIZER, micro_batch=rows)
        found = judge.says_first(PROBLEMS, OURS, THEIRS).tolist()
        assert found == pytest.approx(expected, abs=1e-5)


def mean_of_both_orders(prefers) -> None:
    """A judge that says "1" with 0.9 whatever it reads prefers neither answer."""
    biased = Judge(opinionated(1), TOKENIZER)
    biased.says_first = lambda problems, first, second: torch.full((5,), 0.9).double()
    found = prefers(biased, PROBLEMS, OURS, THEIRS)
    assert found.tolist() == pytest.approx([0.5] * 5)
    judge = Judge(opinionated(1), TOKENIZER)
    one_way = judge.says_first(PROBLEMS, OURS, THEIRS)
    other_way = judge.says_first(PROBLEMS, THEIRS, OURS)
    assert (one_way + other_way - 1).abs().max() > 0.01  # it has a bias to be undone
    found = prefers(judge, PROBLEMS, OURS, THEIRS)
    assert torch.allclose(found, 0.5 + (one_way - other_way) / 2)
    swapped = prefers(judge, PROBLEMS, THEIRS, OURS)
    assert torch.allclose(found + swapped, torch.ones(5).double())


def asked_one_way(judge, problems, ours, theirs):
    """Both orders are not averaged: what stands first has an advantage."""
    return judge.says_first(problems, ours, theirs)


def asked_twice_alike(judge, problems, ours, theirs):
    """The second verdict is read as if ours stood first there too."""
    first = judge.says_first(problems, ours, theirs)
    return (first + judge.says_first(problems, theirs, ours)) / 2


def test_a_preference_is_the_mean_over_both_orders():
    mean_of_both_orders(Judge.prefers)


@pytest.mark.parametrize("wrong", [asked_one_way, asked_twice_alike])
def test_that_is_not_true_of_a_judge_who_is_asked_otherwise(wrong):
    with pytest.raises(AssertionError):
        mean_of_both_orders(wrong)


def test_a_worker_works_each_problem_once_and_has_not_seen_the_answers(monkeypatch):
    prompts = []

    def spy(model, asked, **more):
        prompts.extend(asked)
        return original(model, asked, **more)

    original = rewards.generate
    monkeypatch.setattr(rewards, "generate", spy)
    monkeypatch.setattr(rewards, "LONGEST_WORKING", 8)
    worker = opinionated(2)
    model = opinionated(0)
    judge = Judge(model, TOKENIZER, worker)
    asked = [PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]]
    workings = judge.work(asked)
    begun = [*b"<<"]
    expected = [TOKENIZER.encode_prompt(q) + begun for q in ("a", "b")]
    assert sorted(prompts) == expected
    assert all(working.startswith("<<") for working in workings)
    assert workings[0] == workings[2]
    found = judge.says_first(asked, OURS[:3], THEIRS[:3])
    assert len(prompts) == 2
    texts = zip(asked, OURS, THEIRS, workings, strict=False)
    hand = [by_hand(model, spell(p.question, o, t, w)) for p, o, t, w in texts]
    assert found.tolist() == pytest.approx(hand, abs=1e-5)


def test_a_policy_is_paid_how_surely_it_beats_its_rival():
    judge = Judge(opinionated(0), TOKENIZER)
    calls = []

    def rival(problems):
        calls.append([problem.question for problem in problems])
        return [f"n{problem.question}" for problem in problems]

    reward = JudgedReward(judge, rival)
    asked = [PROBLEMS[0], PROBLEMS[0], PROBLEMS[2]]
    paid = reward(asked, ["y", "no", "y"])
    expected = judge.prefers(asked, ["y", "no", "y"], ["na", "na", "nc"])
    assert paid == pytest.approx(expected.tolist())
    reward([PROBLEMS[2], PROBLEMS[1]], ["no", "no"])
    assert calls == [["a", "c"], ["b"]]
    same = reward([PROBLEMS[0]], ["na"])
    assert same == pytest.approx([0.5])  # beside itself


def test_answers_that_do_not_fit_are_read_as_far_as_there_is_room():
    """A context of 24 has room for 19 tokens of answers, their ends included."""
    judge = Judge(opinionated(0, context=24), TOKENIZER)
    fits = ["y" * 8], ["n" * 9]
    whole = by_hand(judge.model, spell("a", "y" * 8, "n" * 9, None))
    assert judge.says_first(PROBLEMS[:1], *fits).tolist() == pytest.approx([whole])
    longer = ["y" * 8], ["n" * 10]
    read = by_hand(judge.model, spell("a", "y" * 8, "n" * 8, None))
    assert judge.says_first(PROBLEMS[:1], *longer).tolist() == pytest.approx([read])
    asked = len(TOKENIZER.encode_prompt("a"))
    ids = verdict_prompt(TOKENIZER, "a", "y" * 50, "no", "w", context=24)
    room = (24 - asked - 2 - 2) // 2
    assert ids == spell("a", "y" * (room - 1), "no", "w")


def test_a_judge_refuses_what_it_cannot_read():
    judge = Judge(opinionated(0, context=24), TOKENIZER)
    with pytest.raises(ValueError, match="2 problems, 1 first and 2 second"):
        judge.says_first(PROBLEMS[:2], ["y"], ["n", "n"])
    with pytest.raises(ValueError, match="0 problems"):
        judge.prefers([], [], [])
    cramped = Judge(opinionated(0, context=6), TOKENIZER)
    with pytest.raises(ValueError, match="3 tokens of question.*context of 6"):
        cramped.prefers(PROBLEMS[:1], ["y"], ["n"])
    with pytest.raises(ValueError, match="micro_batch: got 0"):
        Judge(opinionated(0), TOKENIZER, micro_batch=0)
    with pytest.raises(ValueError, match="2 problems but 1 texts"):
        JudgedReward(judge, lambda problems: ["n"])(PROBLEMS[:2], ["y"])
    with pytest.raises(ValueError, match="rival: 1 answers to 2 problems"):
        JudgedReward(judge, lambda problems: ["n"])(PROBLEMS[:2], ["y", "y"])
