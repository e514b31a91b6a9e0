"""What imitation owes: of demonstrations (SFT), of own answers (rejection sampling)."""

import itertools
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import strategies as st

from minialign.algorithms import sft
from minialign.model import GPT, GPTConfig
from minialign.sampling import collate
from tests import strategies
from tests.properties import common, training
from tests.properties.common import close
from tests.toy import generator

# A world of 16 tokens, in which every question has one answer

PAD, BOS, EOS = 0, 1, 2
EXAMPLES = [
    ([BOS, *[3] * (i % 3), 4 + i], [4 + 5 * i % 11] * (1 + i % 4) + [EOS])
    for i in range(8)
]
CONFIG = sft.SFTConfig(updates=8, batch_size=3, window=2, warmup=2, lr=1e-2)


def tiny_gpt(seed=0):
    sizes = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 2, "hidden": 48}
    config = GPTConfig(vocab_size=16, context=16, **sizes)
    return GPT(config, torch.Generator().manual_seed(seed))


def numbered(count):
    """Examples of many lengths that say who they are in their second token."""
    return [
        ([BOS, 100 + i, *[3] * (i % 3)], [4] * (1 + 5 * i % 7) + [EOS])
        for i in range(count)
    ]


def who(tokens):
    return (tokens[:, 1] - 100).tolist()


# SFT


def check_mean_of_a_constant(loss) -> None:
    """C nats at every live token cost c."""
    masks = strategies.shapes().flatmap(strategies.masks)

    def reduce(x, mask):
        return loss(-x.abs(), mask)

    common.check_constant(reduce, masks, lambda c, mask: abs(c))


def check_every_token_counts_alike(loss) -> None:
    """A slope of -1 / N at each of the N live tokens, whoever said it.

    In the mean of each answer's mean those of short answers would pull harder. (Through
    a log-softmax this becomes chance less one for the token that was said.)
    """

    @common.forall(strategies.batches(logprobs=strategies.logprobs), examples=20)
    def holds(case):
        _, slopes = common.value_and_gradients(loss, case)
        live = case["mask"].double()
        close(slopes["logprobs"], -live / live.sum())

    holds()


@st.composite
def plans(draw):
    """Numbered examples, and a config that deals them."""
    config = sft.SFTConfig(
        updates=draw(st.integers(1, 12)),
        batch_size=draw(st.integers(1, 5)),
        window=draw(st.integers(1, 4)),
        learn_prompt=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )
    return numbered(draw(st.integers(1, 13))), config


def epochs_of(batches, examples, config):
    """The batches of one epoch after another, as lists."""
    per_epoch = math.ceil(len(examples) / config.batch_size)
    drawn = list(batches(examples, config, PAD))
    assert len(drawn) >= config.updates and len(drawn) % per_epoch == 0
    return [drawn[i : i + per_epoch] for i in range(0, len(drawn), per_epoch)]


def check_epochs(batches) -> None:
    """Every example once an epoch and as it is, in batches as large as asked; the last
    that was cut is smaller if the examples do not divide."""

    @common.forall(plans(), examples=20)
    def holds(plan):
        examples, config = plan
        for epoch in epochs_of(batches, examples, config):
            rows = [who(tokens) for tokens, _, _ in epoch]
            assert sorted(itertools.chain(*rows)) == list(range(len(examples)))
            sizes = sorted(map(len, rows), reverse=True)
            assert sizes[:-1] == [config.batch_size] * (len(sizes) - 1)
            for drawn, (tokens, mask, _) in zip(rows, epoch, strict=True):
                asked = [examples[i] for i in drawn]
                expected = collate(asked, PAD, config.learn_prompt)
                assert torch.equal(tokens, expected[0])
                assert torch.equal(mask, expected[1])

    holds()


def check_orders(batches) -> None:
    """Each epoch and each seed has an order of its own, a function of these alone."""

    def orders(seed, updates=9):
        config = sft.SFTConfig(updates=updates, batch_size=3, window=2, seed=seed)
        epochs = epochs_of(batches, numbered(9), config)
        return [[who(tokens) for tokens, *_ in epoch] for epoch in epochs]

    torch.manual_seed(0)
    first = orders(seed=0)
    torch.manual_seed(1)
    assert orders(seed=0) == first
    assert orders(seed=0, updates=4) == first[:2]
    assert len({str(epoch) for seed in range(3) for epoch in orders(seed)}) == 9


def check_windows_are_token_means(batches) -> None:
    """All batches of a window have its mean number of live tokens as their count,
    so the mean of their losses is a mean over all its tokens."""

    @common.forall(plans(), examples=20)
    def holds(plan):
        examples, config = plan
        for epoch in epochs_of(batches, examples, config):
            for first in range(0, len(epoch), config.window):
                window = epoch[first : first + config.window]
                live = sum(int(mask.sum()) for _, mask, _ in window)
                for _, _, count in window:
                    assert math.isclose(count, live / len(window))

    holds()


def check_windows_save_padding(batches) -> None:
    """Within a window batches are of one length each; they do not come by length."""
    examples = [([BOS] * (1 + 7 * i % 30), [4] * (1 + 37 * i % 41)) for i in range(480)]
    tokens_of = sum(len(prompt) + len(response) for prompt, response in examples)

    def dealt(window):
        """Share of padding, and widths."""
        config = sft.SFTConfig(updates=30, batch_size=16, window=window)
        drawn = [tokens for tokens, *_ in batches(examples, config, PAD)]
        slots = sum(tokens.numel() for tokens in drawn)
        return 1 - tokens_of / slots, [tokens.shape[1] for tokens in drawn]

    padding, widths = dealt(window=30)
    assert padding < 0.06 and widths != sorted(widths)
    assert dealt(window=1)[0] > 0.3


def check_resumed_batches(batches) -> None:
    """From any update on, the batches are those of the whole run."""

    @common.forall(plans(), examples=10)
    def holds(plan):
        examples, config = plan
        whole = list(batches(examples, config, PAD))
        for start in range(config.updates):
            rest = list(batches(examples, config, PAD, start))
            training.assert_same_bits(rest, whole[start:], f"from {start}")

    holds()


def check_examples_on_demand(batches) -> None:
    """Examples may be computed when they are asked for, each once an epoch."""
    examples, asked = numbered(7), []

    class Lazy:
        def __len__(self):
            return 7

        def __getitem__(self, i):
            assert 0 <= i < 7
            asked.append(i)
            return examples[i]

    config = sft.SFTConfig(updates=3, batch_size=3, window=2)
    lazy = list(batches(Lazy(), config, PAD))
    training.assert_same_bits(lazy, list(batches(examples, config, PAD)))
    assert sorted(asked) == list(range(7))


def check_resumed_training(train) -> None:
    """Stopped, saved, loaded and resumed, a run has the same bits."""

    def begin(state):
        model = tiny_gpt(100 * bool(state))
        examples, config = EXAMPLES, CONFIG
        return train(model, examples, config, pad_id=PAD, state=state)

    with TemporaryDirectory() as folder:
        training.check_resume(begin, (2, 3), Path(folder) / "sft.pt")


# Rejection sampling

WON_OR_LOST = st.sampled_from([0.0, 1.0])  # where often nothing is right
EARNED = strategies.groups() | strategies.groups(elements=WON_OR_LOST)


def lengths_for(rewards, seed=1):
    return torch.randint(1, 30, rewards.shape, generator=generator(seed))


def chosen(select, rewards, seed=0):
    return select(rewards, lengths_for(rewards), generator(seed))


def check_ranks_alone_count(select) -> None:
    """BON-4, RAFT-2: any rising map that leaves 0 where it is changes nothing."""

    @common.forall(st.tuples(EARNED, st.integers(0, 9)), examples=15)
    def holds(drawn):
        rewards, seed = drawn
        expected = chosen(select, rewards, seed)
        for risen in (rewards**3, 7 * rewards, torch.expm1(rewards)):
            assert torch.equal(chosen(select, risen, seed), expected)

    holds()


def check_places_do_not_count(select) -> None:
    """RAFT-2: where nothing ties, the same answers are kept wherever they stand."""

    @common.forall(st.permutations(range(-3, 9)), examples=15)
    def holds(order):
        rewards = common.float64(order).view(3, 4)
        lengths, kept = lengths_for(rewards), chosen(select, rewards)
        for dim in (0, 1):
            moved = select(rewards.flip(dim), lengths, generator(3))
            assert torch.equal(moved.flip(dim), kept)

    holds()


def check_all_above_0(select) -> None:
    """Right is what earned more than 0."""

    @common.forall(EARNED, examples=20)
    def holds(rewards):
        kept = chosen(select, rewards)
        assert kept.tolist() == [[r > 0 for r in row] for row in rewards.tolist()]

    holds()


def check_one_best_answer(select) -> None:
    """BON-6: exactly one of the best of each problem, none where nothing is right."""

    @common.forall(st.tuples(EARNED, st.integers(0, 9)), examples=20)
    def holds(drawn):
        rewards, seed = drawn
        best = chosen(select, rewards, seed)
        answered = (rewards > 0).any(1)
        assert torch.equal(best.sum(1), answered.long())
        assert (rewards[best] == rewards.amax(1)[answered]).all()

    holds()


def check_best_of_all(select) -> None:
    """As many as there are problems, of all answers that earned more than 0."""

    @common.forall(st.tuples(EARNED, st.integers(0, 9)), examples=20)
    def holds(drawn):
        rewards, seed = drawn
        top = chosen(select, rewards, seed)
        right = rewards > 0
        assert top.sum() == min(len(rewards), int(right.sum()))
        assert (rewards[top] > 0).all()
        left = rewards[right & ~top]
        assert not len(left) or left.max() <= rewards[top].min()

    holds()


def check_ties_by_lot(select) -> None:
    """Of 3 equals in 4,000 groups each is taken as often, within 6 sigma; the generator
    says which."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 1.0]]).expand(4000, -1)
    lengths = torch.ones_like(rewards, dtype=torch.int64)
    kept = select(rewards, lengths, generator())
    first, *equals = kept.sum(0).tolist()
    assert first == 0 and sum(equals) == 4000
    assert all(abs(x - 4000 / 3) < 6 * math.sqrt(4000 * 2 / 9) for x in equals)
    assert not torch.equal(select(rewards, lengths, generator(1)), kept)


def check_as_many_tokens(select) -> None:
    """The control has the tokens of all right answers, and up to one answer more."""

    @common.forall(st.tuples(EARNED, st.integers(0, 9)), examples=20)
    def holds(drawn):
        rewards, seed = drawn
        lengths = lengths_for(rewards)
        kept = select(rewards, lengths, generator(seed))
        wanted, held = lengths[rewards > 0].sum(), lengths[kept].sum()
        assert wanted <= held
        assert not kept.any() or held - lengths[kept].max() < wanted

    holds()


def check_rewards_do_not_choose(select) -> None:
    """They say how many tokens are kept; lots alone say which answers: in 4,000 groups
    a right answer is kept as often as a wrong one, within 6 sigma."""
    rewards = torch.tensor([[1.0, 0.0]]).expand(4000, -1)
    lengths = torch.ones_like(rewards, dtype=torch.int64)
    kept = select(rewards, lengths, generator())
    right, wrong = kept.sum(0).tolist()
    assert right + wrong == 4000
    assert abs(right - wrong) < 6 * math.sqrt(4000)
    assert not torch.equal(select(rewards, lengths, generator(1)), kept)


def check_pool_of_one_round(keep) -> None:
    """The new answers; and neither pool is changed."""
    a, b = [([1], [2])], [([3], [4, 5])]
    assert keep(a, b) == [([3], [4, 5])]
    assert len(a) == len(b) == 1


def check_pool_beside_given(keep_with) -> None:
    """The new answers and the given ones, whatever was kept before; no pool is
    changed, and the next round finds no more than these."""
    given, a, b = [([7], [8])], [([1], [2])], [([3], [4, 5])]
    keep = keep_with(given)
    for _ in range(2):
        assert keep(a, b) == [([3], [4, 5]), ([7], [8])]
    assert len(a) == len(b) == len(given) == 1


def check_pool_of_all_rounds(keep) -> None:
    """Both rounds' answers; and the pool that was is left as it was."""
    a, b = [([1], [2])], [([3], [4, 5])]
    assert keep(a, b) == [([1], [2]), ([3], [4, 5])]
    assert len(a) == len(b) == 1
