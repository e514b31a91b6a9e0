"""RRHF: its expected gradient by enumeration, its losses, and training."""

import copy
import math
from dataclasses import replace
from functools import partial
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minialign import sampling
from minialign.algorithms import rrhf
from minialign.algorithms.rrhf import (
    best_answers,
    ranking_loss,
    rrhf_loss,
    scores,
    sft_loss,
    summed_scores,
)
from tests import enumeration as world
from tests import strategies
from tests.methods import METHODS
from tests.properties import common, training
from tests.toy import (
    always,
    base,
    chance_of_yes,
    judged,
    never,
    new_gpt,
    row_nats,
    stretched,
    yes,
)

float64 = partial(torch.tensor, dtype=torch.float64)
few = settings(max_examples=10)


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# Part 1: the expected gradient, over 15 responses (tests/enumeration.py)

LOGITS = world.random_logits(0)
RIGHT = torch.arange(15) % 3 == 0
REWARDS = RIGHT.double()


def drawn(**options):
    """-E[∇ loss] over two answers to one problem, drawn from the policy."""

    def loss(rows, logprobs, mask):
        return rrhf_loss(logprobs, REWARDS[rows][None], mask, **options)

    return -world.expected_gradient(loss, LOGITS, 2)


@pytest.mark.parametrize("scoring, divide", [(scores, True), (summed_scores, False)])
@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_the_ranking_lifts_right_over_wrong_where_it_lacks(scoring, divide, margin):
    """2 Σ π(a) π(b) ∇(p_a − p_b) over the pairs that lack: written out over answers."""

    def objective(logits):
        nats = world.sequence_logprobs(logits)
        points = nats / world.LENGTHS if divide else nats
        chances = nats.exp().detach()
        total = torch.zeros((), dtype=torch.float64)
        for a, b in permutations(range(15), 2):
            if RIGHT[a] and not RIGHT[b] and points[b] + margin > points[a]:
                total = total + 2 * chances[a] * chances[b] * (points[a] - points[b])
        return total

    actual = drawn(sft_weight=0.0, scoring=scoring, margin=margin)
    close(actual, world.gradient(objective, LOGITS))
    assert actual.abs().max() > 0.01


def test_imitation_follows_the_first_right_answer():
    """sft_weight 1 adds, of two answers, the first right one's ∇ log π / its length."""

    def objective(logits):
        nats = world.sequence_logprobs(logits)
        chances, wrong = nats.exp().detach(), nats.exp().detach()[~RIGHT].sum()
        alone = (chances * nats / world.LENGTHS)[RIGHT].sum()
        return alone * (1 + wrong)  # it is the first, or the second after a wrong one

    actual = drawn(sft_weight=1.0) - drawn(sft_weight=0.0)
    close(actual, world.gradient(objective, LOGITS))
    assert actual.abs().max() > 0.01


def test_the_ranking_is_no_policy_gradient():
    """Once all right answers lead, it is 0, however seldom they are right."""
    logits = torch.zeros(7, 3, dtype=torch.float64)
    logits[0] = float64([0.0, 1.0, 1.0])  # a rare first step ...
    logits[[1, 3, 4]] = float64([0.0, -9.0, -9.0])  # ... and two sure ones after it
    best = world.RESPONSES.index((0, 0, 0))
    rewards = F.one_hot(torch.tensor(best), 15).double()

    def loss(rows, logprobs, mask):
        return rrhf_loss(logprobs, rewards[rows][None], mask, sft_weight=0.0)

    assert world.probabilities(logits)[best] < 0.2
    close(world.expected_gradient(loss, logits, 2), 0.0, atol=0)
    assert world.true_gradient(logits, rewards).norm() > 0.1


# Part 2: the losses

SHAPES = st.tuples(st.sampled_from([2, 4]), st.integers(1, 4))
CASES = SHAPES.flatmap(
    lambda shape: strategies.batches(
        shape=shape, logprobs=strategies.logprobs, rows=("rewards",)
    )
).map(lambda case: case | {"mask": case["mask"] | ~case["mask"].any(1, keepdim=True)})
ROWS = CASES.map(lambda case: {k: case[k] for k in ("logprobs", "mask")})
CASE = {  # means -1, -0.5, -0.3, -2; sums -3, -1, -0.3, -4
    "logprobs": float64([[-0.5, -1.5, -1.0], [-0.1, -0.9, 0.0], [-0.3, 0.0, 0.0],
                         [-1.0, -3.0, 0.0]]),
    "rewards": float64([1.0, 0.0, 0.0, 1.0]),
    "mask": torch.tensor([[True] * 3, [True, True, False], [True, False, False],
                          [True, True, False]]),
}  # fmt: skip
ROW_CASE = {k: CASE[k] for k in ("logprobs", "mask")}
PAIRED = ("scores",)


@st.composite
def groups(draw):
    shape = draw(st.tuples(st.integers(1, 3), st.integers(2, 5)))
    points = strategies.logprobs(shape) | strategies.tensors(
        shape, st.sampled_from([-2.0, -1.0, -0.5])
    )
    return {"scores": draw(points), "rewards": draw(strategies.rewards(shape))}


GROUPS = groups()
GROUP = {
    "scores": float64([[-0.9, -0.5, -1.2], [-1.0, -0.2, -0.4]]),
    "rewards": float64([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0]]),
}


def pairwise(loss):
    """(B,) rewards are B / 2 problems with two answers each."""

    def of_rows(logprobs, rewards, mask, **more):
        return loss(logprobs, rewards.view(-1, 2), mask, **more)

    return of_rows


def by_loops(points, rewards, margin=0.0):
    """The ranking loss of one problem, as the formula is read."""
    ends = permutations(range(len(points)), 2)
    worse = [(i, j) for i, j in ends if rewards[i] < rewards[j]]
    return sum(max(0.0, margin + points[i] - points[j]) for i, j in worse)


def test_golden_numbers():
    """methods.md 8: p = (-0.9, -0.5, -1.2), r = (2, 1, 0) -> 0.4."""
    points, rewards = float64([[-0.9, -0.5, -1.2]]), float64([[2.0, 1.0, 0.0]])
    close(ranking_loss(points, rewards), 0.4)
    close(ranking_loss(points, rewards, margin=0.5), 0.9 + 0.2)
    close(ranking_loss(points, rewards, count=4), 0.1)


def test_losses_by_hand():
    close(scores(**ROW_CASE), [-1.0, -0.5, -0.3, -2.0])
    close(summed_scores(**ROW_CASE), [-3.0, -1.0, -0.3, -4.0])
    leaf = CASE["logprobs"].clone().requires_grad_()
    rewards = CASE["rewards"].view(2, 2)
    close(sft_loss(leaf, rewards, CASE["mask"]), 7 / 5)  # rows 0 and 3, five tokens
    loss = rrhf_loss(leaf, rewards, CASE["mask"], sft_weight=2.0)
    close(loss, (0.5 + 1.7) / 2 + 2 * 7 / 5)
    (slope,) = torch.autograd.grad(loss, leaf)
    lift, sink = -0.5, 0.5  # per problem; over the answer's tokens; then imitation
    close(slope[0], lift / 3 - 2 / 5)
    close(slope[1], [sink / 2, sink / 2, 0.0])
    close(slope[2], [sink, 0.0, 0.0])
    close(slope[3], [lift / 2 - 2 / 5, lift / 2 - 2 / 5, 0.0])


@few
@given(GROUPS, st.sampled_from([0.0, 0.5]))
def test_ranking_against_loops(case, margin):
    """The formula, and RR-1: 0 iff the scores stand in the order of the rewards."""
    points, rewards = case["scores"].tolist(), case["rewards"].tolist()
    each = [by_loops(p, r, margin) for p, r in zip(points, rewards, strict=True)]
    actual = ranking_loss(**case, margin=margin)
    close(actual, sum(each) / len(each))
    ordered = all(
        p[i] + margin <= p[j]
        for p, r in zip(points, rewards, strict=True)
        for i, j in permutations(range(len(p)), 2)
        if r[i] < r[j]
    )
    assert (actual == 0) == ordered


@few
@given(GROUPS)
def test_the_subgradient_counts_violated_pairs(case):
    """RR-2: +1 to p_i, -1 to p_j; sums to 0; 0 at exact ties of scores."""
    _, slopes = common.value_and_gradients(ranking_loss, case, PAIRED)
    points, rewards = case["scores"].tolist(), case["rewards"].tolist()
    P = len(points)
    expected = torch.zeros_like(case["scores"])
    for n in range(P):
        for i, j in permutations(range(len(points[n])), 2):
            if rewards[n][i] < rewards[n][j] and points[n][i] > points[n][j]:
                expected[n, i] += 1
                expected[n, j] -= 1
    close(P * slopes["scores"], expected)
    close(slopes["scores"].sum(1), 0.0)


@few
@given(GROUPS, st.randoms(use_true_random=False))
def test_what_the_ranking_does_not_see(case, random):
    """RR-3: p + c, rising maps of the rewards, the order of answers; degree 1 in p."""
    points, rewards = case["scores"], case["rewards"]
    loss = ranking_loss(points, rewards)
    close(ranking_loss(points + 3.0, rewards), loss, atol=1e-9)
    for rising in (torch.exp, lambda r: 5 * r - 2, lambda r: r**3):
        close(ranking_loss(points, rising(rewards)), loss)
    order = torch.tensor(random.sample(range(points.shape[1]), points.shape[1]))
    close(ranking_loss(points[:, order], rewards[:, order]), loss)
    close(ranking_loss(2.5 * points, rewards), 2.5 * loss, atol=1e-9)


@few
@given(GROUPS)
def test_more_answers_never_lower_the_ranking_loss(case):
    """RR-4; and answers that earned the same ask for nothing."""
    fewer = {name: x[:, :-1] for name, x in case.items()}
    assert ranking_loss(**case) >= ranking_loss(**fewer) - 1e-12
    for margin in (0.0, 1.0):
        tied = {**case, "rewards": torch.full_like(case["rewards"], 0.1)}
        loss = partial(ranking_loss, margin=margin)
        value, slopes = common.value_and_gradients(loss, tied, PAIRED)
        assert value == 0 and (slopes["scores"] == 0).all()
    assert ranking_loss(case["scores"][:, :1], case["rewards"][:, :1]) == 0


@few
@given(GROUPS.filter(lambda case: case["scores"].shape[1] == 2))
def test_with_two_answers_it_is_slic_without_a_margin(case):
    """RR-5, X-5: max(0, δ − p_won + p_lost) of a pair, here with δ = 0 and δ = 1."""
    for margin in (0.0, 1.0):
        expected = []
        for (a, b), (r, s) in zip(
            case["scores"].tolist(), case["rewards"].tolist(), strict=True
        ):
            won, lost = (a, b) if r > s else (b, a)
            expected.append(max(0.0, margin - won + lost) if r != s else 0.0)
        actual = ranking_loss(**case, margin=margin)
        close(actual, sum(expected) / len(expected))


def test_kinks_and_extremes():
    """Equal scores: slope 0, the better's and the worse's. -1000 nats stay finite."""
    case = {"scores": float64([[-1.0, -1.0]]), "rewards": float64([[1.0, 0.0]])}
    value, slopes = common.value_and_gradients(ranking_loss, case, PAIRED)
    assert value == 0 and (slopes["scores"] == 0).all()
    logprobs = torch.full((2, 3), -1000.0)
    logprobs[1] = 0.0
    mask, rewards = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[1.0, 0.0]])
    case = {"logprobs": logprobs, "rewards": rewards.flatten(), "mask": mask}
    value, slopes = common.value_and_gradients(pairwise(rrhf_loss), case)
    assert value == 2000 and slopes["logprobs"].isfinite().all()


def test_one_token_is_its_own_mean():
    """T = 1: mean and sum agree."""
    row = float64([[-0.7], [-0.2]]), torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(scores(*row), summed_scores(*row))


@few
@given(strategies.groups())
def test_best_answers(rewards):
    """RR-6: one with the highest reward, the first of equals; none at 0 or less."""
    chosen = best_answers(rewards)
    for row, picks in zip(rewards.tolist(), chosen.tolist(), strict=True):
        best = row.index(max(row))
        assert picks == [i == best and row[i] > 0 for i in range(len(row))]


@few
@given(CASES)
def test_the_sft_term_knows_the_best_answer_only(case):
    """RR-6: weight 0 removes it to the bit; other answers' gradients are 0."""
    _, slopes = common.value_and_gradients(pairwise(sft_loss), case)
    chosen = best_answers(case["rewards"].view(-1, 2)).flatten()
    assert (slopes["logprobs"][~chosen] == 0).all()
    without = partial(pairwise(rrhf_loss), sft_weight=0.0)

    def ranked(logprobs, rewards, mask):
        points = scores(logprobs, mask).view(-1, 2)
        return ranking_loss(points, rewards.view(-1, 2))

    actual = common.value_and_gradients(without, case)
    expected = common.value_and_gradients(ranked, case)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1]["logprobs"], expected[1]["logprobs"])


def test_without_a_right_answer_nobody_is_imitated():
    case = {**CASE, "rewards": -CASE["rewards"]}
    value, slopes = common.value_and_gradients(pairwise(sft_loss), case)
    assert value == 0 and (slopes["logprobs"] == 0).all()


def test_scores_owe_what_every_loss_owes():
    """C-1 to C-12, row by row."""
    common.check_mask_is_inert(scores, ROWS)
    common.check_permutation(scores, ROWS)
    common.check_pure(scores, ROWS)
    common.check_dtype(scores, ROWS)
    for scoring in (scores, summed_scores):
        common.check_gradient_reaches(scoring, ROW_CASE)
        common.check_shapes_refused(scoring, ROW_CASE)


def test_the_ranking_owes_it_problem_by_problem():
    common.check_microbatches(ranking_loss, GROUPS, common.all_rows, PAIRED)
    common.check_permutation(ranking_loss, GROUPS, PAIRED)
    common.check_duplication(ranking_loss, GROUPS, PAIRED)
    common.check_no_gradient_to(ranking_loss, GROUPS, ["rewards"])
    common.check_pure(ranking_loss, GROUPS)
    common.check_dtype(ranking_loss, GROUPS, PAIRED)
    common.check_shapes_refused(ranking_loss, GROUP)


def test_the_whole_loss_owes_it():
    loss = pairwise(rrhf_loss)
    common.check_mask_is_inert(loss, CASES)
    common.check_no_gradient_to(loss, CASES, ["rewards"])
    common.check_gradient_reaches(loss, CASE)
    common.check_pure(loss, CASES)
    options = {
        "paper": {},
        "weight": {"sft_weight": 3.0},
        "margin": {"margin": 0.2},
        "sums": {"scoring": summed_scores},
    }
    losses = {name: partial(loss, **each) for name, each in options.items()}
    common.check_option_matters(losses, CASE)


@few
@given(CASES.filter(lambda case: len(case["mask"]) == 4))
def test_micro_batches_of_whole_problems_add_up(case):
    """C-4: each part divided by the batch's problems and its tokens to imitate."""
    loss = partial(pairwise(rrhf_loss), margin=0.3)
    whole = common.value_and_gradients(loss, case)
    chosen = best_answers(case["rewards"].view(-1, 2)).flatten()
    counts = 2, max(int(case["mask"][chosen].sum()), 1)
    parts = [
        common.value_and_gradients(
            partial(loss, counts=counts), common.rows_of(case, slice(i, i + 2))
        )
        for i in (0, 2)
    ]
    value = parts[0][0] + parts[1][0]
    slopes = torch.cat([part[1]["logprobs"] for part in parts])
    common.assert_same((value, {"logprobs": slopes}), whole, "parts")


def padded_width(logprobs, mask):
    """The museum's: the mask is gone when the tokens are counted."""
    return summed_scores(logprobs, mask) / mask.shape[1]


def labels_edited(logprobs, mask):
    """How that came about: the caller's mask is overwritten, in place."""
    total = summed_scores(logprobs, mask)
    mask.fill_(True)
    return total / mask.sum(1)


def sft_over_padding(logprobs, rewards, mask, count=None):
    """The museum's other one: the cross-entropy's mean has the padding's zeros in."""
    live = mask & best_answers(rewards).flatten()[:, None]
    return sft_loss(logprobs, rewards, mask) * live.sum() / live.numel()


def broadcast(scores, rewards, margin=0.0):
    """T61: without a dimension of problems every answer is a group of its own."""
    return ranking_loss(scores.reshape(-1, 3), rewards.reshape(-1, 3), margin)


def strict_at_ties(scores, rewards):
    """clamp has slope 1 at the kink, and equal rewards would make pairs here."""
    gaps = scores[:, :, None] - scores[:, None, :]
    worse = rewards[:, :, None] <= rewards[:, None, :]
    return torch.where(worse, gaps, 0.0).clamp(min=0).sum() / len(scores)


@pytest.mark.parametrize(
    "check, wrong, cases",
    [
        (common.check_mask_is_inert, padded_width, ROWS),
        (common.check_pure, labels_edited, ROWS),
        (common.check_mask_is_inert, pairwise(sft_over_padding), CASES),
        (common.check_shapes_refused, broadcast, GROUP),
    ],
)
def test_the_properties_find_the_bugs_of_the_museum(check, wrong, cases):
    assert common.refutes(check, wrong, cases)


def test_equal_rewards_would_be_noticed():
    tied = {"scores": float64([[-1.0, -2.0]]), "rewards": float64([[1.0, 1.0]])}
    assert strict_at_ties(**tied) == 1 and ranking_loss(**tied) == 0


def test_rewards_without_problems_are_refused():
    """T61: (n,) rewards once gave a loss of 0 without a word."""
    for rewards in (CASE["rewards"], CASE["rewards"][:, None], CASE["rewards"][None]):
        if rewards.shape == (1, 4) or rewards.shape == (4, 1):
            assert rrhf_loss(CASE["logprobs"], rewards, CASE["mask"]).isfinite()
        else:
            with pytest.raises(ValueError, match="rewards must be"):
                rrhf_loss(CASE["logprobs"], rewards, CASE["mask"])
    with pytest.raises(ValueError, match=r"rewards has .* \(6,\) and .* \(4,\)"):
        rrhf_loss(CASE["logprobs"], torch.ones(3, 2).double(), CASE["mask"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["scores", "rewards"])
def test_the_ranking_refuses_what_is_not_finite(name, bad):
    case = {**GROUP, name: GROUP[name].clone()}
    case[name][1, 0] = bad
    common.assert_refused(ranking_loss, case, ValueError, f"{bad}", [name])


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_strengths_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="margin: got"):
        ranking_loss(**GROUP, margin=bad)
    with pytest.raises(ValueError, match="sft_weight: got"):
        pairwise(rrhf_loss)(**CASE, sft_weight=bad)


def test_answers_without_a_token_and_impossible_log_probs_are_refused():
    mask = CASE["mask"].clone()
    mask[1] = False
    with pytest.raises(ValueError, match="mask: row 1 has no live token"):
        scores(CASE["logprobs"], mask)
    for loss in (scores, summed_scores):
        case = {**ROW_CASE, "logprobs": -ROW_CASE["logprobs"]}
        common.assert_refused(loss, case, ValueError, "above 0", ["logprobs"])
        case["logprobs"] = ROW_CASE["logprobs"] * math.nan
        common.assert_refused(loss, case, ValueError, "nan", ["logprobs"])


# Part 3: training, in a world where the answers are "y" and "no"

METHOD = METHODS["rrhf"]
CONFIG = METHOD.config
LONG = METHOD.long
run = METHOD.run


def test_the_ranking_alone_rests_where_the_order_is_right():
    """log p(y) / 2 passes log(1 - p(y)) / 3 at p(y) = 0.57: no pair is violated."""
    policy = base()
    metrics = list(run(policy, **LONG, sft_weight=0.0, lr=1e-3))
    assert metrics[0]["violated"] > 0.8 and metrics[-1]["ranking"] < 0.02
    assert 0.5 < chance_of_yes(policy) < 0.9


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_by_hand(monkeypatch, temperature):
    """Every metric from the rollout, row by row, against code of its own."""
    drawn = training.spied(monkeypatch, rrhf, "generate")
    config = replace(
        CONFIG, prompts=3, batch=3, margin=0.2, sft_weight=2.0, temperature=temperature
    )
    policy, reference = stretched(), new_gpt(3)
    twin = copy.deepcopy(policy)
    metrics = next(run(policy, config, reference=reference))

    ((_, rollout),) = drawn
    lengths = torch.tensor([len(ids) for ids in rollout.responses()])
    rewards = judged(rollout).tolist()
    nats = row_nats(twin, rollout, temperature)  # (12,)
    points, found, total, best = nats / lengths, [], 0.0, []
    for first in (0, 4, 8):
        group = range(first, first + 4)
        right = [i for i in group if rewards[i]]
        for a, b in ((a, b) for a in right for b in group if not rewards[b]):
            found.append((points[b] > points[a]).item())
            total = total + torch.relu(0.2 + points[b] - points[a]) / 3
        best += right[:1]
    sft = -nats[best].sum() / lengths[best].sum()
    loss = total + 2 * sft
    right = torch.tensor(rewards) > 0  # (12,)
    rows = right.view(3, 4).tolist()
    expected = {
        "round": 1,
        "completions": 12,
        "loss": loss.item(),
        "ranking": total.item(),
        "sft": sft.item(),
        "grad_norm": training.gradient_norm(loss, twin),
        "kl": sum(training.row_kl(twin, reference, rollout, temperature)) / 12,
        "violated": sum(found) / len(found),
        "tied": sum(len(set(row)) == 1 for row in rows) / 3,
        "unanswered": sum(not any(row) for row in rows) / 3,
        "score_right": points[right].mean().item(),
        "score_wrong": points[~right].mean().item(),
    }
    training.assert_metrics(metrics, rollout, expected)
    assert metrics["kl"] > 0 and found


def test_ties_and_unanswered_problems_are_counted():
    """All right: imitation alone is left. All wrong: nothing is, and nothing moves."""
    policy = base()
    config = replace(CONFIG, max_new_tokens=9)
    metrics = list(run(policy, config, always))
    assert {row["tied"] for row in metrics} == {1} and metrics[0]["sft"] > 0
    assert {row["violated"] for row in metrics} == {0}
    assert {row["unanswered"] for row in metrics} == {0}
    before = copy.deepcopy(dict(policy.state_dict()))
    metrics = list(run(policy, reward=never))
    assert {row["unanswered"] for row in metrics} == {1}
    assert {row["loss"] for row in metrics} == {row["grad_norm"] for row in metrics}
    assert metrics[0]["loss"] == 0 and metrics[0]["score_right"] == 0
    training.assert_same_bits(dict(policy.state_dict()), before)


def test_problems_are_asked_in_order_and_every_batch_is_learnt_from(monkeypatch):
    asked, learnt = [], []

    def spy(problems, texts):
        asked.append("".join(problem.question for problem in problems))
        return yes(problems, texts)

    drawn = training.spied(monkeypatch, sampling, "generate")  # of each chunk
    state, metrics = {}, []
    config = replace(CONFIG, samples=2, updates=4)
    for row in run(base(), config, spy, state=state):
        metrics.append(row)
        learnt.append(len(state["order"]))
    assert asked == ["aabb" + "ccdd", "eeaa" + "bbcc"]
    assert [len(rollout.mask) for _, rollout in drawn] == [4] * 4  # `batch` at a time
    assert learnt == [1, 0, 1, 0] * 2  # two batches, twice each, in both rounds
    assert [row["completions"] for row in metrics] == [8] * 4 + [16] * 4
    assert [row["update"] for row in metrics] == list(range(1, 9))
    assert [row["round"] for row in metrics] == [1] * 4 + [2] * 4
    rewards = [row["reward"] for row in metrics]
    assert len(set(rewards[:4])) == 1


def test_a_round_takes_its_answers_from_the_policy_of_its_start(monkeypatch):
    """Own answers, iterated: the second round's come from a policy that has learnt."""
    drawn = training.spied(monkeypatch, rrhf, "generate")
    metrics = list(run(base(), **LONG | {"updates": 5}))
    assert len(drawn) == 2
    share = [judged(rollout).mean().item() for _, rollout in drawn]
    assert share == pytest.approx([metrics[0]["reward"], metrics[-1]["reward"]])
    assert share[1] > share[0] + 0.2


def test_given_answers_are_learnt_from_and_nothing_is_drawn(monkeypatch):
    """The paper's first strategy: answers from elsewhere, drawn once, as many to a
    problem as there are, whatever config.samples says."""
    state = {}
    list(run(base(), replace(CONFIG, rounds=1, updates=1), state=state))
    given = rrhf.Rollout(**state["rollout"]), state["rewards"]

    monkeypatch.setattr(rrhf, "generate", None)
    policy = base()
    sizes = LONG | {"updates": 10, "batch": 2, "samples": 1}
    metrics = list(run(policy, problems=[], given=given, **sizes))
    assert chance_of_yes(policy) > 0.9 and len(metrics) == 20
    assert {row["completions"] for row in metrics} == {0}
    assert "reward" not in metrics[0] and metrics[0]["violated"] > 0.5
