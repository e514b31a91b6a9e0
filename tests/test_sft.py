"""SFT: the loss, the batches, the schedule, the optimisers, and training."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minialign.algorithms import sft
from minialign.logprobs import sequence_mean, token_logprobs
from minialign.model import GPT, GPTConfig
from tests import mutants, strategies
from tests.properties import common, training

CASES = strategies.batches(logprobs=strategies.logprobs)
CASE = {  # generic: two rows of unequal length, three columns
    "logprobs": torch.tensor(
        [[-0.5, -1.5, -2.0], [-0.1, -3.0, -9.0]], dtype=torch.float64
    ),
    "mask": torch.tensor([[True, True, True], [True, False, False]]),
}

# A world of 16 tokens, in which every question has one answer.
PAD, BOS, EOS = 0, 1, 2
EXAMPLES = [
    ([BOS, *[3] * (i % 3), 4 + i], [4 + 5 * i % 11] * (1 + i % 4) + [EOS])
    for i in range(8)
]
CONFIG = sft.SFTConfig(updates=8, batch_size=3, window=2, warmup=2, lr=1e-2)


def close(actual, expected, atol=1e-10):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def tiny_gpt(seed=0):
    sizes = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "hidden": 48}
    config = GPTConfig(vocab_size=16, context=16, **sizes)
    return GPT(config, torch.Generator().manual_seed(seed))


def run(model, examples=EXAMPLES, config=CONFIG):
    return sft.train(model, examples, config, pad_id=PAD)


class Table:
    """A model with one row of logits for each token that came just before."""

    def __init__(self, table):
        self.table = table  # (V, V)

    def __call__(self, tokens):
        return F.one_hot(tokens, len(self.table)).to(self.table.dtype)

    def logits(self, hidden):
        return hidden @ self.table


class Given:
    """A model whose logits (B, S, V) are handed in, whatever the tokens are."""

    def __init__(self, logits):
        self.every = logits

    def __call__(self, tokens):
        return self.every

    def logits(self, hidden):
        return hidden


def random_table(V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, V, generator=generator, dtype=torch.float64)


def loss_of(model, tokens, mask):
    return sft.sft_loss(token_logprobs(model, tokens, mask), mask)


def nats(model, examples):
    """-log π(response | prompt) of each example, alone and in plain Python."""
    total = []
    for prompt, response in examples:
        ids, nll = [*prompt, *response], 0.0
        logits = model.logits(model(torch.tensor([ids[:-1]])))[0].tolist()
        for position in range(len(prompt), len(ids)):
            row = logits[position - 1]
            largest = max(row)
            partition = sum(math.exp(x - largest) for x in row)
            nll -= row[ids[position]] - largest - math.log(partition)
        total.append(nll)
    return total


# The loss


def test_uniform_logits_cost_log_v():
    """SFT-1."""
    tokens, mask = sft.collate(EXAMPLES, PAD)
    close(loss_of(Table(torch.zeros(16, 16).double()), tokens, mask), math.log(16))


def test_who_knows_the_next_token_pays_nothing():
    """SFT-1: and scored one position off, the same oracle pays 50 nats a token."""
    oracle = Table(50.0 * torch.eye(8).roll(1, dims=1).double())  # t -> t + 1
    examples = [([0, 1], [2, 3, 4]), ([3], [4, 5, 6, 7])]
    tokens, mask = sft.collate(examples, pad_id=0)
    close(loss_of(oracle, tokens, mask), 0.0)
    for mutant in (
        mutants.token_logprobs_of_the_input,
        mutants.token_logprobs_without_shift,
    ):
        assert sft.sft_loss(mutant(oracle, tokens, mask), mask) > 40


@given(st.data())
def test_gradient_in_the_logits_is_softmax_minus_onehot(data):
    """SFT-2: over N; nothing at masked positions; each position sums to 0."""
    B, S, V = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), 3
    logits = data.draw(strategies.logits((B, S, V))).requires_grad_()
    tokens = torch.tensor(
        data.draw(st.lists(st.integers(0, V - 1), min_size=B * (S + 1), max_size=99))
    )[: B * (S + 1)].reshape(B, S + 1)
    mask = data.draw(strategies.masks((B, S)))
    slope = torch.autograd.grad(loss_of(Given(logits), tokens, mask), logits)[0]
    N = sum(row.count(True) for row in mask.tolist())
    for b in range(B):
        for s in range(S):
            weights = [math.exp(x) for x in logits[b, s].tolist()]
            for v, weight in enumerate(weights):
                expected = weight / sum(weights) - (v == tokens[b, s + 1].item())
                assert abs(slope[b, s, v].item() - mask[b, s].item() * expected / N) < (
                    1e-10
                )
    close(slope.sum(-1), torch.zeros(B, S))


def test_prompt_tokens_are_read_but_not_learnt():
    """SFT-3: as labels they change nothing, as inputs they do."""
    prompts = [3, 4, 5], [3, 4, 6], [7, 4, 5]
    batches = [sft.collate([(prompt, [8, EOS])], PAD) for prompt in prompts]
    logits = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    as_labels = {loss_of(Given(logits), *batch).item() for batch in batches}
    as_inputs = {loss_of(tiny_gpt(), *batch).item() for batch in batches}
    assert len(as_labels) == 1 and len(as_inputs) == 3
    # Learning the prompt, the labels count: that is the broken variant.
    everything = [sft.collate([(p, [8, EOS])], PAD, learn_prompt=True) for p in prompts]
    assert len({loss_of(Given(logits), *batch).item() for batch in everything}) > 1


def test_token_mean_is_sequence_mean_for_equal_lengths_only():
    """SFT-4."""
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -6.0]]).double()
    equal = torch.ones(2, 2, dtype=torch.bool)
    close(sft.sft_loss(logprobs, equal), 3.0)
    close(sequence_mean(-logprobs, equal), 3.0)
    unequal = torch.tensor([[True, True], [True, False]])
    close(sft.sft_loss(logprobs, unequal), 2.0)  # (1 + 2 + 3) / 3
    close(sequence_mean(-logprobs, unequal), 2.25)  # (1.5 + 3) / 2


def test_loss_is_the_likelihood_of_the_demonstrations():
    """SFT-5: exp(-N loss) is the product of all conditional probabilities."""
    model = Table(random_table(16))
    tokens, mask = sft.collate(EXAMPLES, PAD)
    N = sum(len(response) for _, response in EXAMPLES)
    assert N * loss_of(model, tokens, mask).item() == pytest.approx(
        sum(nats(model, EXAMPLES)), rel=1e-12
    )


def test_gradcheck():
    """SFT-7."""
    tokens, mask = sft.collate([([1, 2], [0, 1]), ([2], [1])], pad_id=0)
    logits = torch.randn(
        2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss_of(Given(x), tokens, mask), logits)


def test_nothing_to_learn_is_refused():
    """SFT-8: where PyTorch's cross-entropy says nan, we say what is wrong."""
    ignored = F.cross_entropy(torch.zeros(2, 3), torch.full((2,), -100))
    assert math.isnan(ignored)
    with pytest.raises(ValueError, match="no live token"):
        sft.sft_loss(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool))


def test_the_loss_owes_what_every_loss_owes():
    """C-1 to C-12."""
    loss = sft.sft_loss
    common.check_mask_is_inert(loss, CASES)
    common.check_constant(
        lambda x, mask: loss(-x.abs(), mask),
        strategies.shapes().flatmap(strategies.masks),
        expected=lambda c, mask: abs(c),
    )
    common.check_microbatches(loss, CASES, common.live_tokens)
    common.check_permutation(loss, CASES)
    common.check_shapes_refused(loss, CASE)
    common.check_gradient_reaches(loss, CASE)
    common.check_pure(loss, CASES)
    common.check_dtype(loss, CASES)
    common.check_duplication(loss, CASES)


@pytest.mark.parametrize(
    "check, wrong",
    [
        (common.check_mask_is_inert, mutants.token_mean_by_multiplication),
        (common.check_mask_is_inert, mutants.token_mean_of_product),
        (common.check_duplication, lambda x, mask, count: x[mask].sum()),
        (
            partial(common.check_microbatches, count=common.live_tokens),
            mutants.token_mean_of_this_part,
        ),
    ],
)
def test_the_properties_find_wrong_losses(check, wrong):
    def loss(logprobs, mask, count=None):
        return wrong(-logprobs, mask, count)

    assert common.refutes(check, loss, CASES)


def test_what_are_no_logprobs_is_refused():
    for bad in (0.5, math.nan, math.inf, -math.inf):
        logprobs = CASE["logprobs"].clone()
        logprobs[1, 0] = bad
        with pytest.raises(ValueError, match=r"logprobs must be .*at \[1, 0\]"):
            sft.sft_loss(logprobs, CASE["mask"])


# Examples to tensors

IDS = st.lists(st.integers(0, 9), min_size=1, max_size=5)


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=4), st.booleans())
def test_collate(examples, learn_prompt):
    """Row by row and slot by slot; token 0 is the pad and may be any token."""
    tokens, mask = sft.collate(examples, pad_id=0, learn_prompt=learn_prompt)
    T = max(len(prompt) + len(response) for prompt, response in examples)
    assert tokens.shape == (len(examples), T) and tokens.dtype == torch.int64
    assert mask.shape == (len(examples), T - 1) and mask.dtype == torch.bool
    for row, (prompt, response) in enumerate(examples):
        ids = prompt + response
        assert tokens[row].tolist() == ids + [0] * (T - len(ids))
        for s in range(T - 1):
            predicted = s + 1  # the position of the token that slot s scores
            first = 1 if learn_prompt else len(prompt)
            assert mask[row, s].item() == (first <= predicted < len(ids))


def test_eos_is_learnt_even_when_it_is_the_pad():
    """SFT-6: the live labels of a row are its answer and its EOS."""
    tokens, mask = sft.collate([([5], [6, 7, EOS]), ([5], [6, EOS])], pad_id=EOS)
    assert mask.sum(1).tolist() == [3, 2]
    assert tokens[:, 1:][mask].tolist() == [6, 7, EOS, 6, EOS]


@pytest.mark.parametrize(
    "examples, message",
    [
        ([], "examples: got none"),
        ([([1], [2]), ([], [2])], r"examples\[1\]: the prompt is empty"),
        ([([1], [])], r"examples\[0\]: the response is empty"),
    ],
)
def test_collate_refuses(examples, message):
    with pytest.raises(ValueError, match=message):
        sft.collate(examples, PAD)


# Batches


def numbered(count):
    """Examples of many lengths that say who they are in their second token."""
    return [
        ([BOS, 100 + i, *[3] * (i % 3)], [4] * (1 + 5 * i % 7) + [EOS])
        for i in range(count)
    ]


def who(tokens):
    return (tokens[:, 1] - 100).tolist()


def epochs_of(examples, config):
    """The batches of one epoch after another, as lists."""
    per_epoch = math.ceil(len(examples) / config.batch_size)
    drawn = list(sft.batches(examples, config, PAD))
    assert len(drawn) >= config.updates and len(drawn) % per_epoch == 0
    return [drawn[i : i + per_epoch] for i in range(0, len(drawn), per_epoch)]


@st.composite
def plans(draw):
    config = sft.SFTConfig(
        updates=draw(st.integers(1, 12)),
        batch_size=draw(st.integers(1, 5)),
        window=draw(st.integers(1, 4)),
        learn_prompt=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )
    return numbered(draw(st.integers(1, 13))), config


@given(plans())
def test_an_epoch_uses_every_example_once(plan):
    examples, config = plan
    for epoch in epochs_of(examples, config):
        rows = [i for tokens, _, _ in epoch for i in who(tokens)]
        assert sorted(rows) == list(range(len(examples)))
        sizes = sorted((len(tokens) for tokens, _, _ in epoch), reverse=True)
        assert sizes[:-1] == [config.batch_size] * (len(sizes) - 1)  # one may be less
        for tokens, mask, _ in epoch:
            expected = [examples[i] for i in who(tokens)]
            for got, want in zip(
                (tokens, mask),
                sft.collate(expected, PAD, config.learn_prompt),
                strict=True,
            ):
                assert torch.equal(got, want)


@given(plans())
def test_counts_make_a_window_one_token_mean(plan):
    """C-4: the mean of a window's losses is the mean over all its tokens."""
    examples, config = plan
    for epoch in epochs_of(examples, replace(config, learn_prompt=False)):
        for first in range(0, len(epoch), config.window):
            window = epoch[first : first + config.window]
            assert len({count for _, _, count in window}) == 1
            losses, nll, live = [], 0.0, 0
            for tokens, mask, count in window:
                fake = -1.0 - (torch.arange(mask.numel()) % 5).double()
                logprobs = fake.reshape(mask.shape)
                losses.append(sft.sft_loss(logprobs, mask, count).item())
                nll -= sum(logprobs[mask].tolist())
                live += sum(len(examples[i][1]) for i in who(tokens))
            assert sum(losses) / len(losses) == pytest.approx(nll / live, rel=1e-12)


@settings(max_examples=30)
@given(plans())
def test_resuming_anywhere_meets_the_same_batches(plan):
    examples, config = plan
    whole = list(sft.batches(examples, config, PAD))
    for start in range(config.updates):
        rest = list(sft.batches(examples, config, PAD, start))
        training.assert_same_bits(rest, whole[start:], f"from {start}")


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, updates=9):
        config = replace(CONFIG, seed=seed, updates=updates)
        epochs = epochs_of(numbered(9), config)
        return [[who(tokens) for tokens, _, _ in epoch] for epoch in epochs]

    torch.manual_seed(0)
    first = order(seed=0)
    torch.manual_seed(1)
    assert order(seed=0) == first
    assert order(seed=0, updates=4) == first[:2]
    assert len({str(epoch) for seed in range(4) for epoch in order(seed)}) == 12


def test_windows_save_padding_and_are_not_sorted_themselves():
    examples = [([BOS], [4] * (1 + 37 * i % 60)) for i in range(480)]

    def padding(window):
        config = sft.SFTConfig(updates=30, batch_size=16, window=window)
        drawn = list(sft.batches(examples, config, PAD))
        slots = sum(tokens.numel() for tokens, _, _ in drawn)
        widths = [tokens.shape[1] for tokens, _, _ in drawn]
        return 1 - sum(len(p) + len(r) for p, r in examples) / slots, widths

    share, widths = padding(window=30)
    assert share < 0.06 and widths != sorted(widths)
    assert padding(window=1)[0] > 0.3


def test_examples_may_be_computed_on_demand():
    asked = []

    class Lazy:
        def __len__(self):
            return 7

        def __getitem__(self, i):
            assert 0 <= i < 7
            asked.append(i)
            return numbered(7)[i]

    config = replace(CONFIG, updates=3)
    lazy = list(sft.batches(Lazy(), config, PAD))
    training.assert_same_bits(lazy, list(sft.batches(numbered(7), config, PAD)))
    assert sorted(asked) == list(range(7))


# Schedule and optimisers


def test_learning_rate_climbs_then_falls_to_zero():
    config = sft.SFTConfig(updates=100, warmup=10)
    shares = [sft.learning_rate(step, config) for step in range(101)]
    assert shares[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert shares[10] == 1.0 and shares[55] == pytest.approx(0.5)
    assert shares[99] == pytest.approx(1 / 90) and shares[100] == 0.0
    for config in (sft.SFTConfig(updates=5, warmup=0), sft.SFTConfig(1, warmup=1)):
        shares = [sft.learning_rate(s, config) for s in range(config.updates)]
        assert shares[0] == 1.0 and all(0 < share <= 1 for share in shares)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("muon", [False, True])
def test_every_parameter_is_in_one_group(muon, tied):
    sizes = {"dim": 8, "layers": 2, "heads": 2, "kv_heads": 1, "hidden": 6}
    config = GPTConfig(16, 16, **sizes, tied=tied)
    model = GPT(config, torch.Generator().manual_seed(0))
    names = {id(p): name for name, p in model.named_parameters()}
    steppers = sft.optimizers(model, sft.SFTConfig(muon=muon))
    groups = [(s, group) for s in steppers for group in s.param_groups]
    seen = [names[id(p)] for _, group in groups for p in group["params"]]
    assert sorted(seen) == sorted(names.values())
    assert [type(s).__name__ for s in steppers] == ["AdamW"] + ["Muon"] * muon
    for stepper, group in groups:
        for p in group["params"]:
            name = names[id(p)]
            projection = name.startswith("layers.") and "_proj" in name
            assert isinstance(stepper, torch.optim.Muon) == (muon and projection)
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.1)


# Training


def memorises():
    """After 40 updates, is every demonstration the likeliest answer, and cheap?"""
    model = tiny_gpt()
    before = sum(nats(model, EXAMPLES))
    config = replace(CONFIG, updates=40, batch_size=8)
    metrics = list(run(model, config=config))
    tokens, mask = sft.collate(EXAMPLES, PAD)
    likeliest = model.logits(model(tokens[:, :-1])).argmax(-1)
    right = (likeliest == tokens[:, 1:])[mask].all().item()
    cheap = sum(nats(model, EXAMPLES)) < before / 10
    return right and cheap and metrics[-1]["loss"] < metrics[0]["loss"] / 10


def test_it_learns_its_demonstrations():
    assert memorises()


def test_one_update_by_hand():
    """Every metric against plain Python and an autograd of its own."""
    model = tiny_gpt()
    config = replace(CONFIG, batch_size=8, warmup=4)
    twin = copy.deepcopy(model)
    metrics = next(run(model, config=config))

    lengths = [len(prompt) + len(response) for prompt, response in EXAMPLES]
    live = sum(len(response) for _, response in EXAMPLES)
    loss = torch.zeros(())
    for prompt, response in EXAMPLES:
        logits = twin.logits(twin(torch.tensor([prompt + response])))[0]
        answer = logits[len(prompt) - 1 : -1]
        loss = loss + F.cross_entropy(answer, torch.tensor(response), reduction="sum")
    expected = {
        "update": 1,
        "loss": sum(nats(twin, EXAMPLES)) / live,
        "lr": 0.25,
        "grad_norm": training.gradient_norm(loss / live, twin),
        "tokens": sum(lengths),
        "live_tokens": live,
        "padding": 1 - sum(lengths) / (8 * max(lengths)),
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_losses_of_an_epoch_add_up():
    """A batch reports its own mean, whatever count its gradient was divided by."""
    config = replace(CONFIG, lr=0.0, updates=3)
    metrics = list(run(tiny_gpt(), config=config))
    total = sum(row["loss"] * row["live_tokens"] for row in metrics)
    assert total == pytest.approx(sum(nats(tiny_gpt(), EXAMPLES)), rel=1e-5)
    assert [row["update"] for row in metrics] == [1, 2, 3]


def test_examples_that_do_not_fit_are_refused():
    fits = [([BOS, *[3] * 9], [4] * 5 + [EOS])]
    list(run(tiny_gpt(), fits, replace(CONFIG, updates=1)))
    longer = [([BOS, *[3] * 10], [4] * 5 + [EOS])]
    with pytest.raises(ValueError, match="one has 17 tokens, .* context of 16"):
        list(run(tiny_gpt(), longer))
