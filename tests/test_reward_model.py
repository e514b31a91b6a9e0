"""Reward models: their training. What each function owes: entries.py."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from minialign.algorithms import reward_model
from minialign.algorithms.reward_model import Ranking, RewardModelConfig
from minialign.rewards import LearnedReward, RewardModel
from tests.methods import METHODS, RANKINGS
from tests.properties import training
from tests.properties.common import close
from tests.toy import PROBLEMS, TOKENIZER, base, base_weights, generator

METHOD = METHODS["reward_model"]
CONFIG = METHOD.config


def run(model, config=CONFIG, rankings=RANKINGS, **more):
    more = {"generator": generator(), **more}
    return list(reward_model.train(model, TOKENIZER, rankings, config, **more))


def numbers_by_hand(model, ranking):
    """The head at EOS of each answer, one at a time."""
    found = []
    for answer in ranking.answers:
        ids = torch.tensor([[*ranking.prompt, *answer]])
        found.append(model.head(model.body(ids))[0, -1])
    return torch.stack(found)


def loss_by_hand(model, rankings):
    """Mean over rankings of the mean over pairs of log(1 + e^-gap)."""
    total = 0.0
    for ranking in rankings:
        numbers = numbers_by_hand(model, ranking)
        lacks = []
        for i in range(len(numbers)):
            for j in range(i + 1, len(numbers)):
                lacks.append(torch.log1p(torch.exp(numbers[j] - numbers[i])))
        total = total + torch.stack(lacks).mean()
    return total / len(rankings)


def test_one_update_by_hand():
    """All rankings in one step, by AdamW: its first step is lr times the sign."""
    config = RewardModelConfig(
        updates=1, batch=5, lr=1e-3, warmup=0, max_grad_norm=1e6, micro_batch=2
    )
    model = RewardModel(base())
    with torch.no_grad():
        model.head.weight.normal_(generator=generator(4))
    other = RewardModel(base())
    other.load_state_dict(model.state_dict())
    loss = loss_by_hand(other, RANKINGS)
    loss.backward()
    slopes = [x.grad.norm() for x in other.parameters() if x.grad is not None]
    norm = torch.stack(slopes).norm()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    optimizer.step()
    (metrics,) = run(model, config)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["pairs"] == 3 + 1 + 1 + 3 + 1
    assert metrics["rankings"] == 5
    answers = [answer for ranking in RANKINGS for answer in ranking.answers]
    assert metrics["tokens_trained"] == sum(map(len, answers))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(
            weight, other.state_dict()[name], atol=2e-5, rtol=0, msg=name
        )


def test_the_policy_that_it_was_made_from_stays_as_it_is():
    policy = base()
    run(RewardModel(policy))
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))


@pytest.mark.parametrize("micro_batch", [1, 2, 100])
def test_micro_batches_change_nothing(micro_batch):
    config = RewardModelConfig(updates=2, batch=5, lr=1e-3, warmup=0)
    ends = []
    for size in (5, micro_batch):
        model = RewardModel(base())
        settings = vars(config) | {"micro_batch": size}
        rows = run(model, RewardModelConfig(**settings))
        ends.append((rows, model.state_dict()))
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    for name, weight in ends[0][1].items():
        torch.testing.assert_close(weight, ends[1][1][name], atol=1e-4, rtol=0)


def test_each_pass_meets_every_ranking_once():
    seen = []
    model = RewardModel(base())

    def watched(*args, **more):
        seen.append(args[0])
        return reward_model.pairwise_loss(*args, **more)

    met = []
    right = reward_model.read_rankings

    def spy(model, rankings, pad_id):
        met.extend(tuple(ranking.prompt) for ranking in rankings)
        return right(model, rankings, pad_id)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_model, "read_rankings", spy)
        run(model, RewardModelConfig(updates=4, batch=5, micro_batch=2), loss=watched)
    prompts = sorted(tuple(ranking.prompt) for ranking in RANKINGS)
    orders = [met[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(order) == prompts for order in orders)
    assert len({tuple(order) for order in orders}) > 1  # each pass in its own order
    assert len(seen) == 4 * 3


def test_twins_are_left_out_and_counted():
    y = TOKENIZER.encode_response("y")
    no = TOKENIZER.encode_response("no")
    twins = [Ranking([1, 2], [y, y, no]), Ranking([1, 2], [no, no])]
    (metrics,) = run(
        RewardModel(base()), RewardModelConfig(updates=1, batch=2), rankings=twins
    )
    assert (metrics["pairs"], metrics["identical"]) == (2, 2)
    assert metrics["loss"] == pytest.approx(math.log(2) / 2)  # of two rankings, one


def test_rankings_the_wrong_way_round_are_learnt_the_wrong_way_round():
    turned = [Ranking(each.prompt, each.answers[::-1]) for each in RANKINGS]
    model = RewardModel(base())
    run(model, RewardModelConfig(**vars(CONFIG) | METHOD.long), rankings=turned)
    reward = LearnedReward(model, TOKENIZER)
    liked = torch.tensor(reward(PROBLEMS, ["no"] * 5))
    assert (liked > torch.tensor(reward(PROBLEMS, ["y"] * 5))).all()


def test_a_margin_pushes_further_and_doubtful_labels_stop():
    """Gaps after a long run: wider with a margin, at the log odds with doubt."""
    config = RewardModelConfig(updates=80, batch=5, lr=5e-3, warmup=0, micro_batch=5)
    sure = run(RewardModel(base()), config)[-1]["gap"]
    ahead = partial(reward_model.pairwise_loss, margin=2.0)
    wide = run(RewardModel(base()), config, loss=ahead)[-1]["gap"]
    doubt = [replace(each, label=0.8) for each in RANKINGS]
    near = run(RewardModel(base()), config, rankings=doubt)[-1]["gap"]
    assert wide > sure + 0.5
    assert near == pytest.approx(math.log(0.8 / 0.2), abs=0.1)


def test_a_micro_batch_of_twins_teaches_nothing_and_is_counted():
    """Micro-batches bound memory and change no result, here as well."""
    twins = Ranking(RANKINGS[0].prompt, [RANKINGS[0].answers[0]] * 2)
    ends = []
    for micro_batch in (1, 2):
        config = replace(CONFIG, updates=2, batch=2, micro_batch=micro_batch)
        state = {}
        model = RewardModel(base())
        rows = list(
            reward_model.train(
                model,
                TOKENIZER,
                [twins, RANKINGS[0]],
                config,
                generator=generator(),
                state=state,
            )
        )
        assert [row["identical"] for row in rows] == [1, 1]
        ends.append(training.weights_of(state, ("model",)))
    close(ends[0], ends[1], atol=1e-5)
    alone = list(
        reward_model.train(
            RewardModel(base()),
            TOKENIZER,
            [twins, RANKINGS[0]],
            replace(CONFIG, updates=2, batch=1, micro_batch=1),
            generator=generator(),
        )
    )
    without = min(alone, key=lambda row: row["pairs"])
    assert without["pairs"] == 0 and without["loss"] == 0 and without["steps"] == 0
