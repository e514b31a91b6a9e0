"""What reading, sampling and collating owe: of forward, generate, collate ..."""

import torch
from hypothesis import strategies as st

from minialign.model import KVCache
from tests import test_model as models
from tests import test_sampling as sampled
from tests.properties.common import E64, forall

close = torch.testing.assert_close


def read(forward, model, *call):
    with torch.no_grad():
        return model.logits(forward(model, *call))


def check_cached_columns(forward) -> None:
    """GEN-1: however a sequence is split, its logits are those of one forward."""
    model, tokens = models.make(), models.ids(3, 9)
    for padding in (None, torch.tensor([3, 0, 5])):
        full = read(forward, model, tokens, None, padding)
        for chunks in ((9,), (1,) * 9, (5, 1, 1, 2), (2, 7)):
            cache, parts = KVCache(model, 3, 9), []
            for columns in tokens.split(chunks, dim=1):
                first = padding if cache.used == 0 else None
                parts.append(read(forward, model, columns, cache, first))
            close(torch.cat(parts, dim=1), full, **E64)


def check_padding_is_unseen(forward) -> None:
    """GEN-3: left, right and no padding agree where there is text."""
    model, tokens, padding = models.make(), models.ids(3, 8), [0, 2, 6]
    alone = read(forward, model, tokens)
    right = torch.cat((tokens, tokens[:, :4]), dim=1)
    close(read(forward, model, right)[:, :8], alone, **E64)
    left = models.pad_left(tokens, padding)
    found = read(forward, model, left, None, torch.tensor(padding))
    for b, n in enumerate(padding):
        close(found[b, n : n + 8], alone[b], **E64)


def rolled(generate, model, prompts, seed=0, steps=8, pad_id=sampled.PAD, **options):
    call = {"eos_id": sampled.EOS, "pad_id": pad_id, "max_new_tokens": steps}
    dice = None if options.get("greedy") else sampled.dice(seed)
    return generate(model, prompts, generator=dice, **call, **options)


def check_rollout(generate) -> None:
    """GEN-10, GEN-11: prompt, response and padding stand where they should.

    A row stops at its first EOS, which is a choice like any other, or is truncated.
    """
    draws = st.tuples(
        sampled.prompt_lists, st.integers(1, 4), st.integers(1, 10), sampled.biases
    )

    @forall(draws, examples=15)
    def holds(drawn):
        prompts, samples, steps, bias = drawn
        model = sampled.Policy(bias)
        rollout = rolled(generate, model, prompts, steps=steps, samples=samples)
        T = rollout.tokens.shape[1]
        for b, response in enumerate(rollout.responses()):
            prompt, row = prompts[b // samples], rollout.tokens[b].tolist()
            start, n = len(prompt), len(response)
            assert row == prompt + response + [sampled.PAD] * (T - start - n)
            live = [start - 1 <= s < start - 1 + n for s in range(T - 1)]
            assert rollout.mask[b].tolist() == live
            assert 1 <= n <= steps and sampled.EOS not in response[:-1]
            assert bool(rollout.truncated[b]) == (response[-1] != sampled.EOS)
            assert response[-1] == sampled.EOS or n == steps
            assert (rollout.logprobs[b][~rollout.mask[b]] == 0).all()

    holds()


def check_control_tokens_are_told_by_place(generate) -> None:
    """EOS or padding in a prompt is text, and a pad that was chosen is a choice."""
    model = sampled.Policy(2.0, at=sampled.PAD)
    prompts = [[sampled.EOS, sampled.PAD, sampled.EOS], [sampled.PAD, 5]]
    rollout = rolled(generate, model, prompts, samples=8)
    responses = rollout.responses()
    for b, response in enumerate(responses):
        prompt = prompts[b // 8]
        assert rollout.tokens[b, : len(prompt)].tolist() == prompt
        assert rollout.mask[b].sum() == len(response)
    assert sum(response.count(sampled.PAD) for response in responses) > 16


def check_teacher_forcing(generate) -> None:
    """GEN-8: what was recorded is what the model, forced, says at the temperature."""
    for temperature in (0.7, 1.0, 1.5):
        model, K = sampled.Policy(-1.0), 3
        options = {"samples": K, "temperature": temperature}
        rollout = rolled(generate, model, sampled.PROMPTS, **options)
        assert rollout.temperature == temperature
        for b, response in enumerate(rollout.responses()):
            row = sampled.PROMPTS[b // K] + response
            expected = sampled.scored(model, row, temperature)[-len(response) :]
            close(rollout.logprobs[b][rollout.mask[b]], expected, **E64)


def check_model_left_alone(generate) -> None:
    """GEN-7, GEN-12: its modes and weights, torch's own generator, gradients on."""
    model = sampled.Policy()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    rolled(generate, model, sampled.PROMPTS)
    assert torch.equal(torch.get_rng_state(), state), "torch's generator moved"
    assert modes == [module.training for module in model.modules()]
    for name, x in model.state_dict().items():
        assert torch.equal(x, weights[name]), f"{name} changed"
    assert torch.is_grad_enabled()


def check_chunks_are_new_draws(generate) -> None:
    """In chunks: the draws of one call after the other, with one generator."""
    model, prompts = sampled.Policy(sampled.OFTEN), [[1, 4]] * 4
    call = {"eos_id": sampled.EOS, "pad_id": sampled.PAD, "max_new_tokens": 8}
    for size in (1, 3):
        whole = generate(model, prompts, generator=sampled.dice(), chunk=size, **call)
        dice, parts = sampled.dice(), []
        for i in range(0, 4, size):
            part = generate(model, prompts[i : i + size], generator=dice, **call)
            parts += part.responses()
        assert whole.responses() == parts


def check_collated(collate) -> None:
    """Row by row and slot by slot; token 0 is the pad and may be any token."""
    ids = st.lists(st.integers(0, 9), min_size=1, max_size=5)
    calls = st.tuples(st.lists(st.tuples(ids, ids), min_size=1, max_size=4),
                      st.booleans())  # fmt: skip

    @forall(calls, examples=20)
    def holds(call):
        examples, learn_prompt = call
        tokens, mask = collate(examples, 0, learn_prompt)
        T = max(len(prompt) + len(response) for prompt, response in examples)
        assert tokens.shape == (len(examples), T)
        assert mask.shape == (len(examples), T - 1)
        for row, (prompt, response) in enumerate(examples):
            said = prompt + response
            assert tokens[row].tolist() == said + [0] * (T - len(said))
            first = 1 if learn_prompt else len(prompt)
            for s in range(T - 1):  # slot s scores the token at s + 1
                assert mask[row, s].item() == (first <= s + 1 < len(said))

    holds()


def check_eos_is_learnt_where_it_is_the_pad(collate) -> None:
    """SFT-6: the live labels of a row are its answer and its EOS."""
    tokens, mask = collate([([5], [6, 7, 2]), ([5], [6, 2])], 2)
    assert mask.sum(1).tolist() == [3, 2]
    assert tokens[:, 1:][mask].tolist() == [6, 7, 2, 6, 2]
