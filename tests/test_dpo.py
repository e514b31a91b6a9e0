"""DPO: away from the reference, and training. What each function owes: entries.py."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import minialign.training
from minialign import sampling
from minialign.algorithms import dpo
from minialign.algorithms.dpo import (
    conservative,
    dpo_loss,
    ipo,
    make_pairs,
)
from tests import enumeration as world
from tests.methods import METHODS
from tests.properties import training
from tests.properties.common import close
from tests.properties.preferences import LOGITS, RIGHT, ascent, nats, pair, verdicts
from tests.toy import PROBLEMS, TOKENIZER, base, base_weights, new_gpt


def test_away_from_the_reference_the_gradient_turns():
    """It is RLOO at the reference only: pairs that are told apart count for less."""
    actual = ascent(verdicts(dpo_loss, world.random_logits(1), beta=1.5))
    assert world.cosine(actual, world.true_gradient(LOGITS, RIGHT.double())) < 0.98


LOSSES = {
    "dpo": dpo_loss,
    "cdpo": partial(dpo_loss, per_pair=conservative),
    "ipo": partial(dpo_loss, per_pair=ipo),
}


def flipped(*args, **kwargs):
    """Log 2 at the reference all the same."""
    return -dpo_loss(*args, **kwargs) + 2 * math.log(2)


# Training, in a world where the answers are "y" and "no"

METHOD = METHODS["dpo"]
CONFIG = METHOD.config
run = METHOD.run


def test_with_the_pairs_the_wrong_way_round_it_does_not_learn(monkeypatch):
    monkeypatch.setattr(dpo, "make_pairs", lambda *args: make_pairs(*args).flip(1))
    assert not training.learns(partial(run, **METHOD.long), METHOD.sure, METHOD.shows)


def test_pairs_of_equal_answers_are_dropped_and_counted():
    """They teach nothing, and rounding would move the policy for them."""
    twin = pair("a", "y", "y")
    real = pair("b", "z", "no")
    metrics = next(run(base(), problems=[], given=[twin, real, twin]))
    assert (metrics["pairs"], metrics["identical"]) == (1, 2)
    assert metrics["tokens_trained"] == 7 * (len(real[1]) + len(real[2]))
    metrics = next(run(base()))
    assert metrics["identical"] == 0


def test_given_pairs_do_not_ignore_a_reference():
    """The policy of each round's start is the reference, unless that is switched off:
    then one that is handed in would have no effect."""
    pairs = [pair("a", "y", "no")]
    with pytest.raises(ValueError, match=r"reference.*reset_reference"):
        next(run(base(), problems=[], given=pairs, reference=base()))
    held = run(
        base(), problems=[], given=pairs, reference=base(), reset_reference=False
    )
    next(held)


def test_given_pairs_teach_without_a_draw(monkeypatch):
    """Off-policy: an answer it never gives, "z", preferred to one that it gives."""
    monkeypatch.setattr(minialign.training, "generate", None)
    policy, pairs = base(), [pair(p.question, "z", "no") for p in PROBLEMS]
    said = pairs[0][1]
    before = nats(policy, pairs[0][0], said).item()
    config = replace(CONFIG, rounds=1, updates=6)
    metrics = list(run(policy, config, reward=None, problems=[], given=pairs))
    assert nats(policy, pairs[0][0], said).item() > before + 0.5
    assert metrics[0]["pairs"] == 5 and metrics[0]["completions"] == 0
    assert "reward" not in metrics[0]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["chosen_length"] == 2 and metrics[0]["rejected_length"] == 3


def test_dpo_cannot_see_a_wrong_prompt_mask():
    """The prompt's own log-probs cancel; in means over tokens they do not."""
    policy, reference = base().double(), new_gpt(3).double()
    (prompt, *both), bos = pair("what", "y", "no"), TOKENIZER.bos_id
    assert prompt[0] == bos

    def margin(start, mean):
        four = []  # of the policy, then of the reference
        for model in (policy, reference):
            for answer in both:
                scored = prompt[start:] + answer
                total = nats(model, prompt[:start], scored)
                four.append(total / len(scored) if mean else total)
        value = dpo_loss(*torch.stack(four)[:, None], beta=0.5)
        slopes = torch.autograd.grad(value, list(policy.parameters()))
        return value.detach(), torch.cat([slope.flatten() for slope in slopes])

    right, wrong = margin(len(prompt), mean=False), margin(1, mean=False)
    close(wrong[0], right[0])
    close(wrong[1], right[1], atol=1e-9)
    right, wrong = margin(len(prompt), mean=True), margin(1, mean=True)
    assert (wrong[0] - right[0]).abs() > 0.01


def trained_on(scored):
    """Of calls of `pair_logprobs`: the pairs of every micro-batch of a step."""
    return [args[1] for args, logprobs in scored if logprobs.requires_grad]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_two_rounds_by_hand(monkeypatch, temperature):
    """Every metric against code of its own: the reference of a round is the
    policy that drew its pairs, and every pair has its own row."""
    config = replace(CONFIG, temperature=temperature, batch=5, lr=1e-3)
    drawn = training.spied(monkeypatch, sampling, "generate")  # of each chunk
    scored = training.spied(monkeypatch, dpo, "pair_logprobs")
    policy, start, state = base(), base(), {}
    more = {"measure": dpo.pair_logprobs, "reference": new_gpt(3), "state": state}
    steps = run(policy, config, **more)
    for update in range(6):
        if update == 3:
            start = copy.deepcopy(policy)
        before, count = copy.deepcopy(policy), len(drawn)
        metrics = next(steps)
        assert len(drawn) - count == (2 if update in (0, 3) else 0)  # 4 problems by 3
        turn, trained = update % 3, trained_on(scored)
        table = [
            [nats(m, prompt, answer, temperature).item() for m in (before, start)]
            for prompt, *both in trained[-1] + trained[-2]
            for answer in both
        ]
        own, fixed = torch.tensor(table).view(-1, 2, 2).unbind(2)  # (5, 2) each
        shift = own - fixed
        h = shift[:, 0] - shift[:, 1]
        recent = [rollout for _, rollout in drawn[-2:]]
        answers = [ids for rollout in recent for ids in rollout.responses()]
        right = [TOKENIZER.decode_response(ids) == "y" for ids in answers]
        groups = [right[i : i + 6] for i in range(0, 24, 6)]
        cut = [flag for rollout in recent for flag in rollout.truncated.tolist()]
        chosen, rejected = ([len(p[i]) for p in state["pairs"]] for i in (1, 2))
        expected = {
            "update": update + 1,
            "round": 1 + update // 3,
            "completions": 24 * (1 + update // 3),
            "reward": sum(right) / 24,
            "truncated": sum(cut) / 24,
            "length": sum(map(len, answers)) / 24,
            "entropy": -sum(x.logprobs.sum().item() for x in recent)
            / sum(map(len, answers)),
            "steps": 1,
            "tokens_trained": sum(
                len(answer) for _, *both in trained[-1] + trained[-2] for answer in both
            ),
            "guarded": 0.0,
            "identical": 0,
            "unpaired": sum(len(set(group)) == 1 for group in groups) / 4,
            "pairs": sum(min(sum(g), 6 - sum(g), 4) for g in groups),
            "chosen_length": sum(chosen) / len(chosen),
            "rejected_length": sum(rejected) / len(rejected),
            "loss": sum(math.log1p(math.exp(-0.3 * x)) for x in h.tolist()) / 5,
            "margin": 0.3 * h.mean().item(),
            "chosen_logprob": own[:, 0].mean().item(),
            "rejected_logprob": own[:, 1].mean().item(),
            "chosen_shift": shift[:, 0].mean().item(),
            "rejected_shift": shift[:, 1].mean().item(),
        }
        if turn:  # at the reference, h is rounding noise
            expected["preferred"] = (h > 0).float().mean().item()
        measured = {name: metrics[name] for name in expected}
        assert measured == pytest.approx(expected, rel=1e-4, abs=2e-5)
        assert all(type(value) in (int, float) for value in metrics.values())
        styles = [x for name, x in metrics.items() if name.startswith("style_")]
        assert sum(styles) == pytest.approx(1)
        others = {"preferred", "grad_norm", "kl"}
        named = {name for name in metrics if not name.startswith("style_")}
        assert named == expected.keys() | others
        assert (metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)) == (turn == 0)


def test_the_reported_kl_is_that_of_the_draw(monkeypatch):
    """Of the first answer to each problem, all chunks together: nats at each choice,
    exact over the vocabulary, by code of its own."""
    drawn = training.spied(monkeypatch, sampling, "generate")  # of each chunk
    policy, reference = base(), new_gpt(3)
    twin = copy.deepcopy(policy)
    metrics = next(run(policy, replace(CONFIG, temperature=0.8), reference=reference))
    found = []
    for _, rollout in drawn:
        found += training.row_kl(twin, reference, rollout, 0.8)[::6]
    assert len(found) == 4
    assert metrics["kl"] == pytest.approx(sum(found) / 4, abs=1e-4)
    assert "kl" not in next(run(base()))


def test_a_fixed_reference_stays_fixed():
    """`reset_reference` False: only a policy that has not moved starts from log 2."""
    config, reference = replace(CONFIG, reset_reference=False), base()
    metrics = list(run(base(), config, reference=reference))
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(metrics[3]["margin"]) > 0.01
    training.assert_same_bits(dict(reference.state_dict()), dict(base_weights()))
    assert all(p.grad is None for p in reference.parameters())
    reset = list(run(base(), replace(config, reset_reference=True)))
    assert abs(reset[3]["margin"]) < 1e-5


def test_a_small_beta_is_a_long_leash():
    """Trained for long on the same pairs, the smaller beta goes further."""
    pairs = [pair(p.question, "y", "no") for p in PROBLEMS]
    shifts = []
    for beta in (0.3, 3.0):
        config = replace(CONFIG, rounds=1, updates=20, beta=beta)
        metrics = list(run(base(), config, given=pairs))
        shifts.append(metrics[-1]["chosen_shift"] - metrics[-1]["rejected_shift"])
    assert shifts[0] > shifts[1] + 0.5 > 0.5


def test_every_pair_comes_once_before_any_comes_again(monkeypatch):
    pairs = [pair(p.question, "y", "no") for p in PROBLEMS]
    scored = training.spied(monkeypatch, dpo, "pair_logprobs")
    config = replace(CONFIG, updates=4, batch=3)
    list(run(base(), config, given=pairs, measure=dpo.pair_logprobs))
    trained = trained_on(scored)
    assert [len(batch) for batch in trained] == [3] * 8
    order = [pairs.index(each) for batch in trained for each in batch]
    first, second = order[:12], order[12:]  # the rounds
    for half in (first, second):
        assert sorted(half[:5]) == sorted(half[5:10]) == list(range(5))
        assert half[:5] != half[5:10]
    assert first != second


@pytest.mark.parametrize("paid", [0.0, 1.0])
def test_a_round_without_a_pair_changes_nothing_and_says_so(paid):
    policy = base()

    def reward(problems, texts):
        return [paid] * len(texts)

    metrics = list(run(policy, replace(CONFIG, max_new_tokens=5), reward))
    assert len(metrics) == 6
    for row in metrics:
        assert row["pairs"] == row["loss"] == row["grad_norm"] == row["margin"] == 0
        assert row["unpaired"] == 1
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))


def test_an_answer_that_does_not_end_is_wrong():
    assert training.check_truncation(run)["pairs"] > 0
