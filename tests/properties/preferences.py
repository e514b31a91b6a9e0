"""What learning from comparisons owes: DPO, reward models and RRHF."""

import math
from dataclasses import replace
from functools import partial
from itertools import permutations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from minialign.algorithms import rrhf
from minialign.algorithms.reward_model import Ranking
from minialign.rewards import RewardModel
from tests import enumeration as world
from tests import strategies
from tests.properties import common
from tests.properties.common import close, float64
from tests.toy import PROBLEMS, TOKENIZER, base, generator

# What is drawn where all answers can be written out (tests/enumeration.py)

LOGITS = world.random_logits(0)
RIGHT = torch.arange(15) % 3 == 0  # a verdict on each response


def ascent(loss):
    """(7, 3): what two draws of the policy move it along, in expectation."""
    return -world.expected_gradient(loss, LOGITS, 2)


# dpo

OWN = ("chosen_logprobs", "rejected_logprobs")
REF = ("ref_chosen_logprobs", "ref_rejected_logprobs")
FOUR = (*OWN, *REF)
BETAS = st.sampled_from([0.1, 0.5, 3.0])
PAIRS = st.integers(1, 4).flatmap(
    lambda size: st.fixed_dictionaries(
        {name: strategies.logprobs((size,)) for name in FOUR}
    )
)
MARGINS = strategies.tensors((3,)).map(lambda h: {"h": h})
BINARY = strategies.groups(elements=st.sampled_from([0.0, 1.0]))
GRADED = strategies.groups()


def at(h, beta, loss):
    """(value, slopes in the policy's two) where one pair has the margin h."""
    zero = float64([-20000.0])
    case = dict.fromkeys(FOUR, zero)
    case["chosen_logprobs"] = zero + max(h, 0.0)
    case["rejected_logprobs"] = zero + max(-h, 0.0)
    value, slopes = common.value_and_gradients(partial(loss, beta=beta), case, OWN)
    return value.item(), [slopes[name].item() for name in OWN]


def surprise(x):
    """log(1 + e^-x), of any x."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def verdicts(loss, ref_logits, beta):
    """A loss of two draws, the right one preferred; equal verdicts say nothing."""
    reference = world.sequence_logprobs(ref_logits)

    def of_draws(rows, logprobs, mask):
        if RIGHT[rows[0]] == RIGHT[rows[1]]:
            return torch.zeros(())
        order = RIGHT[rows].int().argsort(descending=True)
        own, ref = logprobs.sum(1)[order], reference[rows][order]
        case = dict(zip(FOUR, (*own.split(1), *ref.split(1)), strict=True))
        return loss(**case, beta=beta)

    return of_draws


def nats(model, prompt, answer, temperature=1.0):
    """log π(answer | prompt) alone, without padding, by cross-entropy."""
    ids = torch.tensor([*prompt, *answer])
    logits = model.logits(model(ids[None, :-1]))[0, len(prompt) - 1 :] / temperature
    return -F.cross_entropy(logits, ids[len(prompt) :], reduction="sum")


def pair(question, chosen, rejected):
    both = map(TOKENIZER.encode_response, (chosen, rejected))
    return TOKENIZER.encode_prompt(question), *both


def check_starts_as_a_policy_gradient(loss) -> None:
    """At the reference own pairs, told right from wrong, give β ∇ E[right].

    Of two draws, RLOO's advantages are ± their difference in reward, and half the sum
    of A ∇ log π is unbiased.
    """
    expected = world.true_gradient(LOGITS, RIGHT.double())
    assert expected.norm() > 0.1
    for beta in (0.1, 1.5):
        close(ascent(verdicts(loss, LOGITS, beta)), beta * expected)


def check_at_the_reference(loss) -> None:
    """Log 2, whatever the answers; -beta/2 and beta/2."""

    @common.forall(st.tuples(PAIRS, BETAS), examples=10)
    def holds(drawn):
        case, beta = drawn
        start = {OWN[0]: case[REF[0]], OWN[1]: case[REF[1]]}
        owed = partial(loss, beta=beta)
        value, slopes = common.value_and_gradients(owed, case | start, OWN)
        size = common.all_rows(case)
        close(value, math.log(2))
        close(slopes[OWN[0]], -beta / 2 / size)
        close(slopes[OWN[1]], beta / 2 / size)

    holds()


def check_slope_anywhere(loss) -> None:
    """-beta σ(-beta h) for the chosen answer, always downhill."""
    for h in (-3.0, -0.4, 0.0, 1.0, 2.5):
        for beta in (0.1, 0.5, 2.0):
            value, (chosen, rejected) = at(h, beta, loss)
            assert math.isclose(value, surprise(beta * h))
            assert math.isclose(chosen, -beta / (1 + math.exp(beta * h)))
            assert rejected == -chosen > 0


def check_only_the_margin_counts(loss) -> None:
    """Numbers added to the policy's two, to the reference's two, or to both
    log-probs of one answer change nothing. Below 0, for the policy's own chosen answer
    and for the reference's rejected one, they make it dearer."""
    shifts = st.sampled_from([-2.5, -0.5])

    @common.forall(st.tuples(PAIRS, BETAS, shifts), examples=10)
    def holds(drawn):
        case, beta, shift = drawn
        c = shift * torch.arange(1, 1 + common.all_rows(case))  # of each pair another
        value = loss(**case, beta=beta)
        for names in (OWN, REF, (OWN[0], REF[0]), (OWN[1], REF[1])):
            moved = case | {name: case[name] + c for name in names}
            close(loss(**moved, beta=beta), value)
        moved = case | {name: case[name] + c for name in (OWN[0], REF[1])}
        assert loss(**moved, beta=beta) > value

    holds()


def check_beta_scales_the_margin(loss) -> None:
    """L(beta, h) = L(1, beta h)."""

    @common.forall(st.tuples(PAIRS, BETAS), examples=10)
    def holds(drawn):
        case, beta = drawn
        scaled = {name: beta * x for name, x in case.items()}
        close(loss(**case, beta=beta), loss(**scaled, beta=1.0))

    holds()


def check_a_swap_adds_beta_h(loss) -> None:
    """L(-h) - L(h) = beta h."""

    @common.forall(st.tuples(PAIRS, BETAS), examples=10)
    def holds(drawn):
        case, beta = drawn
        chosen, rejected, ref_chosen, ref_rejected = (case[name] for name in FOUR)
        h = chosen - ref_chosen - rejected + ref_rejected
        turned = (rejected, chosen, ref_rejected, ref_chosen)
        swapped = dict(zip(FOUR, turned, strict=True))
        gap = loss(**swapped, beta=beta) - loss(**case, beta=beta)
        close(gap, beta * h.mean())

    holds()


def check_margins_of_any_size(loss) -> None:
    """Pairs told apart by 10,000 nats, or mistaken by as much, cost max(0, -h),
    with slopes that are finite."""
    for h in (-1e4, -1000.0, 1000.0, 1e4):
        value, slopes = at(h, 1.0, loss)
        assert math.isclose(value, max(-h, 0.0), abs_tol=1e-9), f"{value} at h = {h}"
        assert all(map(math.isfinite, slopes)), f"slopes {slopes} at h = {h}"


def check_any_margin(shape) -> None:
    """Finite, where -log(sigmoid(x)) would be inf; and log(1 + e^-beta h)."""
    for h in (-1e4, -1000.0, 1000.0, 1e4):
        leaf = float64(h).requires_grad_()
        value = shape(leaf, 1.0)
        assert math.isclose(value.item(), max(-h, 0.0), abs_tol=1e-9)
        assert torch.autograd.grad(value, leaf)[0].isfinite()


def check_smoothing_adds_a_line(shape) -> None:
    """cDPO-1: L_e(h) = L(h) + e beta h, for any h; e = 0 is DPO."""
    for h in (-1e4, -20.0, -0.5, 0.0, 3.0, 1e4):
        for beta, e in ((0.1, 0.3), (1.0, 0.3), (1.0, 0.0)):
            expected = surprise(beta * h) + e * beta * h
            close(shape(float64(h), beta, smoothing=e), expected)


def check_lowest_point(shape) -> None:
    """cDPO-2: at beta h = log((1 - e) / e), where the loss is the entropy of e."""
    for e in (0.05, 0.3):
        h = math.log((1 - e) / e) / 0.5
        leaf = float64(h).requires_grad_()
        lowest = shape(leaf, 0.5, smoothing=e)
        close(lowest, -e * math.log(e) - (1 - e) * math.log(1 - e))
        close(torch.autograd.grad(lowest, leaf)[0], 0.0)
        for other in (h - 0.5, h + 0.5):
            assert shape(float64(other), 0.5, smoothing=e) > lowest


def check_flips_cancel(shape) -> None:
    """rDPO-1: over labels of which a share e is turned by lot, the mean is DPO's loss
    of the true one; e = 0 is DPO."""
    for h in (-1e4, -20.0, -0.5, 0.0, 3.0, 1e4):
        for beta, e in ((0.1, 0.3), (1.0, 0.45), (1.0, 0.0)):
            as_it_is = shape(float64(h), beta, flipped=e)
            turned = shape(float64(-h), beta, flipped=e)
            close((1 - e) * as_it_is + e * turned, surprise(beta * h))


def check_never_content(shape) -> None:
    """Where pairs are told apart already the slope is still -e beta / (1 - 2e), and so
    the loss goes below 0 and has no lowest value."""
    for e in (0.1, 0.4):
        slope = -e * 0.5 / (1 - 2 * e)
        leaf = float64(1000.0).requires_grad_()
        value = shape(leaf, 0.5, flipped=e)
        close(value, 1000.0 * slope)
        close(torch.autograd.grad(value, leaf)[0], slope)


def check_finite_goal(shape) -> None:
    """IPO-1: 0 at h = 1 / (2 beta); at the reference 1 / (4 beta²) and slope -1 / beta;
    as far beyond the goal it pulls back as hard."""
    for beta in (0.1, 0.5, 2.0):
        goal = 1 / (2 * beta)
        close(shape(float64(goal), beta), 0.0)
        for h, slope in ((0.0, -1 / beta), (2 * goal, 1 / beta)):
            leaf = float64(h).requires_grad_()
            value = shape(leaf, beta)
            close(value, goal**2)
            close(torch.autograd.grad(value, leaf)[0], slope)


def check_sums_over_answers(pair_logprobs) -> None:
    """Of each answer alone, EOS included, the prompt not."""
    policy = base()
    named = [("a", "y", "no"), ("long one", "noo", "y"), ("c", "", "n")]
    pairs = [pair(*each) for each in named]
    for temperature in (1.0, 0.7):
        actual = pair_logprobs(policy, pairs, TOKENIZER.pad_id, temperature)
        for row, (prompt, *both) in zip(actual, pairs, strict=True):
            expected = [nats(policy, prompt, x, temperature) for x in both]
            close(row, torch.stack(expected), atol=1e-5)


def check_means_over_answers(mean_pair_logprobs) -> None:
    """Of each answer alone, by the number of its tokens, EOS among them."""
    policy = base()
    named = [("a", "y", "no"), ("long one", "noo", "y"), ("c", "", "n")]
    pairs = [pair(*each) for each in named]
    actual = mean_pair_logprobs(policy, pairs, TOKENIZER.pad_id, 0.7)
    for row, (prompt, *both) in zip(actual, pairs, strict=True):
        expected = [nats(policy, prompt, x, 0.7) / len(x) for x in both]
        close(row, torch.stack(expected), atol=1e-5)


def check_pairs_are_told_apart(make_pairs) -> None:
    """Disjoint, within a problem, better before worse; 0/1 rewards use all there is,
    and of graded ones the widest gap is among them."""
    groups = BINARY | GRADED

    @common.forall(st.tuples(groups, st.integers(1, 4), st.integers(0, 5)))
    def holds(drawn):
        rewards, most, seed = drawn
        K, flat = rewards.shape[1], rewards.flatten().tolist()
        pairs = make_pairs(rewards, most, generator(seed)).tolist()
        rows = [row for pair in pairs for row in pair]
        assert len(set(rows)) == len(rows)
        for better, worse in pairs:
            assert better // K == worse // K and flat[better] > flat[worse]
        for p, group in enumerate(rewards.tolist()):
            mine = [pair for pair in pairs if pair[0] // K == p]
            assert bool(mine) == (max(group) > min(group))
            if set(group) <= {0.0, 1.0}:
                right = int(sum(group))
                assert len(mine) == min(right, K - right, most)
            elif mine:
                widest = max(flat[better] - flat[worse] for better, worse in mine)
                assert widest == max(group) - min(group)

    holds()


def check_pairs_by_lot(make_pairs) -> None:
    """Every right answer with every wrong one; the generator alone decides."""
    rewards = float64([[1, 0, 0, 1], [0, 0, 0, 0]])

    def drawn():
        return [make_pairs(rewards, 1, generator(seed)).tolist() for seed in range(60)]

    first = drawn()
    found = {tuple(pair) for pairs in first for pair in pairs}
    assert found == {(0, 1), (0, 2), (3, 1), (3, 2)}
    assert drawn() == first


# reward_model

SCORES = ("chosen", "rejected")
NUMBERS = st.integers(1, 4).flatmap(
    lambda size: st.fixed_dictionaries(
        {name: strategies.tensors((size,)) for name in SCORES}
    )
)


def of_gap(loss, d, **options):
    """(value, slopes in both numbers) of one pair that is d apart."""
    case = {"chosen": float64([d + 0.25]), "rejected": float64([0.25])}
    owed = partial(loss, **options)
    value, slopes = common.value_and_gradients(owed, case, SCORES)
    return value.item(), [slopes[name].item() for name in SCORES]


def same(actual: float, expected: float) -> None:
    assert math.isclose(actual, expected, abs_tol=1e-10), f"{actual}, not {expected}"


def check_a_tie(loss) -> None:
    """BT-2: log 2, and half a step for each."""
    value, slopes = of_gap(loss, 0.0)
    same(value, math.log(2))
    assert slopes == [-0.5, 0.5]


def check_only_differences_count(loss) -> None:
    """BT-1: a number added to both changes nothing; added to the better one, it is
    cheaper."""

    @common.forall(NUMBERS, examples=10)
    def holds(case):
        value = loss(**case)
        moved = {name: x + 3.5 for name, x in case.items()}
        close(loss(**moved), value)
        assert loss(case["chosen"] + 0.5, case["rejected"]) < value

    holds()


def check_pull_of_a_pair(loss) -> None:
    """-σ(-d) for the better answer, its opposite for the other, always downhill."""
    for d in (-4.0, -0.3, 0.7, 5.0):
        value, (better, worse) = of_gap(loss, d)
        same(value, surprise(d))
        same(better, -1 / (1 + math.exp(d)))
        assert worse == -better > 0


def check_a_margin_is_a_head_start(loss) -> None:
    """BT-5: L(d; m) = L(d - m; 0)."""
    for d in (-2.0, 0.0, 1.5):
        for margin in (0.2, 1.0):
            same(of_gap(loss, d, margin=margin)[0], surprise(d - margin))


def check_a_swap_costs_the_gap(loss) -> None:
    """BT-3: L(l, w) - L(w, l) = w - l."""

    @common.forall(NUMBERS, examples=10)
    def holds(case):
        chosen, rejected = case["chosen"], case["rejected"]
        gap = loss(rejected, chosen) - loss(chosen, rejected)
        close(gap, (chosen - rejected).mean())

    holds()


def check_lowest_where_people_are(loss) -> None:
    """BT-8: where labels are right with chance p, at σ(d) = p; the entropy of p."""
    for p in (0.5, 0.7, 0.95):
        d = math.log(p / (1 - p))
        value, slopes = of_gap(loss, d, label=p)
        same(value, -p * math.log(p) - (1 - p) * math.log(1 - p))
        same(slopes[0], 0.0)
        for other in (d - 0.5, d + 0.5):
            assert of_gap(loss, other, label=p)[0] > value


def check_gaps_of_any_size(loss) -> None:
    """BT-6: max(0, -d), with slopes that are finite."""
    for d in (-1e4, -1000.0, 1000.0, 1e4):
        value, slopes = of_gap(loss, d)
        assert math.isclose(value, max(-d, 0.0), abs_tol=1e-9), f"{value} at d = {d}"
        assert all(map(math.isfinite, slopes)), f"slopes {slopes} at d = {d}"


def check_weights_count(loss) -> None:
    """Two pairs of weight a half are one; a pair of weight 0 is none."""
    one = float64([0.4]), float64([-0.1])
    two = float64([0.4, 0.4]), float64([-0.1, -0.1])
    close(loss(*two, weights=float64([0.5, 0.5]), count=1), loss(*one))
    close(loss(*two, weights=float64([0.0, 1.0]), count=1), loss(*one))


def answers(*texts):
    return [TOKENIZER.encode_response(text) for text in texts]


RANKINGS = [
    Ranking(TOKENIZER.encode_prompt("a"), answers("y", "no", "maybe")),
    Ranking(TOKENIZER.encode_prompt("bc"), answers("no", "no")),
    Ranking(TOKENIZER.encode_prompt("d"), answers("n", "y", "n", "")),
    Ranking(TOKENIZER.encode_prompt("e"), answers("yes", "y")),
]


def check_best_first(rankings_of) -> None:
    """The prompt of each problem, and its answers in the order of its row."""
    texts = [("y", "no", "maybe"), ("n", "yes", "")]
    orders = torch.tensor([[2, 0, 1], [1, 2, 0]])
    first, second = rankings_of(PROBLEMS[:2], texts, orders, TOKENIZER)
    assert first.prompt == TOKENIZER.encode_prompt(PROBLEMS[0].question)
    assert second.prompt == TOKENIZER.encode_prompt(PROBLEMS[1].question)
    assert first.answers == answers("maybe", "y", "no")
    assert second.answers == answers("yes", "", "n")


def check_pairs_of_rankings(pairs_of) -> None:
    """All pairs of each, the better one first, but none of two that are the same."""
    rows, _, _, identical = pairs_of(RANKINGS)
    first = [[0, 1], [0, 2], [1, 2]]
    third = [[5, 6], [5, 8], [6, 7], [6, 8], [7, 8]]
    assert rows.tolist() == first + third + [[9, 10]]
    assert identical == 2


def check_a_ranking_counts_once(pairs_of) -> None:
    """Whatever the number of its pairs; without any, it counts nothing."""
    _, weights, _, _ = pairs_of(RANKINGS)
    close(weights, torch.tensor([1 / 3] * 3 + [1 / 5] * 5 + [1.0]))


def check_a_label_is_of_its_ranking(pairs_of) -> None:
    """Every pair of a ranking is as sure as the ranking."""
    doubtful = [replace(RANKINGS[0], label=0.6), RANKINGS[3]]
    _, _, labels, _ = pairs_of(doubtful)
    close(labels, torch.tensor([0.6] * 3 + [1.0]))


def check_each_pair_has_its_label(loss) -> None:
    """A label of 0 is that of the pair the other way round, whatever its neighbours."""
    chosen, rejected = float64([0.4, 2.0]), float64([-0.1, 0.5])
    turned = loss(float64([0.4, 0.5]), float64([-0.1, 2.0]))
    close(loss(chosen, rejected, label=float64([1.0, 0.0])), turned)
    half = loss(chosen, rejected, label=float64([1.0, 0.5]))
    close(half, (loss(chosen, rejected) + turned) / 2)


def opinionated() -> RewardModel:
    """A reward model whose head says something."""
    model = RewardModel(base())
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.head.weight.normal_(generator=draw)
    return model


def check_read_one_by_one(read_rankings) -> None:
    """The head at EOS, of each answer alone."""
    model = opinionated()
    numbers = read_rankings(model, RANKINGS, TOKENIZER.pad_id)
    expected = []
    for ranking in RANKINGS:
        for answer in ranking.answers:
            ids = torch.tensor([[*ranking.prompt, *answer]])
            expected.append(model.head(model.body(ids))[0, -1])
    close(numbers, torch.stack(expected), atol=1e-5)


# rrhf

RANKED_BY = ("mean_logprobs",)
ANSWERS = {  # two to each of two problems; means -1, -0.5, -0.3, -2 nats a token
    "logprobs": float64(
        [[-0.5, -1.5, -1.0], [-0.1, -0.9, 0.0], [-0.3, 0.0, 0.0], [-1.0, -3.0, 0.0]]
    ),
    "rewards": float64([1.0, 0.0, 0.0, 1.0]),
    "mask": torch.tensor(
        [[True] * 3, [True, True, False], [True, False, False], [True, True, False]]
    ),
}
RANKS = {
    "mean_logprobs": float64([[-0.9, -0.5, -1.2], [-1.0, -0.2, -0.4]]),
    "rewards": float64([[2.0, 1.0, 0.0], [0.0, 1.0, 1.0]]),
}
JUDGED = (
    st.tuples(st.sampled_from([2, 4]), st.integers(1, 4))
    .flatmap(
        lambda shape: strategies.batches(
            shape=shape, logprobs=strategies.logprobs, rows=("rewards",)
        )
    )
    .map(strategies.without_dead_rows)
)
ROWS = JUDGED.map(lambda case: {k: case[k] for k in ("logprobs", "mask")})


@st.composite
def ranked(draw):
    """Scores and rewards of a few problems; both tie often."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(2, 5)))
    points = strategies.logprobs(shape) | strategies.tensors(
        shape, st.sampled_from([-2.0, -1.0, -0.5])
    )
    return {"mean_logprobs": draw(points), "rewards": draw(strategies.rewards(shape))}


RANKED = ranked()


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


def check_mean_per_token(mean_logprobs) -> None:
    """By hand; and columns of padding do not count."""
    call = common.copied(ANSWERS)
    close(mean_logprobs(call["logprobs"], call["mask"]), [-1.0, -0.5, -0.3, -2.0])
    common.check_mask_is_inert(mean_logprobs, ROWS)


def check_ranking(loss) -> None:
    """The sum over pairs of unequal rewards, as the formula is read."""

    @common.forall(st.tuples(RANKED, st.sampled_from([0.0, 0.5])))
    def holds(drawn):
        case, margin = drawn
        both = zip(
            case["mean_logprobs"].tolist(), case["rewards"].tolist(), strict=True
        )
        each = [by_loops(p, r, margin) for p, r in both]
        close(loss(**case, margin=margin), sum(each) / len(each))

    holds()


def check_violated_pairs(loss) -> None:
    """+1 to p_i, -1 to p_j; 0 at exact ties."""

    @common.forall(RANKED)
    def holds(case):
        _, slopes = common.value_and_gradients(loss, case, RANKED_BY)
        points, rewards = case["mean_logprobs"].tolist(), case["rewards"].tolist()
        expected = torch.zeros_like(case["mean_logprobs"])
        for n in range(len(points)):
            for i, j in permutations(range(len(points[n])), 2):
                if rewards[n][i] < rewards[n][j] and points[n][i] > points[n][j]:
                    expected[n, i] += 1
                    expected[n, j] -= 1
        close(len(points) * slopes["mean_logprobs"], expected)

    holds()


def check_what_ranking_does_not_see(loss) -> None:
    """P + c, rising maps of the rewards, the order of answers; degree 1 in p."""

    @common.forall(RANKED, examples=15)
    def holds(case):
        points, rewards = case["mean_logprobs"], case["rewards"]
        value = loss(mean_logprobs=points, rewards=rewards)
        close(loss(mean_logprobs=points + 3.0, rewards=rewards), value, atol=1e-9)
        for risen in (rewards.exp(), 5 * rewards - 2, rewards**3):
            close(loss(mean_logprobs=points, rewards=risen), value)
        close(loss(mean_logprobs=points.roll(1, 1), rewards=rewards.roll(1, 1)), value)
        close(loss(mean_logprobs=2.5 * points, rewards=rewards), 2.5 * value, atol=1e-9)

    holds()


def check_more_answers_cost_no_less(loss) -> None:
    """The loss is a sum over pairs, not their mean."""

    @common.forall(RANKED, examples=20)
    def holds(case):
        fewer = {name: x[:, :-1] for name, x in case.items()}
        assert loss(**case) >= loss(**fewer) - 1e-12

    holds()


def check_ties_ask_for_nothing(loss) -> None:
    """Answers that earned the same ask for nothing, whatever the margin."""
    for margin in (0.0, 1.0):
        tied = {**RANKS, "rewards": torch.full((2, 3), 0.1).double()}
        value, slopes = common.value_and_gradients(
            partial(loss, margin=margin), tied, RANKED_BY
        )
        assert value == 0 and (slopes["mean_logprobs"] == 0).all()


def check_first_of_the_best(best_answers) -> None:
    """One with the highest reward, of equals the first; none at 0 or less."""

    @common.forall(BINARY | GRADED, examples=20)
    def holds(rewards):
        chosen = best_answers(rewards).tolist()
        for row, picks in zip(rewards.tolist(), chosen, strict=True):
            best = row.index(max(row))
            assert picks == [i == best and row[i] > 0 for i in range(len(row))]

    holds()


def check_imitation(loss) -> None:
    """The tokens of the best answers, each alike, and nothing of any other slot;
    where nothing is right, nothing."""
    mask, rewards = ANSWERS["mask"], ANSWERS["rewards"].view(2, 2)
    best = (mask & (ANSWERS["rewards"] > 0)[:, None]).double()
    for paid, value, slope in ((rewards, 7 / 5, -1 / 5), (-rewards, 0.0, 0.0)):
        leaf = ANSWERS["logprobs"].clone().requires_grad_()
        cost = loss(leaf, paid, mask)
        close(cost, value)
        close(torch.autograd.grad(cost, leaf)[0], slope * best)
    common.check_mask_is_inert(pairwise(loss), JUDGED)


def drawn_twice(loss, **options):
    """A loss of two draws as answers to one problem."""

    def of_draws(rows, logprobs, mask):
        rewards = RIGHT[rows][None].double()
        return loss(logprobs=logprobs, rewards=rewards, mask=mask, **options)

    return of_draws


def lacking(logits, divisor, margin):
    """2 Σ π(a) π(b) (p_a - p_b) over the right a and wrong b that it hardly leads."""
    sums = world.sequence_logprobs(logits)
    points, chances = sums / divisor, sums.exp().detach()
    leads = points[:, None] - points  # (15, 15)
    pairs = RIGHT[:, None] & ~RIGHT & (leads < margin)
    return 2 * (chances[:, None] * chances * leads)[pairs].sum()


def check_lifts_right_over_wrong(loss) -> None:
    """Of two draws, in expectation, the ranking lifts each right answer over each wrong
    one that it does not lead by the margin, as often as the two are drawn together."""
    for likelihood, divisor in (
        (rrhf.mean_logprobs, world.LENGTHS),
        (rrhf.summed_logprobs, 1),
    ):
        for margin in (0.0, 0.4):
            whole = partial(lacking, divisor=divisor, margin=margin)
            terms = {"sft_weight": 0.0, "likelihood": likelihood, "margin": margin}
            actual = ascent(drawn_twice(loss, **terms))
            close(actual, world.gradient(whole, LOGITS))
            assert actual.norm() > 0.01


def check_imitates_the_first_right_answer(loss) -> None:
    """What sft_weight adds: of two draws the log-probability of the first right one,
    per token."""

    def imitated(logits):
        sums = world.sequence_logprobs(logits)
        chances = sums.exp().detach()
        once = (chances * sums / world.LENGTHS)[RIGHT].sum()
        return once * (1 + chances[~RIGHT].sum())  # the first, or second to a wrong one

    both, ranked = (ascent(drawn_twice(loss, sft_weight=w)) for w in (2.0, 0.0))
    close(both - ranked, 2 * world.gradient(imitated, LOGITS))


def check_parts_of_whole_problems(loss) -> None:
    """Each part divided by the batch's problems and by its tokens to imitate."""
    four_answers = JUDGED.filter(lambda case: len(case["mask"]) == 4)

    @common.forall(four_answers, examples=15)
    def holds(case):
        of_rows = partial(pairwise(loss), margin=0.3)
        whole = common.value_and_gradients(of_rows, case)
        best = rrhf.best_answers(case["rewards"].view(-1, 2)).flatten()
        counts = 2, max(int(case["mask"][best].sum()), 1)
        value, slopes = torch.zeros(()), []
        for i in (0, 2):
            counted = partial(of_rows, counts=counts)
            part = common.rows_of(case, slice(i, i + 2))
            part_value, part_slopes = common.value_and_gradients(counted, part)
            value = value + part_value
            slopes.append(part_slopes["logprobs"])
        common.assert_same((value, {"logprobs": torch.cat(slopes)}), whole, "parts")

    holds()
