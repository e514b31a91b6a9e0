"""What learning from comparisons owes: DPO, RRHF, and the selections of the best."""

import math
from functools import partial
from itertools import permutations

import torch
from hypothesis import strategies as st

from tests import strategies, test_dpo, test_rejection_sampling, test_rrhf
from tests.properties import common
from tests.toy import TOKENIZER, base, generator

float64 = partial(torch.tensor, dtype=torch.float64)
OWN, REF = test_dpo.OWN, test_dpo.REF
BETAS = st.sampled_from([0.1, 0.5, 3.0])


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# dpo


def check_at_the_reference(loss) -> None:
    """DPO-1, DPO-2: log 2, whatever the answers; -beta/2 and beta/2."""

    @common.forall(st.tuples(test_dpo.CASES, BETAS), examples=10)
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
    """DPO-2, DPO-7: -beta σ(-beta h) for the chosen answer, always downhill."""
    for h in (-3.0, -0.4, 0.0, 1.0, 2.5):
        for beta in (0.1, 0.5, 2.0):
            value, (chosen, rejected) = test_dpo.at(h, beta, loss)
            assert math.isclose(value, math.log1p(math.exp(-beta * h)))
            assert math.isclose(chosen, -beta / (1 + math.exp(beta * h)))
            assert rejected == -chosen > 0


def check_any_margin(shape) -> None:
    """DPO-8: finite, where -log(sigmoid(x)) would be inf; and log(1 + e^-beta h)."""
    for h in (-1e4, -1000.0, 1000.0, 1e4):
        leaf = float64(h).requires_grad_()
        value = shape(leaf, 1.0)
        assert math.isclose(value.item(), max(-h, 0.0), abs_tol=1e-9)
        assert torch.autograd.grad(value, leaf)[0].isfinite()


def check_smoothing_adds_a_line(shape) -> None:
    """cDPO-1: L_e(h) = L(h) + e beta h; e = 0 is DPO."""
    for h in (-20.0, -0.5, 0.0, 3.0):
        for beta, e in ((0.1, 0.3), (1.0, 0.3), (1.0, 0.0)):
            expected = math.log1p(math.exp(-beta * h)) + e * beta * h
            close(shape(float64(h), beta, smoothing=e), expected)


def check_finite_goal(shape) -> None:
    """IPO-1: 0 at h = 1 / (2 beta); at the reference 1 / (4 beta²), slope -1 / beta."""
    for beta in (0.1, 0.5, 2.0):
        leaf = float64(0.0).requires_grad_()
        value = shape(leaf, beta)
        assert math.isclose(value.item(), 1 / (4 * beta**2))
        assert math.isclose(torch.autograd.grad(value, leaf)[0].item(), -1 / beta)
        close(shape(float64(1 / (2 * beta)), beta), 0.0)


def check_sums_over_answers(pair_logprobs) -> None:
    """T45: of each answer alone, EOS included, the prompt not."""
    policy = base()
    named = [("a", "y", "no"), ("long one", "noo", "y"), ("c", "", "n")]
    pairs = [test_dpo.pair(*each) for each in named]
    for temperature in (1.0, 0.7):
        actual = pair_logprobs(policy, pairs, TOKENIZER.pad_id, temperature)
        for row, (prompt, *both) in zip(actual, pairs, strict=True):
            expected = [test_dpo.nats(policy, prompt, x, temperature) for x in both]
            close(row, torch.stack(expected), atol=1e-5)


def check_pairs_are_told_apart(make_pairs) -> None:
    """Disjoint, within a problem, better before worse; 0/1 rewards use all there is."""
    groups = test_dpo.GROUPS | test_dpo.GRADED

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

    holds()


def check_pairs_by_lot(make_pairs) -> None:
    """Every right answer with every wrong one; the generator alone decides."""
    rewards = float64([[1, 0, 0, 1], [0, 0, 0, 0]])
    drawn = [make_pairs(rewards, 1, generator(seed)).tolist() for seed in range(60)]
    found = {tuple(pair) for pairs in drawn for pair in pairs}
    assert found == {(0, 1), (0, 2), (3, 1), (3, 2)}


# rrhf


def check_mean_per_token(scores) -> None:
    """LP-3, by hand; and columns of padding do not count."""
    close(scores(**test_rrhf.ROW_CASE), [-1.0, -0.5, -0.3, -2.0])
    common.check_mask_is_inert(scores, test_rrhf.ROWS)


def check_ranking(loss) -> None:
    """RR-1: the sum over pairs of unequal rewards, as the formula is read."""

    @common.forall(st.tuples(test_rrhf.GROUPS, st.sampled_from([0.0, 0.5])))
    def holds(drawn):
        case, margin = drawn
        both = zip(case["scores"].tolist(), case["rewards"].tolist(), strict=True)
        each = [test_rrhf.by_loops(p, r, margin) for p, r in both]
        close(loss(**case, margin=margin), sum(each) / len(each))

    holds()


def check_violated_pairs(loss) -> None:
    """RR-2: +1 to p_i, -1 to p_j; 0 at exact ties of scores."""

    @common.forall(test_rrhf.GROUPS)
    def holds(case):
        _, slopes = common.value_and_gradients(loss, case, test_rrhf.PAIRED)
        points, rewards = case["scores"].tolist(), case["rewards"].tolist()
        expected = torch.zeros_like(case["scores"])
        for n in range(len(points)):
            for i, j in permutations(range(len(points[n])), 2):
                if rewards[n][i] < rewards[n][j] and points[n][i] > points[n][j]:
                    expected[n, i] += 1
                    expected[n, j] -= 1
        close(len(points) * slopes["scores"], expected)

    holds()


def check_ties_ask_for_nothing(loss) -> None:
    """RR-4."""
    for margin in (0.0, 1.0):
        tied = {**test_rrhf.GROUP, "rewards": torch.full((2, 3), 0.1).double()}
        value, slopes = common.value_and_gradients(
            partial(loss, margin=margin), tied, test_rrhf.PAIRED
        )
        assert value == 0 and (slopes["scores"] == 0).all()


def check_imitation(loss) -> None:
    """RR-6: the tokens of the best answers, and nothing of any other slot."""
    leaf = test_rrhf.CASE["logprobs"].clone().requires_grad_()
    rewards = test_rrhf.CASE["rewards"].view(2, 2)
    close(loss(leaf, rewards, test_rrhf.CASE["mask"]), 7 / 5)
    common.check_mask_is_inert(test_rrhf.pairwise(loss), test_rrhf.CASES)


# rejection sampling


def check_all_above_0(select) -> None:
    """Right is what earned more than 0."""

    @common.forall(strategies.groups(), examples=20)
    def holds(rewards):
        kept = test_rejection_sampling.chosen(select, rewards)
        assert kept.tolist() == [[r > 0 for r in row] for row in rewards.tolist()]

    holds()


def check_one_best_answer(select) -> None:
    """BON-6: exactly one of the best of each problem, none where nothing is right."""

    @common.forall(st.tuples(strategies.groups(), st.integers(0, 9)), examples=20)
    def holds(drawn):
        rewards, seed = drawn
        best = test_rejection_sampling.chosen(select, rewards, seed)
        answered = (rewards > 0).any(1)
        assert torch.equal(best.sum(1), answered.long())
        assert (rewards[best] == rewards.amax(1)[answered]).all()

    holds()


def check_ties_by_lot(select) -> None:
    """Of 3 equals in 4,000 groups each is taken as often, within 6 sigma."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 1.0]]).expand(4000, -1)
    lengths = torch.ones_like(rewards, dtype=torch.int64)
    first, *equals = select(rewards, lengths, generator()).sum(0).tolist()
    assert first == 0 and sum(equals) == 4000
    assert all(abs(x - 4000 / 3) < 6 * math.sqrt(4000 * 2 / 9) for x in equals)


def check_as_many_tokens(select) -> None:
    """The control has the tokens of all right answers, and up to one answer more."""

    @common.forall(st.tuples(strategies.groups(), st.integers(0, 9)), examples=20)
    def holds(drawn):
        rewards, seed = drawn
        lengths = test_rejection_sampling.lengths_for(rewards)
        kept = select(rewards, lengths, generator(seed))
        wanted, held = lengths[rewards > 0].sum(), lengths[kept].sum()
        assert wanted <= held
        assert not kept.any() or held - lengths[kept].max() < wanted

    holds()


def check_pool_of_all_rounds(keep) -> None:
    """Both rounds' answers; and the pool that was is left as it was."""
    a, b = [([1], [2])], [([3], [4, 5])]
    assert keep(a, b) == [([1], [2]), ([3], [4, 5])]
    assert len(a) == len(b) == 1
