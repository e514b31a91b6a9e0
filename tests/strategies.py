"""What the properties draw: only possible inputs, in float64, small enough to read.

Numbers come as 32-bit floats (exact in float64, and they shrink well). Every mask has a
live token; a row without one is possible and must count nowhere. Rewards tie often.
"""

import torch
from hypothesis import strategies as st

MAX_BATCH, MAX_LENGTH = 4, 8
MIN_GROUP, MAX_GROUP = 2, 6
REWARDS = (-1.0, 0.0, 0.1, 0.5, 1.0)  # few, so that they tie; 0.1 is not dyadic


def numbers(low: float = -10.0, high: float = 10.0):
    """Finite floats, both zeros and the tiny ones included."""
    return st.floats(low, high, allow_nan=False, width=32)


@st.composite
def tensors(draw, shape, elements=None):
    """A float64 tensor of this shape."""
    size = torch.Size(shape).numel()
    elements = numbers() if elements is None else elements
    values = draw(st.lists(elements, min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def shapes(max_batch=MAX_BATCH, max_length=MAX_LENGTH, min_batch=1):
    """(B, S)."""
    return st.tuples(st.integers(min_batch, max_batch), st.integers(1, max_length))


def logprobs(shape, low: float = -10.0):
    """Log-probabilities of unrelated choices: anything <= 0."""
    return tensors(shape, numbers(low, 0.0))


def logits(shape):
    """(..., V) next-token logits, not normalised."""
    return tensors(shape, numbers(-5.0, 5.0))


def distributions(shape):
    """(..., V) log-probabilities that sum to 1 over the last dimension."""
    return logits(shape).map(lambda x: torch.log_softmax(x, dim=-1))


def rewards(shape):
    """Raw scores from a small set, so that groups tie."""
    return tensors(shape, st.sampled_from(REWARDS))


@st.composite
def groups(draw, max_prompts=3, elements=None):
    """(prompts, K) rewards."""
    shape = draw(st.integers(1, max_prompts)), draw(st.integers(MIN_GROUP, MAX_GROUP))
    elements = st.sampled_from(REWARDS) if elements is None else elements
    return draw(tensors(shape, elements))


@st.composite
def rollout_masks(draw, shape):
    """Prompt, response, padding: one run of live slots per row, often from slot 0."""
    B, S = shape
    runs = []
    for _ in range(B):
        start = draw(st.just(0) | st.integers(0, S - 1))
        runs.append((start, draw(st.integers(start, S))))
    lucky = draw(st.integers(0, B - 1))  # this row has at least one live token
    start, end = runs[lucky]
    runs[lucky] = start, max(end, start + 1)
    return torch.tensor([[a <= s < b for s in range(S)] for a, b in runs])


@st.composite
def arbitrary_masks(draw, shape):
    """Any pattern with at least one live token."""
    size = shape[0] * shape[1]
    live = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    live[draw(st.integers(0, size - 1))] = True
    return torch.tensor(live).reshape(shape)


def masks(shape):
    """Masks of rollouts and masks of any other pattern."""
    return rollout_masks(shape) | arbitrary_masks(shape)


@st.composite
def batches(draw, *, shape=None, rows=(), **slots):
    """One call of a loss, by argument name: a mask, and tensors to go with it.

    `slots` names (B, S) arguments, each with the strategy that makes it from a shape;
    `rows` names (B,) arguments, which hold rewards. Example:
    `batches(logprobs=logprobs, ref_logprobs=logprobs, rows=("advantages",))`.
    """
    shape = draw(shapes()) if shape is None else shape
    batch = {name: draw(strategy(shape)) for name, strategy in slots.items()}
    batch |= {name: draw(rewards(shape[:1])) for name in rows}
    return batch | {"mask": draw(masks(shape))}


def without_dead_rows(case):
    """The same call with all slots live in rows that had none."""
    mask = case["mask"]
    return case | {"mask": mask | ~mask.any(1, keepdim=True)}
