"""Sampling: the rollout's form, its log-probs, its randomness and what it costs."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minialign import sampling
from minialign.logprobs import token_logprobs
from minialign.model import GPT, GPTConfig
from minialign.sampling import generate, invert, rescore
from tests.properties.common import E64
from tests.properties.sampling import (
    ALWAYS,
    CONTEXT,
    EOS,
    NEVER,
    OFTEN,
    PAD,
    PROMPTS,
    Policy,
    V,
    biases,
    prompt_lists,
    scored,
)
from tests.toy import generator as dice


def roll(model, prompts=PROMPTS, seed=0, steps=8, **options):
    if not options.get("greedy"):
        options.setdefault("generator", dice(seed))
    return generate(
        model, prompts, eos_id=EOS, pad_id=PAD, max_new_tokens=steps, **options
    )


def same(a, b, rows_a=slice(None), rows_b=slice(None)):
    """Equal responses and log-probs, row by row, whatever the padding."""
    pick = list(range(len(a.mask)))[rows_a], list(range(len(b.mask)))[rows_b]
    for i, j in zip(*pick, strict=True):
        assert a.responses()[i] == b.responses()[j]
        x, y = a.logprobs[i][a.mask[i]], b.logprobs[j][b.mask[j]]
        torch.testing.assert_close(x, y, **E64)


# Form


@settings(max_examples=40)
@given(prompt_lists, st.integers(1, 4), st.integers(1, 10), biases, st.booleans())
def test_a_rollout_is_what_it_says(prompts, samples, steps, bias, greedy):
    rollout = roll(Policy(bias), prompts, steps=steps, samples=samples, greedy=greedy)
    B, T = rollout.tokens.shape
    assert B == len(prompts) * samples
    assert rollout.mask.shape == rollout.logprobs.shape == (B, T - 1)
    assert rollout.mask.dtype == torch.bool and rollout.tokens.dtype == torch.int64
    assert (rollout.samples, rollout.greedy) == (samples, greedy)
    assert rollout.temperature == 1.0
    ends = []
    for b, response in enumerate(rollout.responses()):
        prompt, row = prompts[b // samples], rollout.tokens[b].tolist()
        start, n = len(prompt), len(response)
        assert rollout.prompt_lengths[b] == start and rollout.lengths()[b] == n
        assert row == prompt + response + [PAD] * (T - start - n)
        live = [start - 1 <= s < start - 1 + n for s in range(T - 1)]
        assert rollout.mask[b].tolist() == live
        # Stops at the first EOS, which is part of it, or when the budget is spent.
        assert 1 <= n <= steps and EOS not in response[:-1]
        assert bool(rollout.truncated[b]) == (response[-1] != EOS)
        assert response[-1] == EOS or n == steps
        assert (rollout.logprobs[b][~rollout.mask[b]] == 0).all()
        assert (rollout.logprobs[b][rollout.mask[b]] < 0).all() or bias == ALWAYS
        ends.append(start + n)
    assert max(ends) == T  # no column of padding alone
    assert not rollout.logprobs.requires_grad


def test_a_response_may_end_at_once_and_may_fill_the_context():
    at_once = roll(Policy(ALWAYS))
    assert at_once.responses() == [[EOS]] * 3 and not at_once.truncated.any()
    full = roll(Policy(NEVER), [[1] * 4], steps=CONTEXT - 4)
    assert full.tokens.shape == (1, CONTEXT) and full.truncated.all()


def test_control_tokens_are_told_by_place_not_by_id():
    prompts = [[EOS, PAD, EOS], [PAD, 5]]
    rollout = roll(Policy(2.0, at=PAD), prompts, samples=8)
    for b, response in enumerate(rollout.responses()):
        assert rollout.tokens[b, : len(prompts[b // 8])].tolist() == prompts[b // 8]
        assert rollout.mask[b].sum() == len(response)
    assert (
        Counter(itertools.chain(*rollout.responses()))[PAD] > 16
    )  # sampled, and counted
    replaced = roll(Policy(0.0), [[EOS, PAD, EOS]], seed=3)
    other_pad = generate(
        Policy(0.0),
        [[EOS, PAD, EOS]],
        eos_id=EOS,
        pad_id=7,
        max_new_tokens=8,
        generator=dice(3),
    )
    same(replaced, other_pad)


# Log-probs


@settings(max_examples=40)
@given(
    prompt_lists,
    st.sampled_from([0.7, 1.0, 1.5]),
    st.integers(0, 9),
    st.sampled_from([NEVER, -1.0, OFTEN]),
)
def test_logprobs_equal_teacher_forcing_at_the_temperature(
    prompts, temperature, seed, bias
):
    model = Policy(bias)
    rollout = roll(model, prompts, seed, samples=3, temperature=temperature)
    assert rollout.temperature == temperature
    for b, response in enumerate(rollout.responses()):
        row = prompts[b // 3] + response
        expected = scored(model, row, temperature)[-len(response) :]
        found = rollout.logprobs[b][rollout.mask[b]]
        torch.testing.assert_close(found, expected, **E64)
        if temperature != 1.0:
            forgotten = scored(model, row, 1.0)[-len(response) :]
            assert (found - forgotten).abs().max() > 1e-4


def test_greedy_takes_the_likeliest_and_scores_it_at_temperature_one():
    model = Policy(-1.0)
    rollout = roll(model, greedy=True, samples=2)
    for b, response in enumerate(rollout.responses()):
        row = list(PROMPTS[b // 2])
        for token in response:
            with torch.no_grad():
                assert (
                    int(model.logits(model(torch.tensor([row])))[0, -1].argmax())
                    == token
                )
            row.append(token)
        expected = scored(model, row, 1.0)[-len(response) :]
        torch.testing.assert_close(
            rollout.logprobs[b][rollout.mask[b]], expected, **E64
        )
    assert len({tuple(r) for r in rollout.responses()}) > 1


def test_a_low_temperature_approaches_greedy():
    model = Policy(-1.0)
    cold, greedy = roll(model, temperature=1e-4), roll(model, greedy=True)
    assert cold.responses() == greedy.responses()


def test_half_precision_is_scored_in_float32():
    rollout = roll(Policy(-1.0).bfloat16())
    assert rollout.logprobs.dtype == torch.float32


# Randomness


def chi_square(counts, probabilities, n):
    return sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probabilities))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_frequencies_follow_the_softmax(temperature):
    n, model = 20_000, Policy()
    rollout = roll(model, [[1, 4]], seed=1, steps=1, samples=n, temperature=temperature)
    counts = Counter(rollout.tokens[:, 2].tolist())
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([[1, 4]])))[0, -1].tolist()

    def softmax(temperature):
        exps = [math.exp(z / temperature) for z in logits]
        return [e / sum(exps) for e in exps]

    # 7 degrees of freedom: above 42.7 with probability 4e-7.
    assert chi_square(counts, softmax(temperature), n) < 42.7
    assert chi_square(counts, softmax(1.2 * temperature), n) > 42.7


@given(
    st.lists(
        st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1.0]), min_size=1, max_size=6
    ).filter(any)
)
def test_inversion_gives_each_id_its_share_of_the_unit_interval(weights):
    n, total = 1000, sum(weights)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    probabilities = torch.tensor(weights, dtype=torch.float64) / total
    drawn = Counter(invert(probabilities.expand(n, -1), u).tolist())
    for i, weight in enumerate(weights):
        assert abs(drawn[i] - n * weight / total) <= 1
        assert weight > 0 or drawn[i] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inversion_at_the_ends_takes_no_impossible_id(dtype):
    probabilities = torch.tensor([[0.0, 0.0, 0.3, 0.0, 0.7, 0.0]] * 2, dtype=dtype)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert invert(probabilities, ends).tolist() == [2, 4]


def test_inversion_sums_more_finely_than_the_probabilities_are_given():
    probabilities = torch.tensor([[1.0, 1e-9, 1e-9]])  # in float32 their sum is 1.0
    between = torch.tensor([1 - 1.5e-9], dtype=torch.float64)
    assert invert(probabilities, between).tolist() == [1]


def test_the_same_seed_gives_the_same_bits_and_torch_s_own_is_left_alone():
    model, state = Policy(OFTEN), torch.get_rng_state()
    a, b, other = (roll(model, seed=seed, samples=4) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs)
    assert a.responses() != other.responses()


def test_samples_of_a_prompt_differ_from_the_first_token_on():
    rollout = roll(Policy(), [[1, 4]], samples=64)
    first = Counter(response[0] for response in rollout.responses())
    assert len(first) >= 5 and max(first.values()) < 48


def test_a_row_never_depends_on_the_others():
    model = Policy(OFTEN)
    mine = roll(model, [[1, 4], [6], [3, 3, 3]], samples=4)
    # The same places among other prompts, which end at other times.
    among_others = roll(model, [[5] * 9, [6], [7]], samples=4)
    same(mine, among_others, slice(4, 8), slice(4, 8))
    assert mine.responses()[:4] != among_others.responses()[:4]


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("look, share", [(1, 0.0), (1, 0.5), (3, 0.25), (99, 0.0)])
def test_when_rows_are_dropped_changes_nothing(monkeypatch, greedy, look, share):
    model = Policy(OFTEN)
    prompts = PROMPTS if not greedy else [[a, b] for a in range(V) for b in range(V)]
    reference = roll(model, prompts, samples=6, greedy=greedy)
    monkeypatch.setattr(sampling, "LOOK_EVERY", look)
    monkeypatch.setattr(sampling, "DROP_SHARE", share)
    found = roll(model, prompts, samples=6, greedy=greedy)
    assert torch.equal(found.tokens, reference.tokens)
    same(found, reference)
    assert 1 < len(set(reference.lengths().tolist()))


@pytest.mark.parametrize("n", [1, 3, 7])
def test_a_smaller_budget_gives_the_beginning_of_the_same_answers(n):
    whole, part = (roll(Policy(-1.0), steps=steps, samples=5) for steps in (8, n))
    cut = [response[:n] for response in whole.responses()]
    assert part.responses() == cut
    assert part.truncated.tolist() == [EOS not in response for response in cut]


@pytest.mark.parametrize("n", [1, 4])
def test_sampling_goes_on_where_it_stopped(n):
    model, generator = Policy(NEVER), dice(2)
    whole = roll(model, steps=9, samples=1, seed=2)
    first = roll(model, steps=n, generator=generator)
    prompts = [p + r for p, r in zip(PROMPTS, first.responses(), strict=True)]
    second = roll(model, prompts, steps=9 - n, generator=generator)
    joined = zip(first.responses(), second.responses(), strict=True)
    assert whole.responses() == [a + b for a, b in joined]


def test_the_generator_moves_on_alike_whatever_is_sampled():
    short, long = dice(), dice()
    roll(Policy(ALWAYS), generator=short), roll(Policy(NEVER), generator=long)
    assert torch.equal(short.get_state(), long.get_state())
    assert not torch.equal(short.get_state(), dice().get_state())


# Cost


def test_prompts_are_read_once_and_finished_rows_are_not_fed():
    model = Policy(OFTEN)
    rollout = roll(model, samples=50, steps=16)
    assert model.calls[0] == (3, 5)  # 3 prompts, not 150 rows
    assert all(T == 1 for _, T in model.calls[1:])
    fed = [B for B, _ in model.calls[1:]]
    assert fed == sorted(fed, reverse=True) and fed[0] <= 150
    needed = int((rollout.lengths() - 1).sum())  # the last choice is never read
    assert needed <= sum(fed) < 1.5 * needed


def test_the_model_rests_when_all_have_ended():
    model = Policy(ALWAYS)
    roll(model, steps=16)
    assert len(model.calls) == 1
    once = Policy(NEVER)
    roll(once, steps=1)
    assert len(once.calls) == 1


# The model is left as it was


class Broken(Policy):
    def logits(self, hidden):
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("kind", [Policy, Broken])
def test_modes_and_weights_are_left_alone(kind):
    model = kind()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    if kind is Broken:
        with pytest.raises(RuntimeError, match="on purpose"):
            roll(model)
    else:
        roll(model)
    assert modes == [module.training for module in model.modules()]
    assert torch.is_grad_enabled()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


# Parts of a rollout


def test_selected_rows_are_rollouts_of_their_own():
    rollout = roll(Policy(OFTEN), samples=4, temperature=0.7)
    rows = torch.tensor([7, 2, 2])
    part = rollout.select(rows)
    assert part.responses() == [rollout.responses()[b] for b in rows]
    assert part.tokens.shape[1] == int((part.prompt_lengths + part.lengths()).max())
    for i, b in enumerate(rows):
        x = rollout.logprobs[b][rollout.mask[b]]
        assert torch.equal(part.logprobs[i][part.mask[i]], x)
        assert part.truncated[i] == rollout.truncated[b]
    assert part.temperature == 0.7 and part.samples == 1


@pytest.mark.parametrize("size", [1, 5, 12, 99])
def test_micro_batches_are_every_row_once_and_alike_in_length(size):
    rollout = roll(Policy(OFTEN), samples=4)
    parts = rollout.micro_batches(size)
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    assert all(len(part) == size for part in parts[:-1]) and len(parts[-1]) <= size
    used = rollout.prompt_lengths + rollout.lengths()
    columns = [used[part] for part in parts]
    for shorter, longer in itertools.pairwise(columns):
        assert shorter.max() <= longer.min()
    with pytest.raises(ValueError, match="size"):
        rollout.micro_batches(0)


# Refusals


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_chunks_are_drawn_one_after_the_other_and_joined(size):
    model, chance, prompts = Policy(OFTEN), dice(3), [*PROMPTS, [5] * 3]
    whole = roll(model, prompts, samples=2, chunk=size, generator=chance)
    again, row = dice(3), 0
    for i in range(0, 4, size):
        part = roll(model, prompts[i : i + size], samples=2, generator=again)
        rows = slice(row, row + len(part.tokens))
        same(whole, part, rows)
        T = part.tokens.shape[1]
        assert (whole.tokens[rows, T:] == PAD).all()
        assert not whole.mask[rows, T - 1 :].any()
        row += len(part.tokens)
    assert row == len(whole.tokens) and whole.samples == 2
    assert torch.equal(chance.get_state(), again.get_state())


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_rescoring_is_done_in_the_parts_it_is_given(temperature):
    model = Policy(OFTEN)
    rollout = roll(model, samples=2, temperature=temperature)
    parts = rollout.micro_batches(2)
    found = rescore(model, rollout, parts)
    for rows in parts:
        part = rollout.select(rows)
        alone = token_logprobs(model, part.tokens, part.mask, temperature)
        assert torch.equal(found[rows, : part.mask.shape[1]], alone)
        assert not found[rows, part.mask.shape[1] :].any()
    assert not found.requires_grad
    torch.testing.assert_close(found, rollout.logprobs, atol=1e-5, rtol=0)


def test_a_reference_may_have_another_precision():
    model = GPT(GPTConfig(V, CONTEXT, dim=16, layers=1, heads=2, kv_heads=1), dice())
    rollout = roll(Policy(OFTEN), samples=2)
    found = rescore(model, rollout, rollout.micro_batches(2))
    expected = token_logprobs(model, rollout.tokens, rollout.mask, 1.0)
    assert expected.dtype != found.dtype == rollout.logprobs.dtype
    torch.testing.assert_close(found, expected.detach().to(found), atol=1e-5, rtol=0)


def test_a_rollout_moves_whole():
    rollout = roll(Policy(OFTEN)).to(torch.device("meta"))
    tensors = [x for x in vars(rollout).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 5 and all(x.is_meta for x in tensors)


@pytest.mark.parametrize(
    "change, error, named",
    [
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"prompts": [[1], []]}, ValueError, r"prompts\[1\]"),
        ({"prompts": [[1], [3, 8]]}, ValueError, r"prompts\[1\]\[1\].*0..7.*8"),
        ({"prompts": [[-1]]}, ValueError, r"prompts\[0\]\[0\].*-1"),
        ({"prompts": [[1, 2.0]]}, TypeError, r"prompts\[0\]\[1\].*2.0"),
        ({"prompts": [[1] * 17]}, ValueError, "17 tokens.* 8.* 24"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 24}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens"),
        ({"samples": 0}, ValueError, "samples"),
        ({"temperature": 0.0}, ValueError, "temperature.*greedy"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"greedy": True, "temperature": 0.7}, ValueError, "greedy.*0.7"),
        ({"generator": None}, ValueError, "generator"),
        ({"eos_id": 8}, ValueError, "eos_id"),
        ({"pad_id": -1}, ValueError, "pad_id"),
        ({"pad_id": EOS}, ValueError, "differ"),
    ],
)
def test_impossible_requests_are_refused_before_the_model_runs(change, error, named):
    model = Policy()
    request = {
        "prompts": [[1]],
        "eos_id": EOS,
        "pad_id": PAD,
        "max_new_tokens": 8,
        "generator": dice(),
    }
    with pytest.raises(error, match=named):
        generate(model, **{**request, **change})
    assert not model.calls


@pytest.mark.parametrize("greedy", [False, True])
def test_a_broken_model_is_refused(greedy):
    model = Policy()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        roll(model, greedy=greedy)
