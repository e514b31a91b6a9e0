"""What reading, sampling and collating owe: of forward, generate, collate ..."""

import torch
from hypothesis import strategies as st

from minialign.model import GPT, GPTConfig, KVCache
from tests.properties.common import E64, forall
from tests.toy import generator

close = torch.testing.assert_close

# A model to read with, and one to draw from


TINY = GPTConfig(vocab_size=11, context=20, dim=16, layers=2, hidden=24)


def make(config=TINY, seed=0):
    """A float64 model whose logits are far from uniform and whose norms do something"""
    # Not .double() afterwards, which would leave the tables of RoPE rounded.
    torch.set_default_dtype(torch.float64)
    model = GPT(config, torch.Generator().manual_seed(seed))
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.copy_(torch.linspace(0.5, 1.5, len(weight)))
            else:
                weight.mul_(3.0)
    return model


def ids(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TINY.vocab_size, shape, generator=generator)


def pad_left(tokens, padding, pad_id=0):
    """Row b of `tokens`, with padding[b] pads before it and as many as fit after it."""
    T = tokens.shape[1] + max(padding)
    out = torch.full((len(tokens), T), pad_id)
    for b, n in enumerate(padding):
        out[b, n : n + tokens.shape[1]] = tokens[b]
    return out


V = 8
CONTEXT = 24
EOS = 2
PAD = 0
PROMPTS = [[1, 4, 5], [6], [1, 7, 7, 3, 4]]
NEVER, OFTEN, ALWAYS = -1e3, 1.0, 1e3  # biases of EOS


class Policy(GPT):
    """A float64 model of 8 tokens that stops more or less often, as `bias` says."""

    def __init__(self, bias: float = 0.0, seed: int = 0, at: int = EOS):
        config = GPTConfig(V, CONTEXT, dim=16, layers=2, heads=2, kv_heads=1, hidden=24)
        torch.set_default_dtype(torch.float64)
        super().__init__(config, torch.Generator().manual_seed(seed))
        self.bias = bias * torch.nn.functional.one_hot(torch.tensor(at), V)
        torch.set_default_dtype(torch.float32)
        self.calls = []

    def forward(self, tokens, cache=None, padding=None):
        self.calls.append(tuple(tokens.shape))
        return super().forward(tokens, cache, padding)

    def logits(self, hidden):
        return 1.5 * super().logits(hidden) + self.bias


def scored(model, row, temperature):
    """The log-probs of tokens 1, 2, ... of one sequence, forced on the model."""
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([row])))[0, :-1]
    z = logits / temperature
    z = z - z.exp().sum(dim=-1, keepdim=True).log()
    return z[torch.arange(len(row) - 1), torch.tensor(row[1:])]


prompt_lists = st.lists(
    st.lists(st.integers(0, V - 1), min_size=1, max_size=6), min_size=1, max_size=5
)


biases = st.sampled_from([NEVER, -1.0, OFTEN, ALWAYS])


# Properties


def read(forward, model, *call):
    with torch.no_grad():
        return model.logits(forward(model, *call))


def check_cached_columns(forward) -> None:
    """However a sequence is split, its logits are those of one forward."""
    model, tokens = make(), ids(3, 9)
    for padding in (None, torch.tensor([3, 0, 5])):
        full = read(forward, model, tokens, None, padding)
        for chunks in ((9,), (1,) * 9, (5, 1, 1, 2), (2, 7)):
            cache, parts = KVCache(model, 3, 9), []
            for columns in tokens.split(chunks, dim=1):
                first = padding if cache.used == 0 else None
                parts.append(read(forward, model, columns, cache, first))
            close(torch.cat(parts, dim=1), full, **E64)


def check_padding_is_unseen(forward) -> None:
    """Left, right and no padding agree where there is text."""
    model, tokens, padding = make(), ids(3, 8), [0, 2, 6]
    alone = read(forward, model, tokens)
    right = torch.cat((tokens, tokens[:, :4]), dim=1)
    close(read(forward, model, right)[:, :8], alone, **E64)
    left = pad_left(tokens, padding)
    found = read(forward, model, left, None, torch.tensor(padding))
    for b, n in enumerate(padding):
        close(found[b, n : n + 8], alone[b], **E64)


def rolled(generate, model, prompts, seed=0, steps=8, pad_id=PAD, **options):
    call = {"eos_id": EOS, "pad_id": pad_id, "max_new_tokens": steps}
    if not options.get("greedy"):
        options["generator"] = generator(seed)
    return generate(model, prompts, **call, **options)


def check_rollout(generate) -> None:
    """Prompt, response and padding stand where they should.

    A row stops at its first EOS, which is a choice like any other, or is truncated.
    """
    draws = st.tuples(prompt_lists, st.integers(1, 4), st.integers(1, 10), biases)

    @forall(draws, examples=15)
    def holds(drawn):
        prompts, samples, steps, bias = drawn
        model = Policy(bias)
        rollout = rolled(generate, model, prompts, steps=steps, samples=samples)
        T = rollout.tokens.shape[1]
        for b, response in enumerate(rollout.responses()):
            prompt, row = prompts[b // samples], rollout.tokens[b].tolist()
            start, n = len(prompt), len(response)
            assert row == prompt + response + [PAD] * (T - start - n)
            live = [start - 1 <= s < start - 1 + n for s in range(T - 1)]
            assert rollout.mask[b].tolist() == live
            assert 1 <= n <= steps and EOS not in response[:-1]
            assert bool(rollout.truncated[b]) == (response[-1] != EOS)
            assert response[-1] == EOS or n == steps
            assert (rollout.logprobs[b][~rollout.mask[b]] == 0).all()

    holds()


def check_control_tokens_are_told_by_place(generate) -> None:
    """EOS or padding in a prompt is text, and a pad that was chosen is a choice."""
    model = Policy(2.0, at=PAD)
    prompts = [[EOS, PAD, EOS], [PAD, 5]]
    rollout = rolled(generate, model, prompts, samples=8)
    responses = rollout.responses()
    for b, response in enumerate(responses):
        prompt = prompts[b // 8]
        assert rollout.tokens[b, : len(prompt)].tolist() == prompt
        assert rollout.mask[b].sum() == len(response)
    assert sum(response.count(PAD) for response in responses) > 16


def check_teacher_forcing(generate) -> None:
    """What was recorded is what the model, forced, says at the temperature."""
    for temperature in (0.7, 1.0, 1.5):
        model, K = Policy(-1.0), 3
        options = {"samples": K, "temperature": temperature}
        rollout = rolled(generate, model, PROMPTS, **options)
        assert rollout.temperature == temperature
        for b, response in enumerate(rollout.responses()):
            row = PROMPTS[b // K] + response
            expected = scored(model, row, temperature)[-len(response) :]
            close(rollout.logprobs[b][rollout.mask[b]], expected, **E64)


def check_model_left_alone(generate) -> None:
    """Its modes and weights, torch's own generator, gradients on."""
    model = Policy()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    rolled(generate, model, PROMPTS)
    assert torch.equal(torch.get_rng_state(), state), "torch's generator moved"
    assert modes == [module.training for module in model.modules()]
    for name, x in model.state_dict().items():
        assert torch.equal(x, weights[name]), f"{name} changed"
    assert torch.is_grad_enabled()


def check_chunks_are_new_draws(generate) -> None:
    """In chunks: the draws of one call after the other, with one generator."""
    model, prompts = Policy(OFTEN), [[1, 4]] * 4
    call = {"eos_id": EOS, "pad_id": PAD, "max_new_tokens": 8}
    for size in (1, 3):
        whole = generate(model, prompts, generator=generator(), chunk=size, **call)
        draw = generator()
        parts = []
        for i in range(0, 4, size):
            part = generate(model, prompts[i : i + size], generator=draw, **call)
            parts += part.responses()
        assert whole.responses() == parts


def check_collated(collate) -> None:
    """Row by row and slot by slot; token 0 is the pad and may be any token."""
    words = st.lists(st.integers(0, 9), min_size=1, max_size=5)
    examples = st.lists(st.tuples(words, words), min_size=1, max_size=4)
    calls = st.tuples(examples, st.booleans())

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
    """The live labels of a row are its answer and its EOS."""
    tokens, mask = collate([([5], [6, 7, 2]), ([5], [6, 2])], 2)
    assert mask.sum(1).tolist() == [3, 2]
    assert tokens[:, 1:][mask].tolist() == [6, 7, 2, 6, 2]
