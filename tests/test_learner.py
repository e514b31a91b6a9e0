"""minialign/training.py: what surrounds every loss, each part by hand.

The algorithms share this room, so that ties between them no longer prove it. Expected
numbers come from the formulas, written out here in plain Python.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minialign import checkpoint
from minialign.sampling import Rollout
from minialign.training import (
    Learner,
    Sums,
    deal,
    draw,
    rescore_both,
    sampled_kl,
)
from tests.properties.common import float64
from tests.toy import PROBLEMS, TOKENIZER, base, generator, stretched, token_nats

NO_LIMIT = math.inf


def settings(warmup: int = 0, max_grad_norm: float = NO_LIMIT) -> SimpleNamespace:
    return SimpleNamespace(warmup=warmup, max_grad_norm=max_grad_norm)


class Weights(nn.Module):
    """A model that is nothing but a row of numbers."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.row = nn.Parameter(float64(list(values)))

    def pull(self, *slopes: float) -> torch.Tensor:
        """A loss whose gradient is these slopes."""
        return (self.row * float64(list(slopes))).sum()


def adamw(weight: float, slopes: list[float], rates: list[float]) -> float:
    """Loshchilov and Hutter 2019, algorithm 2, without decay; torch's defaults."""
    m = 0.0
    v = 0.0
    for t, (slope, rate) in enumerate(zip(slopes, rates, strict=True), start=1):
        m = 0.9 * m + 0.1 * slope
        v = 0.999 * v + 0.001 * slope**2
        m_hat = m / (1 - 0.9**t)
        v_hat = v / (1 - 0.999**t)
        weight -= rate * m_hat / (math.sqrt(v_hat) + 1e-8)
    return weight


# The step


def test_a_step_is_that_of_adamw():
    """Three steps, of which the last two remember those before; nothing decays."""
    model = Weights(1.0, -2.0)
    learner = Learner(settings(), 3, generator(), policy=(model, 0.1))
    slopes = [[0.5, -3.0], [-0.25, 1.0], [2.0, 0.0]]
    for update in learner.remaining():
        learner.backward(model.pull(*slopes[update]), 1)
        learner.step()
    rates = [0.1, 0.1 * 2 / 3, 0.1 / 3]
    expected = [
        adamw(weight, list(own), rates)
        for weight, own in zip((1.0, -2.0), zip(*slopes, strict=True), strict=True)
    ]
    assert model.row.tolist() == pytest.approx(expected, rel=1e-12)


def test_parts_of_a_loss_add_up_and_are_forgotten_after_the_step():
    in_parts, whole = Weights(1.0), Weights(1.0)
    for model, parts in ((in_parts, [0.25, 0.5, -1.0]), (whole, [-0.25])):
        learner = Learner(settings(), 2, generator(), policy=(model, 0.1))
        for _ in learner.remaining():
            for slope in parts:
                learner.backward(model.pull(slope), 1)
            learner.step()
        assert model.row.grad is None
    assert in_parts.row.item() == whole.row.item()


def test_gradients_that_no_step_used_are_forgotten_with_the_update():
    """An algorithm may stop in the middle of an update, and begin the next."""
    model = Weights(1.0)
    learner = Learner(settings(), 2, generator(), policy=(model, 0.1))
    for update in learner.remaining():
        learner.backward(model.pull(100.0 if update == 0 else 0.5), 1)
        if update == 1:
            learner.step()
    assert model.row.item() == pytest.approx(adamw(1.0, [0.5], [0.05]), rel=1e-12)


def test_several_steps_an_update_share_its_rate():
    model = Weights(1.0)
    learner = Learner(settings(), 1, generator(), policy=(model, 0.1))
    for _ in learner.remaining():
        for slope in (0.5, -0.25):
            learner.backward(model.pull(slope), 1)
            learner.step()
    expected = adamw(1.0, [0.5, -0.25], [0.1, 0.1])
    assert model.row.item() == pytest.approx(expected, rel=1e-12)


def test_without_a_gradient_nothing_moves():
    """As when nothing was kept to learn from."""
    model = Weights(1.0, -2.0)
    learner = Learner(settings(), 2, generator(), policy=(model, 0.1))
    for _ in learner.remaining():
        learner.step()
        nothing = {"steps": 0, "tokens_trained": 0, "grad_norm": 0.0, "guarded": 0.0}
        assert learner.report() == nothing
    assert model.row.tolist() == [1.0, -2.0]


# One rate, one clip and one schedule for each model


def test_every_model_has_its_own_peak():
    policy, critic = Weights(1.0), Weights(1.0)
    models = {"policy": (policy, 0.1), "critic": (critic, 0.004)}
    learner = Learner(settings(), 1, generator(), **models)
    for _ in learner.remaining():
        learner.backward(policy.pull(0.5) + critic.pull(0.5), 1)
        learner.step()
    assert policy.row.item() == pytest.approx(adamw(1.0, [0.5], [0.1]), rel=1e-12)
    assert critic.row.item() == pytest.approx(adamw(1.0, [0.5], [0.004]), rel=1e-12)


def test_each_gradient_is_scaled_by_its_own_length():
    """A long one of the critic does not shorten the policy's, nor the other way round.

    A second step shows the scale: Adam's first is the same for every scale.
    """
    policy, critic = Weights(1.0), Weights(1.0)
    models = {"policy": (policy, 0.1), "critic": (critic, 0.1)}
    learner = Learner(settings(max_grad_norm=1.0), 2, generator(), **models)
    norms = []
    for update in learner.remaining():
        slopes = ((0.5, 20.0), (4.0, 0.25))[update]
        learner.backward(policy.pull(slopes[0]) + critic.pull(slopes[1]), 1)
        learner.step()
        norms.append(learner.report()["grad_norm"])
    assert norms == [0.5, 4.0]  # the policy's, before they are scaled
    # torch divides by the norm + 1e-6.
    cut = 4.0 / (4.0 + 1e-6)
    expected = adamw(1.0, [0.5, cut], [0.1, 0.05])
    assert policy.row.item() == pytest.approx(expected, rel=1e-12)
    cut = 20.0 / (20.0 + 1e-6)
    expected = adamw(1.0, [cut, 0.25], [0.1, 0.05])
    assert critic.row.item() == pytest.approx(expected, rel=1e-12)


def test_a_gradient_is_scaled_as_a_whole():
    """(3, 4) is 5 long; scaled to 1 it keeps its direction."""
    model = Weights(1.0, 1.0)
    learner = Learner(settings(max_grad_norm=1.0), 2, generator(), policy=(model, 0.1))
    norms = []
    for update in learner.remaining():
        learner.backward(model.pull(*((3.0, 4.0), (0.5, 0.5))[update]), 1)
        learner.step()
        norms.append(learner.report()["grad_norm"])
    assert norms == pytest.approx([5.0, math.sqrt(0.5)])
    scale = 1 / (5.0 + 1e-6)
    expected = [adamw(1.0, [slope * scale, 0.5], [0.1, 0.05]) for slope in (3.0, 4.0)]
    assert model.row.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "warmup, steps, shares",
    [
        (2, 6, [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]),
        (0, 4, [1, 3 / 4, 1 / 2, 1 / 4]),
        (1, 4, [1, 1, 2 / 3, 1 / 3]),
        (4, 4, [1 / 4, 1 / 2, 3 / 4, 1]),
        (9, 3, [1 / 9, 2 / 9, 1 / 3]),  # it ends before its peak
    ],
)
def test_every_group_follows_the_schedule(warmup, steps, shares):
    """Up to its own peak, and down along a line that would meet 0 after the last."""
    peaks = {"policy": 0.1, "critic": 0.03, "third": 2.0}
    models = {name: (Weights(1.0), peak) for name, peak in peaks.items()}
    learner = Learner(settings(warmup=warmup), steps, generator(), **models)
    rates = []
    for _ in learner.remaining():
        rates.append([group["lr"] for group in learner.optimizer.param_groups])
    assert len(rates) == steps
    for found, share in zip(rates, shares, strict=True):
        assert found == pytest.approx([share * peak for peak in peaks.values()])


# What is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["policy", "critic"])
def test_a_gradient_that_is_not_finite_moves_no_weight(bad, name):
    models = {"policy": Weights(1.0, 2.0), "critic": Weights(3.0)}
    peaked = {each: (model, 0.1) for each, model in models.items()}
    learner = Learner(settings(max_grad_norm=1.0), 5, generator(), **peaked)
    with pytest.raises(ValueError, match=rf"update 0.*gradient.*\b{name}\b"):
        for _ in learner.remaining():
            for each, model in models.items():
                slope = bad if each == name else 1.0
                learner.backward(model.row[0] * slope, 1)
            learner.step()
    assert models["policy"].row.tolist() == [1.0, 2.0]
    assert models["critic"].row.tolist() == [3.0]


# What is reported


def test_an_update_is_reported_by_itself():
    """Steps, tokens and norms since it began; the guard of either model counts."""
    policy, critic = Weights(1.0), Weights(1.0)
    models = {"policy": (policy, 0.1), "critic": (critic, 0.1)}
    learner = Learner(settings(max_grad_norm=2.0), 3, generator(), **models)
    reports = []
    for update in learner.remaining():
        if update == 0:
            for slope, other in ((1.0, 0.5), (3.0, 0.5), (1.0, 9.0), (2.0, 2.0)):
                learner.backward(policy.pull(slope) / 2, 3)
                learner.backward(policy.pull(slope) / 2, torch.tensor(4))
                learner.backward(critic.pull(other), 0)
                learner.step()
        if update == 1:
            learner.backward(policy.pull(0.5), 5)
            learner.step()
            learner.backward(policy.pull(0.5), 6)  # and no step follows
        reports.append(learner.report())
    assert reports[0] == {
        "steps": 4,
        "tokens_trained": 28,
        "grad_norm": 7.0 / 4,
        "guarded": 2 / 4,
    }
    assert reports[1] == {
        "steps": 1,
        "tokens_trained": 5,
        "grad_norm": 0.5,
        "guarded": 0.0,
    }
    assert reports[2] == {
        "steps": 0,
        "tokens_trained": 0,
        "grad_norm": 0.0,
        "guarded": 0.0,
    }
    assert all(type(x) in (int, float) for each in reports for x in each.values())


# The state


def learn(state: dict, updates: int, draw_from: torch.Generator) -> list[float]:
    """A run of 6 updates that stops after so many; what it drew. Its weights are in
    the state."""
    policy = Weights(1.0, -2.0)
    critic = Weights(0.5)
    models = {"policy": (policy, 0.1), "critic": (critic, 0.01)}
    learner = Learner(settings(2, 1.0), 6, draw_from, state, **models)
    drawn = []
    for update in learner.remaining():
        chances = (
            torch.rand((), generator=chance).item()
            for chance in (draw_from, learner.data_order)
        )
        drawn.append(sum(chances))
        learner.backward(policy.pull(drawn[-1], 1.0) + critic.pull(drawn[-1]), 1)
        learner.step()
        learner.keep(memory=update / 2)
        if update + 1 == updates:
            break
    return drawn


def test_a_state_holds_what_it_should_and_nothing_else():
    state: dict = {}
    learn(state, 3, generator())
    names = {"policy", "critic", "optimizer", "generator", "update", "memory"}
    assert names <= state.keys()
    assert state["update"] == 3
    assert state["memory"] == 1.0


def test_a_run_goes_on_where_it_stopped(tmp_path):
    """By way of a file: draws, weights, moments and rates are those of one long run."""
    whole: dict = {}
    expected = learn(whole, 6, generator(3))
    state: dict = {}
    first = learn(state, 2, generator(3))
    checkpoint.save(tmp_path / "state", state)
    state = checkpoint.load(tmp_path / "state")
    assert first + learn(state, 6, generator(9)) == expected
    for name in ("policy", "critic"):
        assert torch.equal(state[name]["row"], whole[name]["row"])
    moments = state["optimizer"]["state"], whole["optimizer"]["state"]
    for ours, theirs in zip(*(list(each.values()) for each in moments), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_that_has_ended_has_nothing_left():
    state: dict = {}
    learn(state, 6, generator())
    assert learn(state, 6, generator()) == []


def test_a_run_that_has_ended_begins_nothing_again():
    policy = Weights(1.0)
    learner = Learner(settings(), 2, generator(), policy=(policy, 0.1))
    for _ in learner.remaining():
        learner.keep()
    assert list(learner.remaining()) == []


def test_two_runs_may_go_on_from_one_state(tmp_path):
    """The first does not move the moments of the second."""
    state: dict = {}
    learn(state, 2, generator(3))
    checkpoint.save(tmp_path / "state", state)
    state = checkpoint.load(tmp_path / "state")
    ends = []
    for _ in range(2):
        again = dict(state)
        learn(again, 6, generator(9))
        ends.append(again["policy"]["row"])
    assert torch.equal(*ends)


def test_every_model_is_in_training_mode_at_every_update():
    """A caller may evaluate between two of them."""
    policy, critic = Weights(1.0), Weights(1.0)
    models = {"policy": (policy, 0.1), "critic": (critic, 0.1)}
    for _ in Learner(settings(), 2, generator(), **models).remaining():
        assert policy.training
        assert critic.training
        policy.eval()
        critic.eval()


# Draws


def drawing(**changes) -> SimpleNamespace:
    usual = {"prompts": 2, "samples": 3, "max_new_tokens": 3, "temperature": 0.7}
    return SimpleNamespace(**usual | changes)


def test_problems_come_in_order_and_again_when_they_run_out():
    asked = []
    for number in range(3):
        found, rollout = draw(
            base(), TOKENIZER, PROBLEMS, number, drawing(), generator()
        )
        asked.append("".join(problem.question for problem in found))
        assert len(rollout.tokens) == 6
        assert (rollout.samples, rollout.temperature) == (3, 0.7)
        prompts = [TOKENIZER.encode_prompt(problem.question) for problem in found]
        for row, size in enumerate(rollout.prompt_lengths.tolist()):
            assert rollout.tokens[row, :size].tolist() == prompts[row // 3]
    assert asked == ["ab", "cd", "ea"]


def test_a_greedy_draw_is_one_answer_to_each_and_asks_no_generator():
    found, rollout = draw(base(), TOKENIZER, PROBLEMS, 1, drawing(), None, greedy=True)
    assert [problem.question for problem in found] == ["c", "d"]
    assert rollout.greedy
    assert (len(rollout.tokens), rollout.samples, rollout.temperature) == (2, 1, 1.0)


def test_a_draw_in_chunks_asks_the_same():
    policy = base()
    config = drawing(prompts=5)
    whole, in_chunks = (
        draw(policy, TOKENIZER, PROBLEMS, 0, config, generator(), chunk=chunk)
        for chunk in (None, 2)
    )
    assert whole[0] == in_chunks[0]
    starts = whole[1].prompt_lengths, in_chunks[1].prompt_lengths
    assert torch.equal(*starts)


# The KL


def test_without_a_reference_there_is_no_distance():
    _, rollout = draw(base(), TOKENIZER, PROBLEMS, 0, drawing(), generator())
    logprobs, ref_logprobs = rescore_both(base(), None, rollout, 4)
    assert torch.equal(logprobs, rollout.logprobs)
    assert sampled_kl(logprobs, ref_logprobs, rollout.mask).tolist() == [0.0] * 6


def test_a_copy_of_the_policy_is_at_no_distance_at_all():
    """Not about 0: whatever differed by rounding would be learnt from."""
    _, rollout = draw(base(), TOKENIZER, PROBLEMS, 0, drawing(), generator())
    logprobs, ref_logprobs = rescore_both(base(), base(), rollout, 4)
    assert sampled_kl(logprobs, ref_logprobs, rollout.mask).tolist() == [0.0] * 6


def test_both_are_scored_at_the_rollouts_temperature():
    policy, reference = base(), stretched()
    _, rollout = draw(policy, TOKENIZER, PROBLEMS, 0, drawing(), generator())
    both = rescore_both(policy, reference, rollout, 4)
    for model, found in zip((policy, reference), both, strict=True):
        assert found.requires_grad is False
        for row, nats in enumerate(token_nats(model, rollout, 0.7)):
            live = rollout.mask[row]
            torch.testing.assert_close(found[row, live], nats, rtol=1e-4, atol=1e-5)
            assert (found[row, ~live] == 0).all()


def test_sampled_kl_by_hand():
    """Sums over live slots of log π − log reference; a row may count below 0."""
    logprobs = float64([[-1.0, -2.0, -3.0], [-0.5, 1e9, -0.25]]).requires_grad_()
    ref_logprobs = float64([[-1.5, -4.0, -3.5], [-0.125, -1e9, -0.25]])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    nats = sampled_kl(logprobs, ref_logprobs, mask)
    assert nats.tolist() == [3.0, -0.375]
    assert not nats.requires_grad


# Dealing


def rollout_of(lengths: list[int]) -> Rollout:
    """Answers of these lengths to prompts of 2 tokens."""
    B, T = len(lengths), 2 + max(lengths)
    columns = torch.arange(T - 1)
    ends = torch.tensor(lengths)[:, None]
    mask = (columns >= 1) & (columns < 1 + ends)
    return Rollout(
        tokens=torch.zeros(B, T, dtype=torch.int64),
        mask=mask,
        logprobs=torch.zeros(B, T - 1),
        prompt_lengths=torch.full((B,), 2),
        truncated=torch.zeros(B, dtype=torch.bool),
        temperature=1.0,
        samples=1,
    )


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 100])
def test_dealing_gives_each_row_once_an_epoch(minibatches, micro_batch):
    lengths = [5, 1, 4, 2, 3, 6, 1]
    steps = deal(rollout_of(lengths), 2, minibatches, micro_batch, generator(5))
    assert len(steps) == 2 * minibatches
    for epoch in (steps[:minibatches], steps[minibatches:]):
        sizes = [sum(map(len, step)) for step in epoch]
        assert max(sizes) - min(sizes) <= 1
        rows = torch.cat([torch.cat(step) for step in epoch])
        assert sorted(rows.tolist()) == list(range(7))
    for step in steps:
        assert all(len(rows) <= micro_batch for rows in step)
        own = [lengths[row] for rows in step for row in rows.tolist()]
        assert own == sorted(own)  # alike side by side, so that little is padding
    orders = [torch.cat(step).tolist() for step in (steps[0], steps[minibatches])]
    assert (orders[0] == orders[1]) == (minibatches == 1)  # dealt anew, or all at once


def test_one_minibatch_leaves_nothing_to_chance():
    chance = generator(5)
    rollout = rollout_of([3, 1, 2])
    (step,) = deal(rollout, 1, 1, 2, chance)
    assert torch.equal(chance.get_state(), generator(5).get_state())
    assert [rows.tolist() for rows in step] == [[1, 2], [0]]


# Sums


def test_sums_are_in_float64_and_hold_no_gradient():
    """0.1 in float32, seven times: as Python adds up what it reads off."""
    sums = Sums()
    assert sums.read() == {}
    tenth = torch.tensor(0.1, requires_grad=True)
    expected = 0.0
    for _ in range(7):
        sums.add(loss=tenth, share=torch.tensor(True))
        expected += tenth.item()
    assert sums.read() == {"loss": expected, "share": 7.0}
    assert all(type(number) is float for number in sums.read().values())
