"""The transformer: against a slow one written from the paper's formulas, and itself."""

import cmath
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minialign.model import GPT, GPTConfig, KVCache, ScalarHead
from tests.properties.common import E64
from tests.properties.sampling import TINY, ids, make, pad_left

V = TINY.vocab_size
CONFIGS = [TINY, replace(TINY, kv_heads=2), replace(TINY, kv_heads=1, tied=True)]
NAMES = ["multi-head", "grouped", "one kv head, tied"]
EVERY = pytest.mark.parametrize("config", CONFIGS, ids=NAMES)


def logits(model, tokens, cache=None, padding=None):
    with torch.no_grad():
        return model.logits(model(tokens, cache, padding))


def differ(a, b, by=1e-3):
    return bool((a - b).abs().max() > by)


# Against the formulas


def naive_logits(model, row):
    """The forward pass of one sequence, token by token and head by head."""
    config, weights = model.config, model.state_dict()
    W = {name: weight.tolist() for name, weight in weights.items()}
    n, d = config.heads, config.dim // config.heads
    group = n // config.kv_heads

    def dot(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True))

    def times(matrix, x):
        return [dot(line, x) for line in matrix]

    def norm(x, weight):
        size = math.sqrt(dot(x, x) / len(x) + config.norm_eps)
        return [v / size * w for v, w in zip(x, weight, strict=True)]

    def turned(x, position):
        """RoPE as the paper has it: multiply complex numbers by e^(i position theta)"""
        half = len(x) // 2
        out = [
            complex(x[i], x[i + half])
            * cmath.exp(1j * position * config.rope_theta ** (-2 * i / len(x)))
            for i in range(half)
        ]
        return [z.real for z in out] + [z.imag for z in out]

    xs = [W["embed_tokens.weight"][token] for token in row]
    for layer in range(config.layers):

        def w(name, layer=layer):
            return W[f"layers.{layer}.{name}.weight"]

        hs = [norm(x, w("input_layernorm")) for x in xs]
        q, k, v = (
            [times(w(f"self_attn.{name}_proj"), h) for h in hs] for name in "qkv"
        )
        for t in range(len(xs)):
            mixed = []
            for head in range(n):
                mine = slice(head * d, (head + 1) * d)
                theirs = slice(head // group * d, (head // group + 1) * d)
                query = turned(q[t][mine], t)
                scores = [
                    dot(query, turned(k[s][theirs], s)) / math.sqrt(d)
                    for s in range(t + 1)
                ]
                exps = [math.exp(score - max(scores)) for score in scores]
                for i in range(d):
                    parts = [e * v[s][theirs][i] for s, e in enumerate(exps)]
                    mixed.append(sum(parts) / sum(exps))
            added = times(w("self_attn.o_proj"), mixed)
            xs[t] = [a + b for a, b in zip(xs[t], added, strict=True)]
        for t in range(len(xs)):
            h = norm(xs[t], w("post_attention_layernorm"))
            gate = times(w("mlp.gate_proj"), h)
            up = times(w("mlp.up_proj"), h)
            inner = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
            added = times(w("mlp.down_proj"), inner)
            xs[t] = [a + b for a, b in zip(xs[t], added, strict=True)]
    head = W["embed_tokens.weight" if config.tied else "lm_head.weight"]
    return [times(head, norm(x, W["norm.weight"])) for x in xs]


@EVERY
def test_forward_is_the_textbook_transformer(config):
    model, tokens = make(config), ids(2, 7)
    expected = torch.tensor(
        [naive_logits(model, row) for row in tokens.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(logits(model, tokens), expected, **E64)
    assert expected.std() > 0.5


def test_parameters_have_the_names_and_shapes_of_a_llama_checkpoint():
    model = make(CONFIGS[1])
    one_layer = {
        "self_attn.q_proj.weight": (16, 16),
        "self_attn.k_proj.weight": (8, 16),
        "self_attn.v_proj.weight": (8, 16),
        "self_attn.o_proj.weight": (16, 16),
        "mlp.gate_proj.weight": (24, 16),
        "mlp.up_proj.weight": (24, 16),
        "mlp.down_proj.weight": (16, 24),
        "input_layernorm.weight": (16,),
        "post_attention_layernorm.weight": (16,),
    }
    expected = {
        "embed_tokens.weight": (11, 16),
        "norm.weight": (16,),
        "lm_head.weight": (11, 16),
    }
    for layer in range(2):
        expected |= {f"layers.{layer}.{k}": v for k, v in one_layer.items()}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert "lm_head.weight" not in make(CONFIGS[2]).state_dict()


# The past, the padding, the batch


@EVERY
def test_the_future_is_unseen(config):
    model, tokens = make(config), ids(2, 9)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    before, after = logits(model, tokens), logits(model, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert differ(before[:, 5:], after[:, 5:])


@st.composite
def splits(draw, total):
    """Lengths of consecutive chunks that make up `total`."""
    chunks = []
    while sum(chunks) < total:
        chunks.append(draw(st.integers(1, total - sum(chunks))))
    return chunks


@given(st.sampled_from(CONFIGS), splits(9), st.booleans())
def test_cached_logits_equal_the_full_forward_however_it_is_split(
    config, chunks, padded
):
    model, tokens = make(config), ids(3, 9)
    padding = torch.tensor([3, 0, 5]) if padded else None
    cache = KVCache(model, 3, 9)
    parts, start = [], 0
    for n in chunks:
        first = padding if start == 0 else None
        parts.append(logits(model, tokens[:, start : start + n], cache, first))
        start += n
    assert cache.used == cache.capacity == 9
    full = logits(model, tokens, padding=padding)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, **E64)


def test_a_cache_that_forgets_its_columns_position_is_noticed():
    model, tokens = make(), ids(2, 6)

    def last(forget):
        cache = KVCache(model, 2, 6)
        logits(model, tokens[:, :5], cache)
        if forget:
            turn = torch.arange(len(model.cos)) - 5
            model.cos, model.sin = model.cos[turn], model.sin[turn]
        return logits(model, tokens[:, 5:], cache)[:, 0]

    full = logits(model, tokens)[:, -1]
    torch.testing.assert_close(last(forget=False), full, **E64)
    assert differ(last(forget=True), full)


@given(st.lists(st.integers(0, 6), min_size=3, max_size=3), st.integers(0, 10))
def test_left_right_and_no_padding_agree(padding, pad_id):
    model, tokens = make(CONFIGS[1]), ids(3, 8)
    alone = logits(model, tokens)
    right = torch.cat((tokens, torch.full((3, 4), pad_id)), dim=1)
    torch.testing.assert_close(logits(model, right)[:, :8], alone, **E64)
    left = pad_left(tokens, padding, pad_id)
    found = logits(model, left, padding=torch.tensor(padding))
    assert found.isfinite().all()  # at the pad columns too: each sees something
    assert model.visible(0, left.shape[1], torch.tensor(padding)).any(dim=-1).all()
    for b, n in enumerate(padding):
        torch.testing.assert_close(found[b, n : n + 8], alone[b], **E64)


def test_left_padding_that_is_not_declared_is_noticed():
    model, tokens = make(), ids(2, 6)
    left = pad_left(tokens, [4, 4])
    shown, alone = logits(model, left)[:, 4:], logits(model, tokens)
    assert differ(shown, alone, by=0.1)


@EVERY
def test_rows_do_not_meet(config):
    model, tokens = make(config), ids(4, 7)
    padding, order = torch.tensor([0, 2, 1, 3]), torch.tensor([2, 0, 3, 1])
    together = logits(model, tokens, padding=padding)
    shuffled = logits(model, tokens[order], padding=padding[order])
    torch.testing.assert_close(shuffled, together[order], **E64)
    for b in range(4):
        alone = logits(model, tokens[b : b + 1], padding=padding[b : b + 1])
        torch.testing.assert_close(alone[0], together[b], **E64)


# The cache's rows


@given(
    st.integers(1, 3),
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.booleans(),
)
def test_kept_and_repeated_rows_go_on_as_if_alone(k, rows, padded):
    model, tokens, rows = make(CONFIGS[1]), ids(6, 8), torch.tensor(rows)
    padding = torch.tensor([0, 4, 1, 3, 2, 0]) if padded else None
    cache = KVCache(model, 6, 8)
    logits(model, tokens[:, :5], cache, padding)
    cache.keep(rows)
    cache.repeat(k)
    rows = rows.repeat_interleave(k)
    found = logits(model, tokens[rows, 5:], cache)
    expected = logits(model, tokens, padding=padding)[rows, 5:]
    torch.testing.assert_close(found, expected, **E64)


def test_dropping_rows_takes_no_new_storage():
    model = make()
    cache = KVCache(model, 4, 8)
    logits(model, ids(4, 5), cache)
    before = cache.store.data_ptr()
    cache.keep(torch.tensor([1, 3]))
    assert cache.store.data_ptr() == before and cache.store.shape[2] == 2


# Weights and gradients


def test_the_generator_alone_decides_the_weights():
    state = torch.get_rng_state()
    a, b, other = (
        GPT(CONFIGS[0], torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert differ(a.embed_tokens.weight, other.embed_tokens.weight)


def test_initial_scales():
    config = GPTConfig(vocab_size=400, dim=128, layers=8, hidden=300)
    model = GPT(config, torch.Generator().manual_seed(0))
    for name, weight in model.state_dict().items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        fan_in = 300 if "down_proj" in name else 128
        residual = "o_proj" in name or "down_proj" in name
        scale = (1 / 4 if residual else 1) / math.sqrt(fan_in)  # sqrt(2 * 8) = 4
        assert 0.97 < float(weight.std()) / scale < 1.03, name
        assert abs(float(weight.mean())) < 0.05 * scale, name


@EVERY
def test_every_parameter_gets_a_gradient(config):
    model = make(config)
    model.logits(model(ids(2, 6)))[..., 3].sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 1e-6, name


def test_gradient_of_a_weight_is_the_slope():
    model, tokens = make(CONFIGS[1]), ids(2, 5)
    target = model.layers[0].self_attn.k_proj.weight
    score = model.logits(model(tokens)).log_softmax(-1)[..., 2].sum()
    (gradient,) = torch.autograd.grad(score, target)
    direction = torch.randn(target.shape, generator=torch.Generator().manual_seed(2))
    step = 1e-6 * direction.double()

    def moved(by):
        with torch.no_grad():
            target.add_(by)
            value = logits(model, tokens).log_softmax(-1)[..., 2].sum()
            target.sub_(by)
        return value

    slope = (moved(step) - moved(-step)) / 2e-6
    expected = (gradient * direction).sum()
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)


def test_forward_changes_nothing():
    model, tokens = make(), ids(2, 6)
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state, given = torch.get_rng_state(), tokens.clone()
    model(tokens)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tokens, given)
    assert modes == [module.training for module in model.modules()]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


def test_half_precision_follows_float32():
    model, tokens = GPT(CONFIGS[0], torch.Generator().manual_seed(0)), ids(2, 6)
    exact = logits(model, tokens)
    rounded = logits(model.bfloat16(), tokens)
    assert rounded.dtype == torch.bfloat16
    assert not differ(rounded.float(), exact, by=0.1)


def test_scalar_head_is_one_number_per_position():
    head, hidden = ScalarHead(16).double(), make()(ids(2, 6)).detach()
    assert torch.equal(head(hidden), torch.zeros(2, 6, dtype=torch.float64))
    with torch.no_grad():
        head.weight.copy_(torch.arange(16.0))
        head.bias.fill_(-2.0)
    weights = torch.arange(16.0, dtype=torch.float64)
    torch.testing.assert_close(head(hidden), (hidden * weights).sum(-1) - 2, **E64)
    head(hidden)[0, 3].backward()
    torch.testing.assert_close(head.weight.grad, hidden[0, 3], **E64)


# Refusals


@pytest.mark.parametrize(
    "change, named",
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"context": 0}, "context"),
        ({"layers": 0}, "layers"),
        ({"hidden": -1}, "hidden"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"heads": 0}, "heads"),
        ({"heads": 3, "kv_heads": 3}, "heads"),
        ({"dim": 12}, "dim"),
        ({"kv_heads": 3}, "kv_heads"),
    ],
)
def test_impossible_configurations_are_refused(change, named):
    with pytest.raises(ValueError, match=named):
        replace(TINY, **change)


@pytest.mark.parametrize(
    "tokens, named",
    [
        (ids(5), r"\(5,\)"),
        (ids(2, 3, 4), "tokens"),
        (ids(2, 5).int(), "int32"),
        (ids(2, 5).double(), "float64"),
        (ids(2, 21), "20 columns"),
    ],
)
def test_other_tokens_are_refused(tokens, named):
    error = ValueError if tokens.dtype == torch.int64 else TypeError
    with pytest.raises(error, match=named):
        make()(tokens)


def test_the_whole_context_can_be_used():
    assert logits(make(), ids(1, 20)).shape == (1, 20, 11)


def test_a_misused_cache_is_refused():
    model, tokens = make(), ids(2, 5)
    with pytest.raises(ValueError, match="no_grad"):
        model(tokens, KVCache(model, 2, 8))
    cache = KVCache(model, 2, 8)
    logits(model, tokens, cache)
    with pytest.raises(ValueError, match="first call"):
        logits(model, tokens[:, :1], cache, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="room for 8"):
        logits(model, tokens[:, :4], cache)
    roomy = KVCache(model, 2, 30)
    logits(model, ids(2, 20), roomy)
    with pytest.raises(ValueError, match="room for 20"):
        logits(model, tokens[:, :1], roomy)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1)])
def test_padding_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="padding"):
        make()(ids(2, 5), padding=torch.zeros(shape, dtype=torch.int64))
