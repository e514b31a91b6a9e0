"""What log-probabilities, their sums and KL estimates owe, each beside what all owe."""

import itertools
import math
from functools import partial

import torch
from hypothesis import strategies as st

from minialign.logprobs import (
    masked_mean,
    masked_sum,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from tests import enumeration as world
from tests import strategies
from tests.properties import common


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or common.E64))


tensor = common.float64

# Two models small enough to read: one sees the last token, one the whole past.


class TableModel(torch.nn.Module):
    """Markov: row v of the table holds the logits of what follows token v."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.projected = 0  # positions that `logits` was asked for

    def forward(self, tokens):
        return torch.nn.functional.one_hot(tokens, len(self.table)).to(self.table.dtype)

    def logits(self, hidden):
        self.projected += hidden[..., 0].numel()
        return hidden @ self.table


class MemoryModel(TableModel):
    """What it saw fades but is never forgotten, so every earlier token matters."""

    def forward(self, tokens):
        state, states = 0.0, []
        for seen in super().forward(tokens).unbind(1):
            state = 0.6 * state + seen
            states.append(state)
        return torch.stack(states, dim=1)


def random_model(kind=MemoryModel, vocabulary=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = vocabulary, vocabulary
    return kind(torch.randn(shape, generator=generator, dtype=torch.float64))


def answers(prompt, responses, pad=0):
    """Tokens and mask of these responses to one prompt, padded on the right."""
    width = len(prompt) + max(len(response) for response in responses)
    rows = [[*prompt, *response] for response in responses]
    tokens = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    ends = torch.tensor([len(row) for row in rows])[:, None]
    column = torch.arange(1, width)  # of the token that each slot scores
    return tokens, (column >= len(prompt)) & (column < ends)


def score_by_hand(model, tokens, row, column, temperature=1.0):
    """log π of one token, from the model's logits for its prefix alone."""
    with torch.no_grad():
        logits = model.logits(model(tokens[row : row + 1, :column])[0, -1]).tolist()
    weights = [math.exp(x / temperature) for x in logits]
    return math.log(weights[tokens[row, column]] / sum(weights))


# token_logprobs, logprobs_from_logits


def check_sums_to_one(score, kind=MemoryModel) -> None:
    """After a prompt, the probabilities of all continuations sum to 1.

    All 3^3 continuations of three tokens; and, with an end token, all 15 that end or
    run out of room. One test for every slice that is off by one.
    """
    model, prompt = random_model(kind), (1, 0)
    for responses in (list(itertools.product(range(3), repeat=3)), world.RESPONSES):
        tokens, mask = answers(prompt, responses)
        total = score(model, tokens, mask).sum(1).exp().sum()
        close(total, tensor(1.0))


def check_scores_one_by_one(score, temperature=1.0) -> None:
    """Every live slot is the log-softmax of a forward over its own prefix; others 0."""
    model = random_model(vocabulary=4)
    tokens, mask = answers((3, 1), [(0, 2), (1, 3, 2), (2,)])
    mask[1, 2] = False  # a gap, too
    actual = score(model, tokens, mask)
    assert actual.shape == mask.shape
    for b, s in itertools.product(*map(range, mask.shape)):
        expected = score_by_hand(model, tokens, b, s + 1, temperature)
        close(actual[b, s], tensor(expected if mask[b, s] else 0.0))


def check_scores_at_temperature(score) -> None:
    """Scored at a temperature, as it was sampled."""
    check_scores_one_by_one(partial(score, temperature=0.5), temperature=0.5)


def check_shift_of_all_logits(score) -> None:
    """A constant on all logits of a choice changes nothing; half is half."""
    logits, targets = torch.tensor([[3e38, 3e38, 0.0]]), torch.tensor([1])
    close(score(logits, targets), torch.tensor([0.5]).log())
    logits = tensor([[0.5, -0.2, 0.1], [2.0, 0.0, -5.0]])
    targets = torch.tensor([0, 2])
    expected = score(logits, targets)
    close(score(logits + 7.0, targets), expected)
    assert (expected <= 0).all()


def check_all_but_impossible(score) -> None:
    """A thousand nats below the rest: the value and the gradient stay finite."""
    logits = torch.tensor([[0.0, -1000.0]]).requires_grad_()
    value = score(logits, torch.tensor([1]))
    assert value.item() == -1000.0
    (slope,) = torch.autograd.grad(value, logits)
    assert slope.tolist() == [[-1.0, 1.0]]


def check_half_is_lifted_first(score) -> None:
    """In half precision nothing is computed, at no temperature."""
    low = THREE.bfloat16()[None].expand(3, -1)
    for temperature in (1.0, 0.7):
        call = torch.arange(3), temperature
        assert torch.equal(score(low, *call), score(low.float(), *call))


# Reductions

X_CASES = strategies.batches(x=strategies.tensors)
MASKS = strategies.shapes().flatmap(strategies.masks)


def by_loops(x, mask):
    """All five, from Python floats."""
    rows = [
        [value for value, live in zip(values, lives, strict=True) if live]
        for values, lives in zip(x.tolist(), mask.tolist(), strict=True)
    ]
    live = [row for row in rows if row]
    everything = [value for row in rows for value in row]
    return {
        masked_sum: [math.fsum(row) for row in rows],
        masked_mean: [math.fsum(row) / len(row) if row else 0.0 for row in rows],
        token_mean: math.fsum(everything) / len(everything),
        sequence_mean: math.fsum(math.fsum(row) / len(row) for row in live) / len(live),
        sequence_sum: math.fsum(everything) / len(live),
    }


def check_by_loops(reduce, name) -> None:
    """As Python adds up the live slots: what the name says."""

    @common.forall(X_CASES, examples=20)
    def holds(case):
        close(reduce(**case), tensor(by_loops(**case)[name]))

    holds()


def check_mean_of_a_constant(reduce) -> None:
    """C in every live slot has the mean c."""
    common.check_constant(reduce, MASKS)


def check_row_means_of_a_constant(reduce) -> None:
    """The mean of the live slots, row by row; 0 for a row without a live slot."""
    common.check_constant(reduce, MASKS, lambda c, mask: c * mask.any(1).double())


def check_sum_of_a_constant(reduce) -> None:
    """The mean length of the rows that live, times the constant."""

    def expected(c, mask):
        lengths = mask.sum(1).double()
        return c * lengths[lengths > 0].mean()

    common.check_constant(reduce, MASKS, expected)


def check_where_reductions_part(reduce, expected) -> None:
    """Rows (1, 2, 3) and (10): each of the three scalars is another number."""
    x = tensor([[1, 2, 3], [10, 99, 99]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert reduce(x, mask).item() == expected


# KL estimates

POLICY, REFERENCE = world.random_logits(3), world.random_logits(4)
OLD = world.random_logits(5)  # the policy that sampled, some updates ago
REF_LOGPROBS = world.token_logprobs(REFERENCE)
KL = world.sequence_kl(POLICY, REFERENCE)
KL_GRADIENT = world.gradient(lambda x: world.sequence_kl(x, REFERENCE), POLICY)
FORWARD_GRADIENT = world.gradient(lambda x: world.sequence_kl(REFERENCE, x), POLICY)
ZERO = torch.zeros_like(POLICY)


def per_token(estimate):
    """The estimate summed over a sampled response."""
    return lambda rows, logprobs, mask: estimate(
        logprobs, REF_LOGPROBS[rows], mask
    ).sum()


def whole(estimate):
    """The estimate of the response as one choice: summed log-probs in one column."""

    def value(rows, logprobs, mask):
        column = torch.ones(len(rows), 1, dtype=torch.bool)
        reference = REF_LOGPROBS[rows].sum(1, keepdim=True)
        return estimate(logprobs.sum(1, keepdim=True), reference, column).sum()

    return value


def on_policy(estimate):
    """A ratio estimate on fresh samples: the old log-probs are the policy's own."""
    return lambda logprobs, reference, mask: estimate(
        logprobs, logprobs.detach(), reference, mask
    )


def check_one_token(estimate, expected) -> None:
    """One token of log π = -1 and log ref = -1.5."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    actual = estimate(tensor([[-1.0]]), tensor([[-1.5]]), mask)
    close(actual, tensor([[expected]]), rtol=0, atol=5e-7)


# Three choices, π = softmax(0.5, -0.2, 0.1) and ref = softmax(0, 0.3, -0.4): expected
# value and expected gradient in π's logits of each estimate, worked out apart.
THREE, THREE_REF = tensor([0.5, -0.2, 0.1]), tensor([0.0, 0.3, -0.4])
THREE_KL, THREE_FORWARD_KL = 0.102848, 0.114931
THREE_GRADIENT = [0.105758, -0.176650, 0.070892]
THREE_FORWARD_GRADIENT = [0.130381, -0.217779, 0.087397]


def check_three_choices(estimate, value, slope) -> None:
    leaf = THREE.clone().requires_grad_()
    logprobs = torch.log_softmax(leaf, 0)[:, None]  # (3, 1)
    reference = torch.log_softmax(THREE_REF, 0)[:, None]
    mask = torch.ones(3, 1, dtype=torch.bool)
    estimates = estimate(logprobs, reference, mask)
    expected = (logprobs.detach().exp() * estimates).sum()
    close(expected.detach(), tensor(value), rtol=0, atol=1e-6)
    (actual,) = torch.autograd.grad(expected, leaf)
    close(actual, tensor(slope), rtol=0, atol=1e-6)


def check_expects_kl(estimate) -> None:
    """The expected estimate is KL(policy || reference), per token and whole."""
    close(world.expectation(per_token(estimate), POLICY), KL)
    close(world.expectation(whole(estimate), POLICY), KL)


def check_never_negative_in_float32(estimate) -> None:
    """k3 is not negative where it is hard: near 0, exp(d) - 1 - d rounds to below 0."""
    small = -torch.logspace(-8, 0, 4001)[:, None]  # (4001, 1)
    mask = torch.ones_like(small, dtype=torch.bool)
    for pair in (small, 0 * small), (0 * small, small):
        estimates = estimate(*pair, mask)
        assert (estimates >= 0).all(), f"smallest: {estimates.min()}"


def check_gradient_whole(estimate, expected) -> None:
    """The expected gradient, of whole sequences."""
    close(world.expected_gradient(whole(estimate), POLICY), expected)


def check_on_policy(estimate) -> None:
    """On fresh samples the value and the expected gradient are those of
    KL(policy ‖ reference)."""
    fresh = on_policy(estimate)
    check_one_token(fresh, 0.106531)
    check_three_choices(fresh, THREE_KL, THREE_GRADIENT)
    check_expects_kl(fresh)
    check_gradient_whole(fresh, KL_GRADIENT)


# The ratio

NEAR = partial(strategies.logprobs, low=-2.0)  # exp(10) leaves float32 few digits
RATIOS = strategies.batches(logprobs=NEAR, old_logprobs=NEAR)


def check_ratio_slot_by_slot(ratio) -> None:
    """π / π_old in value and gradient, 1 where masked, and exactly 1 where they agree.

    The value slot by slot: a sum of them would not tell one from another.
    """

    @common.forall(RATIOS, examples=20)
    def holds(case):
        live, new, old = (case[k] for k in ("mask", "logprobs", "old_logprobs"))
        expected = torch.where(live, new.exp() / old.exp(), 1.0)
        close(ratio(**case), expected)
        _, slopes = common.value_and_gradients(lambda **x: ratio(**x).sum(), case)
        close(slopes["logprobs"], expected * live)
        same = ratio(**{**case, "old_logprobs": new})
        assert (same == 1).all()

    holds()


def check_ratio_is_bounded(ratio) -> None:
    """What float32 could not hold is refused, and not inf."""
    far, near = torch.tensor([[-1.0, -100.0]]), -torch.ones(1, 2)
    mask = torch.tensor([[True, True]])
    case = {"logprobs": near, "old_logprobs": far, "mask": mask}
    common.assert_refused(ratio, case, ValueError, "e^99", ["old_logprobs"])
    assert ratio(far, near, mask)[0, 1] > 0


# exact_kl

LOGITS_PAIRS = st.tuples(strategies.logits((2, 4)), strategies.logits((2, 4)))
LOGITS = LOGITS_PAIRS.map(
    lambda pair: dict(zip(("logits", "ref_logits"), pair, strict=True))
)


def check_exact_kl(exact) -> None:
    """The golden three choices, in value and gradient, both ways round."""
    leaf = THREE.clone().requires_grad_()
    value = exact(leaf, THREE_REF)
    close(value.detach(), tensor(THREE_KL), rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(value, leaf)
    close(slope, tensor(THREE_GRADIENT), rtol=0, atol=1e-6)
    back = exact(THREE_REF, THREE)
    close(back, tensor(THREE_FORWARD_KL), rtol=0, atol=1e-6)


def check_sure_choices(exact) -> None:
    """The exact KL where a probability is 0 in float32: log 2, 0, and finite slopes."""
    sure, even = torch.tensor([0.0, -1000.0]), torch.zeros(2)
    pairs = (
        (sure, even, math.log(2)),
        (sure, sure, 0.0),
        (even, sure, 500 - math.log(2)),
    )
    for policy, reference, expected in pairs:
        leaf = policy.clone().requires_grad_()
        value = exact(leaf, reference)
        assert math.isclose(value.item(), expected, abs_tol=1e-4)
        assert torch.autograd.grad(value, leaf)[0].isfinite().all()
