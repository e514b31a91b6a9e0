"""Token log-probs, masked reductions, KL estimates, and what they refuse."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minialign import logprobs as module
from minialign.logprobs import (
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_ratio_k3,
    logprobs_from_logits,
    masked_mean,
    masked_sum,
    probability_ratio,
    sequence_mean,
    sequence_sum,
    token_logprobs,
    token_mean,
)
from minialign.model import GPT, GPTConfig
from tests import enumeration as world
from tests import mutants, strategies
from tests.properties.common import (
    E64,
    check_constant,
    check_dtype,
    check_duplication,
    check_gradient_reaches,
    check_mask_is_inert,
    check_microbatches,
    check_no_gradient_to,
    check_permutation,
    check_pure,
    check_shapes_refused,
    live_rows,
    live_tokens,
    refutes,
)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **(tolerance or E64))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


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


# token_logprobs (LP-1 to LP-5)


def check_sums_to_one(score, kind=MemoryModel):
    """LP-1: after a prompt, the probabilities of all continuations sum to 1.

    All 3^3 continuations of three tokens; and, with an end token, all 15 that end or
    run out of room. One test for every slice that is off by one.
    """
    model, prompt = random_model(kind), (1, 0)
    for responses in (list(itertools.product(range(3), repeat=3)), world.RESPONSES):
        tokens, mask = answers(prompt, responses)
        total = score(model, tokens, mask).sum(1).exp().sum()
        close(total, tensor(1.0))


def check_scores_one_by_one(score, temperature=1.0):
    """Every live slot is the log-softmax of a forward over its own prefix; others 0."""
    model = random_model(vocabulary=4)
    tokens, mask = answers((3, 1), [(0, 2), (1, 3, 2), (2,)])
    mask[1, 2] = False  # a gap, too
    actual = score(model, tokens, mask)
    assert actual.shape == mask.shape
    for b, s in itertools.product(*map(range, mask.shape)):
        expected = score_by_hand(model, tokens, b, s + 1, temperature)
        close(actual[b, s], tensor(expected if mask[b, s] else 0.0))


@pytest.mark.parametrize("kind", [TableModel, MemoryModel])
def test_probabilities_of_all_continuations_sum_to_1(kind):
    check_sums_to_one(token_logprobs, kind)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
def test_scores_one_by_one(temperature):
    check_scores_one_by_one(
        partial(token_logprobs, temperature=temperature), temperature
    )


def test_chain_rule():
    """LP-2: log p(y | x) = log p(y[:j] | x) + log p(y[j:] | x, y[:j])."""
    model, prompt, response = random_model(), (1,), (0, 2, 2, 1)

    def logprob(prompt, response):
        tokens, mask = answers(prompt, [response])
        return token_logprobs(model, tokens, mask).sum()

    whole = logprob(prompt, response)
    for j in range(1, len(response)):
        first, rest = response[:j], response[j:]
        parts = logprob(prompt, first) + logprob((*prompt, *first), rest)
        close(parts, whole)


@given(strategies.batches(x=strategies.logprobs))
def test_mean_is_sum_over_count(case):
    """LP-3."""
    count = case["mask"].sum(1)
    close(masked_mean(**case) * count, masked_sum(**case))
    assert (masked_sum(**case) <= 0).all()


@given(strategies.logits((2, 3, 4)), strategies.tensors((2, 3)))
def test_a_constant_on_all_logits_of_a_position_changes_nothing(logits, constant):
    """LP-4."""
    targets = torch.tensor([[0, 1, 2], [3, 3, 0]])
    expected = logprobs_from_logits(logits, targets)
    assert (expected <= 0).all()
    close(logprobs_from_logits(logits + constant[..., None], targets), expected)


def test_golden_markov_table():
    """LP-5: three rows of probabilities, and their logarithms added by hand."""
    table = tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    tokens, mask = answers((2, 0), [(1, 1, 2), (2, 0, 0), (0,)])
    actual = token_logprobs(TableModel(table.log()), tokens, mask)
    expected = [
        [0, math.log(0.25), math.log(0.8), math.log(0.1)],
        [0, math.log(0.25), math.log(0.3), math.log(0.5)],
        [0, math.log(0.5), 0, 0],
    ]
    close(actual, tensor(expected))
    close(actual.sum(1).exp(), tensor([0.25 * 0.8 * 0.1, 0.25 * 0.3 * 0.5, 0.5]))


def test_logits_may_be_large():
    """Finite ones are fine, even where their sum is not."""
    logits = torch.tensor([[3e38, 3e38, 0.0]])
    actual = logprobs_from_logits(logits, torch.tensor([1]))
    assert actual.item() == pytest.approx(math.log(0.5))


def test_temperature_sharpens():
    """At temperature T the odds are those of the power 1 / T."""
    table = tensor([[0.5, 0.3, 0.2]] * 3).log()
    tokens, mask = answers((0,), [(1,), (2,), (0,)])
    actual = token_logprobs(TableModel(table), tokens, mask, temperature=0.5)
    squares = tensor([[0.09], [0.04], [0.25]])
    close(actual.exp(), squares / squares.sum())


def test_the_prompt_is_read_and_the_padding_is_not():
    model = random_model()
    tokens, mask = answers((1, 0), [(0, 2), (1, 1, 1, 2)], pad=0)
    expected = token_logprobs(model, tokens, mask)
    other_pad, _ = answers((1, 0), [(0, 2), (1, 1, 1, 2)], pad=1)
    assert torch.equal(token_logprobs(model, other_pad, mask), expected)
    other_prompt, _ = answers((2, 0), [(0, 2), (1, 1, 1, 2)], pad=0)
    assert (token_logprobs(model, other_prompt, mask) != expected)[mask].all()
    wider = torch.cat((tokens, tokens), dim=1)
    wider_mask = torch.cat((mask, torch.zeros_like(tokens, dtype=torch.bool)), dim=1)
    actual = token_logprobs(model, wider, wider_mask)
    close(actual[:, : mask.shape[1]], expected)
    assert (actual[:, mask.shape[1] :] == 0).all()


def test_rows_alone_and_in_any_order():
    model = random_model()
    tokens, mask = answers((1, 0), world.RESPONSES)
    expected = token_logprobs(model, tokens, mask)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    close(token_logprobs(model, tokens[order], mask[order]), expected[order])
    for row in range(len(tokens)):
        one = slice(row, row + 1)
        close(token_logprobs(model, tokens[one], mask[one]), expected[one])


def test_only_live_positions_are_projected():
    model = random_model()
    tokens, mask = answers((1, 0, 0, 1), [(0, 2), (2,)])
    token_logprobs(model, tokens, mask)
    assert model.projected == mask.sum() == 3


def test_gradient_is_onehot_minus_softmax_at_live_slots():
    """The gradient of log π(y) in the logits, in closed form; EOS included."""
    table = tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    model = TableModel(table.log())
    tokens, mask = answers((0,), [(1, 2)])
    token_logprobs(model, tokens, mask).sum().backward()
    expected = [[-0.5, 0.75, -0.25], [-0.1, -0.8, 0.9], [0, 0, 0]]
    close(model.table.grad, tensor(expected))


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_junk_hidden_states_at_masked_positions_are_inert(junk):
    """C-2 for the model's side: neither value nor any gradient sees them."""
    tokens, mask = answers((1, 0), [(0, 2), (1, 1, 1, 2)])
    results = []
    for content in (0.0, junk):
        hidden = torch.ones(*mask.shape, 3, dtype=torch.float64)
        hidden = hidden.masked_fill(~mask[..., None], content).requires_grad_()
        model = random_model()
        model.forward = lambda tokens, hidden=hidden: hidden
        value = token_logprobs(model, tokens, mask)
        value.sum().backward()
        results.append((value.detach(), hidden.grad, model.table.grad))
    for a, b in zip(*results, strict=True):
        close(a, b)
    assert (results[1][1][~mask] == 0).all()
    assert (results[1][1][mask] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_float32(dtype):
    model = random_model(TableModel).to(dtype)
    tokens, mask = answers((1, 0), world.RESPONSES)
    actual = token_logprobs(model, tokens, mask)
    assert actual.dtype == torch.float32
    close(actual, token_logprobs(model.float(), tokens, mask))


def test_scoring_is_pure():
    """C-9: modes, weights, tokens and every generator stay as they were."""
    model = random_model()
    model.add_module("dropout", torch.nn.Dropout(0.5).eval())
    tokens, mask = answers((1, 0), world.RESPONSES)
    case = {"tokens": tokens, "mask": mask}
    check_pure(partial(token_logprobs, model), st.just(case), model=model)


def test_the_real_model():
    """The contract with a GPT: sums to 1, reads no padding, trains every weight."""
    config = GPTConfig(
        vocab_size=3, context=8, dim=8, layers=2, heads=2, kv_heads=1, hidden=12
    )
    model = GPT(config, torch.Generator().manual_seed(0)).double()
    tokens, mask = answers((1, 0), world.RESPONSES, pad=0)
    actual = token_logprobs(model, tokens, mask)
    close(actual.sum(1).exp().sum(), tensor(1.0))
    other_pad, _ = answers((1, 0), world.RESPONSES, pad=2)
    assert torch.equal(token_logprobs(model, other_pad, mask), actual)
    b, s = mask.nonzero()[-1].tolist()
    close(actual[b, s], tensor(score_by_hand(model, tokens, b, s + 1)))
    (actual**2).sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad.isfinite().all() and weight.grad.any(), name


# Reductions (C-1 to C-12)

REDUCTIONS = [masked_sum, masked_mean, token_mean, sequence_mean, sequence_sum]
SCALARS = [token_mean, sequence_mean, sequence_sum]
X = ("x",)
X_CASES = strategies.batches(x=strategies.tensors)
X_CASE = {
    "x": tensor([[0.3, -1.2, 2.0], [0.7, 5.0, -4.0]]),
    "mask": torch.tensor([[True, True, False], [True, True, True]]),
}


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reductions_ignore_masked_slots(reduce):
    check_mask_is_inert(reduce, X_CASES, X)


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


@given(X_CASES)
def test_reductions_are_what_their_names_say(case):
    for reduce, expected in by_loops(**case).items():
        close(reduce(**case), tensor(expected))


def test_reductions_golden():
    """Rows (1, 2, 3) and (10): where the three scalar reductions part."""
    x = tensor([[1, 2, 3], [10, 99, 99]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert masked_sum(x, mask).tolist() == [6, 10]
    assert masked_mean(x, mask).tolist() == [2, 10]
    assert token_mean(x, mask).item() == 16 / 4
    assert sequence_mean(x, mask).item() == (2 + 10) / 2
    assert sequence_sum(x, mask).item() == 16 / 2


def test_a_row_without_a_live_token_counts_nowhere():
    x, mask = X_CASE["x"], X_CASE["mask"]
    dead = torch.zeros(1, 3, dtype=torch.bool)
    more_x, more_mask = torch.cat((x, x[:1])), torch.cat((mask, dead))
    for reduce in SCALARS:
        assert torch.equal(reduce(more_x, more_mask), reduce(x, mask))
    assert masked_sum(more_x, more_mask)[2] == masked_mean(more_x, more_mask)[2] == 0


def check_of_a_constant(reduce):
    """C-3, for means."""
    check_constant(reduce, strategies.shapes().flatmap(strategies.masks))


def test_a_mean_of_a_constant_is_the_constant():
    check_of_a_constant(token_mean)
    check_of_a_constant(sequence_mean)
    masks = strategies.shapes().flatmap(strategies.masks)
    check_constant(masked_mean, masks, lambda c, mask: c * mask.any(1).double())
    check_constant(masked_sum, masks, lambda c, mask: c * mask.sum(1).double())


def test_a_sequence_sum_of_a_constant_is_the_mean_length_times_it():
    def expected(c, mask):
        lengths = mask.sum(1).double()
        return c * lengths[lengths > 0].mean()

    masks = strategies.shapes().flatmap(strategies.masks)
    check_constant(sequence_sum, masks, expected)


NORMALISERS = [
    (token_mean, live_tokens), (sequence_mean, live_rows), (sequence_sum, live_rows)
]  # fmt: skip


@pytest.mark.parametrize("reduce, count", NORMALISERS)
def test_micro_batches_add_up(reduce, count):
    check_microbatches(reduce, X_CASES, count, X)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reductions_row_by_row(reduce):
    check_permutation(reduce, X_CASES, X)
    check_gradient_reaches(reduce, X_CASE, X)
    check_shapes_refused(reduce, X_CASE)
    check_pure(reduce, X_CASES)
    check_dtype(reduce, X_CASES, X)


@pytest.mark.parametrize("reduce", SCALARS)
def test_every_row_twice_changes_nothing(reduce):
    check_duplication(reduce, X_CASES, X)


def test_count_is_a_normaliser_of_the_whole_batch():
    close(token_mean(**X_CASE, count=10), tensor((0.3 - 1.2 + 0.7 + 5 - 4) / 10))
    close(token_mean(**X_CASE, count=2.5), tensor((0.3 - 1.2 + 0.7 + 5 - 4) / 2.5))
    for reduce, count in NORMALISERS:
        assert reduce(**X_CASE, count=count(X_CASE)) == reduce(**X_CASE)
        for wrong in (0, -3, math.nan, math.inf):
            with pytest.raises(ValueError, match=f"count must be positive.* {wrong}"):
                reduce(**X_CASE, count=wrong)
        for wrong in (True, "5", torch.tensor(5)):
            with pytest.raises(TypeError, match="count must be a number or None"):
                reduce(**X_CASE, count=wrong)


# KL estimates (KL-1 to KL-9)

ESTIMATES = [kl_k1, kl_k2, kl_k3]
PAIR = strategies.batches(
    logprobs=strategies.logprobs, ref_logprobs=strategies.logprobs
)
TRIPLE = strategies.batches(
    logprobs=strategies.logprobs,
    old_logprobs=strategies.logprobs,
    ref_logprobs=strategies.logprobs,
)
NEAR = partial(strategies.logprobs, low=-2.0)  # exp(10) leaves float32 few digits
NEAR_PAIR = strategies.batches(logprobs=NEAR, ref_logprobs=NEAR)
NEAR_TRIPLE = strategies.batches(logprobs=NEAR, old_logprobs=NEAR, ref_logprobs=NEAR)
KL_CASES = [(kl_k1, PAIR), (kl_k2, PAIR), (kl_k3, PAIR), (kl_ratio_k3, TRIPLE)]
KL_CASE = {
    "logprobs": tensor([[-1.0, -0.2, -3.0], [-0.5, -2.5, -0.1]]),
    "ref_logprobs": tensor([[-1.5, -0.9, -1.0], [-0.4, -2.0, -0.7]]),
    "mask": torch.tensor([[True, True, False], [True, True, True]]),
}
KL_CASE_OLD = KL_CASE | {"old_logprobs": KL_CASE["logprobs"] - 0.25}

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


@pytest.mark.parametrize("estimate, cases", KL_CASES)
def test_kl_estimates_ignore_masked_slots(estimate, cases):
    check_mask_is_inert(estimate, cases)


@pytest.mark.parametrize("estimate, cases", KL_CASES)
def test_kl_estimates_slot_by_slot(estimate, cases):
    case, near = KL_CASE, NEAR_PAIR
    if estimate is kl_ratio_k3:
        case, near = KL_CASE_OLD, NEAR_TRIPLE
    check_permutation(estimate, cases)
    check_shapes_refused(estimate, case)
    check_gradient_reaches(estimate, case)
    check_pure(estimate, cases)
    check_dtype(estimate, near)
    others = [name for name in case if name not in ("logprobs", "mask")]
    check_no_gradient_to(estimate, cases, others)


def check_golden(estimate, expected):
    """One token of log π = -1 and log ref = -1.5 (methods, section 8)."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    actual = estimate(tensor([[-1.0]]), tensor([[-1.5]]), mask)
    close(actual, tensor([[expected]]), rtol=0, atol=5e-7)


GOLDEN = {kl_k1: 0.5, kl_k2: 0.125, kl_k3: 0.106531, on_policy(kl_ratio_k3): 0.106531}


@pytest.mark.parametrize("estimate, expected", GOLDEN.items())
def test_golden_values(estimate, expected):
    check_golden(estimate, expected)


# Three choices, π = softmax(0.5, -0.2, 0.1) and ref = softmax(0, 0.3, -0.4): expected
# value and expected gradient in π's logits of each estimate, from methods, section 8.
THREE, THREE_REF = tensor([0.5, -0.2, 0.1]), tensor([0.0, 0.3, -0.4])
THREE_KL, THREE_FORWARD_KL = 0.102848, 0.114931
THREE_GRADIENT = [0.105758, -0.176650, 0.070892]
THREE_FORWARD_GRADIENT = [0.130381, -0.217779, 0.087397]
THREE_GOLDEN = [
    (kl_k1, THREE_KL, [0.0, 0.0, 0.0]),
    (kl_k2, 0.093614, THREE_GRADIENT),
    (kl_k3, THREE_KL, THREE_FORWARD_GRADIENT),
    (on_policy(kl_ratio_k3), THREE_KL, THREE_GRADIENT),
]


def check_three_choices(estimate, value, slope):
    leaf = THREE.clone().requires_grad_()
    logprobs = torch.log_softmax(leaf, 0)[:, None]  # (3, 1)
    reference = torch.log_softmax(THREE_REF, 0)[:, None]
    mask = torch.ones(3, 1, dtype=torch.bool)
    estimates = estimate(logprobs, reference, mask)
    expected = (logprobs.detach().exp() * estimates).sum()
    close(expected.detach(), tensor(value), rtol=0, atol=1e-6)
    (actual,) = torch.autograd.grad(expected, leaf)
    close(actual, tensor(slope), rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimate, value, slope", THREE_GOLDEN)
def test_golden_three_choices(estimate, value, slope):
    check_three_choices(estimate, value, slope)


def check_expects_kl(estimate):
    """KL-1: the expected estimate is KL(policy || reference), per token and whole."""
    close(world.expectation(per_token(estimate), POLICY), KL)
    close(world.expectation(whole(estimate), POLICY), KL)


@pytest.mark.parametrize("estimate", [kl_k1, kl_k3, on_policy(kl_ratio_k3)])
def test_unbiased_estimates(estimate):
    check_expects_kl(estimate)


def test_k2_is_biased():
    """KL-1, the negative control: the harness tells estimates of KL from others."""
    assert refutes(check_expects_kl, kl_k2)
    assert (world.expectation(whole(kl_k2), POLICY) - KL).abs() > 0.05


@given(PAIR)
def test_signs_and_zeros(case):
    """KL-2, KL-3."""
    mask, d = case["mask"], case["logprobs"] - case["ref_logprobs"]
    k1, k2, k3 = (estimate(**case) for estimate in ESTIMATES)
    assert torch.equal(k1.sign(), torch.where(mask, d.sign(), 0.0))
    assert (k2 >= 0).all() and (k3 >= 0).all()
    far = mask & (d.abs() > 1e-5)  # nearer, the square is below what float64 resolves
    assert (k2[far] > 0).all() and (k3[far] > 0).all()
    same = case | {"ref_logprobs": case["logprobs"]}
    for estimate in ESTIMATES:
        assert (estimate(**same) == 0).all()
    assert (kl_ratio_k3(old_logprobs=case["ref_logprobs"], **same) == 0).all()


def check_never_negative_in_float32(estimate):
    """KL-2 where it is hard (NUM-3): near 0, exp(d) - 1 - d rounds to below 0."""
    small = -torch.logspace(-8, 0, 4001)[:, None]  # (4001, 1)
    mask = torch.ones_like(small, dtype=torch.bool)
    for pair in (small, 0 * small), (0 * small, small):
        estimates = estimate(*pair, mask)
        assert (estimates >= 0).all(), f"smallest: {estimates.min()}"


def test_k3_is_never_negative_in_float32():
    check_never_negative_in_float32(kl_k3)


def check_gradient_whole(estimate, expected):
    close(world.expected_gradient(whole(estimate), POLICY), expected)


WHOLE_GRADIENTS = [
    (kl_k1, ZERO),  # KL-5: as a loss, k1 does nothing
    (kl_k2, KL_GRADIENT),  # KL-6
    (kl_k3, FORWARD_GRADIENT),  # KL-7
    (on_policy(kl_ratio_k3), KL_GRADIENT),  # KL-8
]


@pytest.mark.parametrize("estimate, expected", WHOLE_GRADIENTS)
def test_expected_gradients_of_whole_sequences(estimate, expected):
    check_gradient_whole(estimate, expected)


def test_the_four_gradients_are_different():
    """Or the table above could not fail."""
    assert KL_GRADIENT.abs().max() > 0.05
    assert world.cosine(KL_GRADIENT, FORWARD_GRADIENT) < 0.95


def off_policy(estimate):
    """Whole sequences drawn by OLD, weighted by policy / OLD, in value and gradient."""
    old = world.sequence_logprobs(OLD)[:, None]

    def value(rows, logprobs, mask):
        column = torch.ones(len(rows), 1, dtype=torch.bool)
        reference = REF_LOGPROBS[rows].sum(1, keepdim=True)
        policy = logprobs.sum(1, keepdim=True)
        return estimate(policy, old[rows], reference, column).sum()

    return value


def ratio_times(estimate):
    def weighted(logprobs, old_logprobs, ref_logprobs, mask):
        ratio = (logprobs - old_logprobs).exp()
        return ratio * estimate(logprobs, ref_logprobs, mask)

    return weighted


@pytest.mark.parametrize("weighted", [kl_ratio_k3, ratio_times(kl_k1)])
def test_the_ratio_makes_value_and_gradient_right_off_policy(weighted):
    """KL-8, and not for k2."""
    close(world.expectation(off_policy(weighted), POLICY, behaviour=OLD), KL)
    slope = world.expected_gradient(off_policy(weighted), POLICY, behaviour=OLD)
    close(slope, KL_GRADIENT)


def test_the_ratio_does_not_mend_k2():
    loss = off_policy(ratio_times(kl_k2))
    slope = world.expected_gradient(loss, POLICY, behaviour=OLD)
    assert (slope - KL_GRADIENT).abs().max() > 0.05


def kl_of_choices(logits, reference, visits):
    """Σ over prefixes of how often each is visited x the KL of the choice there."""
    log_policy = torch.log_softmax(logits, -1)
    log_reference = torch.log_softmax(reference, -1)
    return (visits * (log_policy.exp() * (log_policy - log_reference)).sum(-1)).sum()


def visits(logits):
    """(7,): the probability that a response of this policy passes each prefix."""
    total = torch.zeros(len(world.PREFIXES), dtype=torch.float64)
    for weight, response in zip(
        world.probabilities(logits), world.RESPONSES, strict=True
    ):
        for t in range(len(response)):
            total[world.PREFIXES.index(response[:t])] += weight
    return total


def test_per_token_sums_miss_what_a_token_does_to_later_ones():
    """KL-9: k2 and ratio x k3 have each choice's own KL gradient, k3 the forward.

    With the visits to each prefix held fixed; the KL gradient proper moves them too.
    """
    fixed = visits(POLICY)
    close(kl_of_choices(POLICY, REFERENCE, fixed), KL)
    local = world.gradient(lambda x: kl_of_choices(x, REFERENCE, fixed), POLICY)
    forward = world.gradient(lambda x: kl_of_choices(REFERENCE, x, fixed), POLICY)
    ratio_k3 = on_policy(kl_ratio_k3)
    expected = {kl_k1: ZERO, kl_k2: local, ratio_k3: local, kl_k3: forward}
    for estimate, slope in expected.items():
        close(world.expected_gradient(per_token(estimate), POLICY), slope)
    assert (local - KL_GRADIENT).abs().max() > 0.05
    assert (forward - FORWARD_GRADIENT).abs().max() > 0.05


def test_per_token_k2_is_k1_times_the_score():
    """KL-9: its expected gradient is E[Σ_t k1_t ∇ log π_t] ..."""

    def k1_times_score(rows, logprobs, mask):
        return (kl_k1(logprobs, REF_LOGPROBS[rows], mask).detach() * logprobs).sum()

    actual = world.expected_gradient(per_token(kl_k2), POLICY)
    close(actual, world.expected_gradient(k1_times_score, POLICY))


def test_reward_to_go_of_k1_has_the_whole_gradient():
    """KL-9: ... and k1 to go, detached, in the place of k1 recovers the rest."""

    def to_go(rows, logprobs, mask):
        k1 = kl_k1(logprobs, REF_LOGPROBS[rows], mask).detach()
        return (k1.flip(1).cumsum(1).flip(1) * logprobs).sum()

    close(world.expected_gradient(to_go, POLICY), KL_GRADIENT)


@given(PAIR)
def test_a_likelier_reference_lowers_k1(case):
    """KL-10: the sign of the penalty."""
    nearer = case | {"ref_logprobs": case["ref_logprobs"] / 2 - 1e-3}
    moved = (nearer["ref_logprobs"] > case["ref_logprobs"]) & case["mask"]
    assert (kl_k1(**nearer) < kl_k1(**case))[moved].all()


def test_exponents_that_float32_cannot_hold_are_refused():
    mask = torch.tensor([[True, True]])
    far, near = torch.tensor([[-1.0, -100.0]]), torch.tensor([[-1.0, -1.0]])
    with pytest.raises(ValueError, match=r"ref_logprobs - logprobs .* 99\.0 at \[0, 1"):
        kl_k3(far, near, mask)
    with pytest.raises(ValueError, match=r"logprobs - old_logprobs .* at \[0, 1\]"):
        kl_ratio_k3(near, far, near, mask)
    assert kl_k3(near, far, mask).isfinite().all()  # the other way round is no problem
    edge = torch.tensor([[-1.0, -1.0 - module.LARGEST_EXPONENT]])
    assert kl_k3(edge, near, mask).isfinite().all()
    assert kl_k3(far, near, torch.tensor([[True, False]])).tolist() == [[0, 0]]


# probability_ratio

RATIO_CASE = {
    "logprobs": KL_CASE["logprobs"],
    "old_logprobs": KL_CASE["ref_logprobs"],
    "mask": KL_CASE["mask"],
}
RATIOS = strategies.batches(logprobs=NEAR, old_logprobs=NEAR)


@given(RATIOS)
def test_probability_ratio_slot_by_slot(case):
    leaf = case["logprobs"].clone().requires_grad_()
    ratio = probability_ratio(**(case | {"logprobs": leaf}))
    ratio.sum().backward()
    live, new, old = (case[k] for k in ("mask", "logprobs", "old_logprobs"))
    expected = torch.ones_like(old)
    expected[live] = new[live].exp() / old[live].exp()
    close(ratio.detach(), expected)
    close(leaf.grad, torch.where(live, expected, 0.0))  # d ratio / d log π = ratio
    same = probability_ratio(leaf, case["logprobs"], live)
    assert torch.equal(same.detach(), torch.ones_like(old))


def test_probability_ratio_owes_what_the_estimates_do():
    check_mask_is_inert(probability_ratio, RATIOS)
    check_shapes_refused(probability_ratio, RATIO_CASE)
    check_pure(probability_ratio, RATIOS)
    check_no_gradient_to(probability_ratio, RATIOS, ["old_logprobs"])
    far, mask = torch.tensor([[-1.0, -82.0]]), torch.tensor([[True, True]])
    with pytest.raises(ValueError, match=r"logprobs - old_logprobs .* at \[0, 1\]"):
        probability_ratio(-torch.ones(1, 2), far, mask)
    assert probability_ratio(far, -torch.ones(1, 2), mask)[0, 1] > 0
    assert probability_ratio(-torch.ones(1, 2), far, mask & (far > -2)).max() == 1


# exact_kl

LOGITS_PAIRS = st.tuples(strategies.logits((2, 4)), strategies.logits((2, 4)))


@given(LOGITS_PAIRS)
def test_exact_kl_against_loops(pair):
    """KL-4: and it is never negative."""
    actual = exact_kl(*pair)
    for row in range(2):
        p, q = ([math.exp(x) for x in logits[row].tolist()] for logits in pair)
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        expected = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        close(actual[row], tensor(expected))
    assert (actual >= -1e-14).all()
    assert (exact_kl(pair[0], pair[0]) == 0).all()


@given(LOGITS_PAIRS)
def test_exact_kl_adds_up_over_independent_choices(pair):
    """KL-4: two choices made apart are one choice among all pairs."""
    joint = [(x[0][:, None] + x[1][None, :]).flatten() for x in pair]
    close(exact_kl(*joint), exact_kl(*pair).sum())


def check_exact_kl(exact):
    """The golden three choices, in value and gradient, both ways round."""
    leaf = THREE.clone().requires_grad_()
    value = exact(leaf, THREE_REF)
    close(value.detach(), tensor(THREE_KL), rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(value, leaf)
    close(slope, tensor(THREE_GRADIENT), rtol=0, atol=1e-6)
    back = exact(THREE_REF, THREE)
    close(back, tensor(THREE_FORWARD_KL), rtol=0, atol=1e-6)


def test_exact_kl_golden():
    check_exact_kl(exact_kl)
    pairs = LOGITS_PAIRS.map(lambda pair: {"logits": pair[0], "ref_logits": pair[1]})
    check_no_gradient_to(exact_kl, pairs, ["ref_logits"])
    check_pure(exact_kl, pairs)
    check_permutation(exact_kl, pairs, ["logits"])


def test_exact_kl_along_the_path_expects_the_sequence_kl():
    """KL-1: with less noise than k1, for only the contexts are sampled."""
    exact = exact_kl(POLICY, REFERENCE)  # (7,)

    def path(rows, logprobs, mask):
        return masked_sum(exact[world.STATES[rows]], mask).sum()

    def squared(value):
        return lambda *args: value(*args) ** 2

    close(world.expectation(path, POLICY), KL)
    noise = world.expectation(squared(path), POLICY)
    assert noise < world.expectation(squared(per_token(kl_k1)), POLICY)


def test_exact_kl_in_half_precision_is_computed_in_float32():
    low = THREE.bfloat16(), THREE_REF.bfloat16()
    actual = exact_kl(*low)
    assert actual.dtype == torch.float32
    close(actual, exact_kl(*(x.float() for x in low)))


# Wrong versions are told from the right ones

inert_pair = partial(check_mask_is_inert, cases=PAIR)
inert_x = partial(check_mask_is_inert, cases=X_CASES, trainable=X)
parts_of_tokens = partial(
    check_microbatches, cases=X_CASES, count=live_tokens, trainable=X
)
no_gradient_to_reference = partial(
    check_no_gradient_to, cases=PAIR, names=["ref_logprobs"]
)
refuses_shapes = partial(check_shapes_refused, case=X_CASE)
pure_x = partial(check_pure, cases=X_CASES)
k3_gradient = partial(check_gradient_whole, expected=FORWARD_GRADIENT)
k2_gradient = partial(check_gradient_whole, expected=KL_GRADIENT)
golden_k1 = partial(check_golden, expected=GOLDEN[kl_k1])
golden_k3 = partial(check_golden, expected=GOLDEN[kl_k3])


def at_temperature(score):
    return partial(score, temperature=0.5)


def check_scores_at_temperature(score):
    check_scores_one_by_one(score, temperature=0.5)


def check_token_mean_golden(reduce):
    x = tensor([[1, 2, 3], [10, 0, 0]])
    assert reduce(x, x > 0) == 4


MUTANTS = [
    (check_sums_to_one, token_logprobs, mutants.token_logprobs_without_shift),
    (check_sums_to_one, token_logprobs, mutants.token_logprobs_of_the_input),
    (check_sums_to_one, token_logprobs, mutants.token_logprobs_one_early),
    (check_sums_to_one, token_logprobs, mutants.token_logprobs_without_eos),
    (check_sums_to_one, token_logprobs, mutants.token_logprobs_without_mask),
    (check_scores_at_temperature, at_temperature(token_logprobs),
     at_temperature(mutants.token_logprobs_without_temperature)),
    (check_of_a_constant, token_mean, mutants.token_mean_of_product),
    (inert_x, token_mean, mutants.token_mean_by_multiplication),
    (parts_of_tokens, token_mean, mutants.token_mean_of_this_part),
    (check_token_mean_golden, token_mean, mutants.token_mean_of_row_means),
    (pure_x, masked_sum, mutants.masked_sum_in_place),
    (refuses_shapes, masked_sum, mutants.masked_sum_that_broadcasts),
    (golden_k1, kl_k1, mutants.kl_k1_swapped),
    (check_expects_kl, kl_k1, mutants.kl_k1_swapped),
    (no_gradient_to_reference, kl_k1, mutants.kl_k1_into_the_reference),
    (k2_gradient, kl_k2, mutants.kl_k2_without_half),
    (golden_k3, kl_k3, mutants.kl_k3_inverted),
    (check_expects_kl, kl_k3, mutants.kl_k3_inverted),
    (k3_gradient, kl_k3, mutants.kl_k3_inverted),
    (check_expects_kl, kl_k3, mutants.kl_k3_without_minus_1),
    (inert_pair, kl_k3, mutants.kl_k3_masked_after),
    (check_never_negative_in_float32, kl_k3, mutants.kl_k3_rounded),
    (k2_gradient, on_policy(kl_ratio_k3), on_policy(mutants.kl_ratio_k3_detached)),
    (check_exact_kl, exact_kl, mutants.exact_kl_swapped),
    (check_exact_kl, exact_kl, mutants.exact_kl_with_fixed_weights),
    (check_exact_kl, exact_kl, mutants.exact_kl_averaged),
]  # fmt: skip


@pytest.mark.parametrize("check, right, wrong", MUTANTS)
def test_wrong_versions_are_found(check, right, wrong):
    check(right)
    assert refutes(check, wrong)


# Refusals

TOKENS, MASK = answers((1, 0), [(0, 2), (2,)])
BAD_SCORES = [
    ({"tokens": TOKENS.int()}, TypeError, "tokens must be int64"),
    ({"tokens": TOKENS.double()}, TypeError, "tokens must be int64"),
    ({"tokens": TOKENS.tolist()}, TypeError, "tokens must be a tensor, got list"),
    ({"tokens": TOKENS[0]}, ValueError, r"tokens must be \(B, T\) .* \(4,\)"),
    ({"tokens": TOKENS[:, :1]}, ValueError, "tokens must be .* T >= 2"),
    ({"tokens": TOKENS[:0]}, ValueError, "tokens is empty"),
    ({"tokens": TOKENS - 1}, ValueError, "tokens must be ids >= 0, got -1"),
    ({"tokens": TOKENS[:, :-1]}, ValueError, r"tokens\[:, 1:\] has shape \(2, 2\)"),
    ({"mask": MASK.long()}, TypeError, "mask must be bool, got torch.int64"),
    ({"mask": MASK[:, :-1]}, ValueError, r"mask \(2, 2\)"),
    ({"mask": torch.ones_like(TOKENS).bool()}, ValueError, r"mask \(2, 4\)"),
    ({"mask": ~MASK & MASK}, ValueError, r"mask has no live token in its \(2, 3\)"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive .* got 0.0"),
    ({"temperature": -1.0}, ValueError, "temperature must be positive"),
    ({"temperature": math.nan}, ValueError, "temperature must be positive"),
    ({"temperature": math.inf}, ValueError, "temperature must be positive and finite"),
]


@pytest.mark.parametrize("bad, error, message", BAD_SCORES)
def test_token_logprobs_refuses(bad, error, message):
    model = random_model()
    good = {"tokens": TOKENS, "mask": MASK}
    token_logprobs(model, **good)
    with pytest.raises(error, match=message):
        token_logprobs(model, **(good | bad))


LOGITS, TARGETS = torch.zeros(2, 3), torch.tensor([0, 2])
NAN_LOGITS = torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0]])
BAD_LOGITS = [
    ({"logits": LOGITS.long()}, TypeError, "logits must be floats, got torch.int64"),
    ({"logits": LOGITS[:0]}, ValueError, "logits is empty"),
    ({"logits": NAN_LOGITS}, ValueError, r"logits .* finite, got nan at \[1, 1\]"),
    ({"logits": LOGITS - math.inf}, ValueError, r"got -inf at \[0, 0\]"),
    ({"targets": TARGETS.int()}, TypeError, "targets must be int64"),
    ({"targets": TARGETS[:, None]}, ValueError, r"targets has .* \(2, 1\) and "),
    ({"targets": TARGETS + 1}, ValueError, r"ids in 0\.\.2, got 3 at \[1\]"),
    ({"targets": TARGETS - 1}, ValueError, r"ids in 0\.\.2, got -1 at \[0\]"),
    ({"temperature": 0}, ValueError, "temperature"),
]


@pytest.mark.parametrize("bad, error, message", BAD_LOGITS)
def test_logprobs_from_logits_refuses(bad, error, message):
    good = {"logits": LOGITS, "targets": TARGETS}
    logprobs_from_logits(**good)
    with pytest.raises(error, match=message):
        logprobs_from_logits(**(good | bad))


BAD_KL = [
    ({"logits": LOGITS.long()}, TypeError, "logits must be floats"),
    ({"ref_logits": LOGITS.long()}, TypeError, "ref_logits must be floats"),
    ({"ref_logits": NAN_LOGITS}, ValueError, r"ref_logits .* nan at \[1, 1\]"),
    ({"ref_logits": LOGITS[:1]}, ValueError, r"ref_logits has shape \(1, 3\)"),
]


@pytest.mark.parametrize("bad, error, message", BAD_KL)
def test_exact_kl_refuses(bad, error, message):
    good = {"logits": LOGITS, "ref_logits": LOGITS}
    exact_kl(**good)
    with pytest.raises(error, match=message):
        exact_kl(**(good | bad))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimate", [kl_k1, kl_k2, kl_k3, kl_ratio_k3])
def test_live_junk_is_refused_by_name(estimate, bad):
    case = KL_CASE_OLD if estimate is kl_ratio_k3 else KL_CASE
    for name in set(case) - {"mask"}:
        x = case[name].clone()
        x[1, 2] = bad
        with pytest.raises(ValueError, match=rf"^{name} must be finite .* at \[1, 2\]"):
            estimate(**(case | {name: x}))
        x[1, 2] = 0.1
        with pytest.raises(ValueError, match=rf"^{name} must be log-prob.* 0\.1 at"):
            estimate(**(case | {name: x}))
        x[1, 2] = 5e-7  # rounding
        estimate(**(case | {name: x}))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reductions_refuse_live_junk(reduce, bad):
    x = X_CASE["x"].clone()
    x[0, 1] = bad
    with pytest.raises(ValueError, match=rf"x must be finite .* {bad} at \[0, 1\]"):
        reduce(x, X_CASE["mask"])


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reductions_refuse_a_batch_without_a_live_token(reduce):
    with pytest.raises(ValueError, match="mask has no live token"):
        reduce(X_CASE["x"], torch.zeros(2, 3, dtype=torch.bool))


def test_check_rows():
    """One number per row: slots or a column are refused; a dead row has one too."""
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    module.check_rows("rewards", torch.tensor([1.0, -3.0, 0.0]), mask)
    bad = [
        (torch.zeros(3, 1), ValueError, r"rewards has shape \(3, 1\)"),
        (torch.zeros(3, 2), ValueError, r"rewards has shape \(3, 2\)"),
        (torch.zeros(2), ValueError, r"rewards has shape \(2,\)"),
        (torch.zeros(3).long(), TypeError, "rewards must be float32 or float64"),
        (torch.tensor([1.0, math.nan, 0.0]), ValueError, r"rewards .* nan at \[1\]"),
    ]
    for x, error, message in bad:
        with pytest.raises(error, match=message):
            module.check_rows("rewards", x, mask)


def test_check_reference():
    policy, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    module.check_reference(policy, None)
    module.check_reference(policy, other, "beta is 1")
    with pytest.raises(ValueError, match="reference: beta is 1, so a reference is"):
        module.check_reference(policy, None, "beta is 1")
    other.bias = policy.bias
    with pytest.raises(ValueError, match="shares weights with the policy; pass a copy"):
        module.check_reference(policy, other)


def test_check_shapes_names_both():
    a, b = torch.zeros(4, 1), torch.zeros(4)
    with pytest.raises(ValueError, match=r"values has .* \(4,\) and logprobs \(4, 1\)"):
        module.check_shapes(logprobs=a, values=b)
    with pytest.raises(ValueError, match="values is on meta and logprobs on cpu"):
        module.check_shapes(logprobs=b, values=b.to("meta"))
    with pytest.raises(TypeError, match="values must be a tensor, got float"):
        module.check_shapes(logprobs=b, values=1.0)


def test_checks_pass_what_is_possible():
    """Degenerate but legal: one row of one live token that was certain."""
    certain, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    module.check_mask(mask)
    module.check_logprobs("logprobs", certain, mask)
    for estimate in ESTIMATES:
        assert estimate(certain, certain, mask).item() == 0
    for reduce in SCALARS:
        assert reduce(certain, mask).item() == 0
