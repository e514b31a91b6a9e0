"""A policy small enough to enumerate: expectations are sums, and sums are exact.

Three tokens, one of which ends the response, and at most three of them: 15 responses.
With `.` for END and a, b for the other two,

    .                           1 of length 1: the response that ends at once
    a.  b.                      2 of length 2
    aa.  aaa  aab  ab.  ...    12 of length 3, of which 8 never end

The policy is a table, one row of logits for each of the 7 prefixes in which it must
choose, so it can represent *every* distribution over the 15 responses.

Sampling never enters. `expected_gradient(loss, logits, samples=k)` calls a loss on
every k-tuple of responses and weighs its gradient by the tuple's probability. What
remains between that and `true_gradient` is bias, to 1e-15, not noise.

Everything is float64 and indexed by response: row y of `RESPONSES`, `TOKENS`, `MASK`,
`STATES`, `LENGTHS`, and of what `token_logprobs` and `probabilities` return.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

VOCABULARY, STEPS, END = 3, 3, 2
PREFIXES = [p for n in range(STEPS) for p in itertools.product((0, 1), repeat=n)]
RESPONSES = [
    (*prefix, token)
    for prefix in PREFIXES
    for token in range(VOCABULARY)
    if token == END or len(prefix) == STEPS - 1
]
COUNT = len(RESPONSES)  # 15
LENGTHS = torch.tensor([len(response) for response in RESPONSES])  # (15,)
MASK = torch.arange(STEPS) < LENGTHS[:, None]  # (15, 3)


def _padded(row, fill=0):
    return [*row, *[fill] * (STEPS - len(row))]


TOKENS = torch.tensor([_padded(response) for response in RESPONSES])  # (15, 3)
# The prefix in which each token was chosen, as a row of the table of logits.
STATES = torch.tensor(
    [_padded([PREFIXES.index(y[:t]) for t in range(len(y))]) for y in RESPONSES]
)  # (15, 3)

# loss(rows, logprobs, mask): rows (k,) says which responses were drawn, so that a test
# can look up its own tables (rewards[rows]); logprobs and mask are (k, 3).
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


# The policy


def random_logits(seed: int, scale: float = 1.0) -> Tensor:
    """A generic policy: (7, 3) logits, one row for each prefix."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(PREFIXES), VOCABULARY
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def token_logprobs(logits: Tensor) -> Tensor:
    """(15, 3): log-probability of each token of each response; 0 at masked slots."""
    table = torch.log_softmax(logits, dim=-1)  # (7, 3)
    return torch.where(MASK, table[STATES, TOKENS], 0.0)


def sequence_logprobs(logits: Tensor) -> Tensor:
    """(15,): log-probability of each response."""
    return token_logprobs(logits).sum(1)


def probabilities(logits: Tensor) -> Tensor:
    """(15,): they sum to 1."""
    return sequence_logprobs(logits).exp()


def logits_of(distribution: Tensor) -> Tensor:
    """The table whose responses have these (15,) probabilities, all positive."""
    table = torch.zeros(len(PREFIXES), VOCABULARY, dtype=distribution.dtype)
    for weight, states, tokens, mask in zip(
        distribution, STATES, TOKENS, MASK, strict=True
    ):
        table[states[mask], tokens[mask]] += weight  # mass that passes through here
    return table.log()


# What it is trained for


def sequence_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy ‖ reference) over whole responses, in nats."""
    log_ratio = sequence_logprobs(logits) - sequence_logprobs(ref_logits)
    return (probabilities(logits) * log_ratio).sum()


def objective(
    logits: Tensor,
    rewards: Tensor,
    ref_logits: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """E[R] - beta KL(policy ‖ reference); rewards (15,)."""
    expected = (probabilities(logits) * rewards).sum()
    return expected if beta == 0 else expected - beta * sequence_kl(logits, ref_logits)


def true_gradient(
    logits: Tensor,
    rewards: Tensor,
    ref_logits: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """(7, 3): ∇(E[R] - beta KL). A right loss has minus this as expected gradient."""
    return gradient(lambda x: objective(x, rewards, ref_logits, beta), logits)


def optimum(rewards: Tensor, ref_logits: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The maximiser pi* = ref exp(r / beta) / Z (15,) and the maximum beta log Z."""
    weights = sequence_logprobs(ref_logits) + rewards / beta
    return torch.softmax(weights, dim=0), beta * torch.logsumexp(weights, dim=0)


# Expectations


def gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Of a scalar function, at these logits, by autograd."""
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def expectation(
    value: Loss, logits: Tensor, samples: int = 1, behaviour: Tensor | None = None
) -> Tensor:
    """E[value(rows, logprobs, mask)] over all tuples of `samples` responses."""
    logprobs = token_logprobs(logits).detach()
    total = torch.zeros((), dtype=logits.dtype)
    for rows, weight in _tuples(logits, samples, behaviour):
        total = total + weight * value(rows, logprobs[rows], MASK[rows])
    return total


def expected_gradient(
    loss: Loss, logits: Tensor, samples: int = 1, behaviour: Tensor | None = None
) -> Tensor:
    """(7, 3): E[∇ loss(rows, logprobs, mask)] over all tuples of `samples` responses.

    The draws are from the policy itself or, off-policy, from that of the `behaviour`
    logits. They are not differentiated, as a sampler's are not: only the log-probs are.
    The loss is called 15, 225 or 3375 times for 1, 2 or 3 samples; 3 take a second.
    """
    logits = logits.detach().clone().requires_grad_()
    logprobs = token_logprobs(logits)  # (15, 3)
    slopes = torch.zeros_like(logprobs)  # (15, 3), of the expected loss in logprobs
    for rows, weight in _tuples(logits, samples, behaviour):
        leaf = logprobs.detach()[rows].requires_grad_()  # (samples, 3)
        value = loss(rows, leaf, MASK[rows])
        if value.requires_grad:
            slopes.index_add_(0, rows, weight * torch.autograd.grad(value, leaf)[0])
    return torch.autograd.grad(logprobs, logits, slopes)[0]


def _tuples(logits, samples, behaviour):
    odds = probabilities(logits if behaviour is None else behaviour).detach()
    for rows in itertools.product(range(COUNT), repeat=samples):
        rows = torch.tensor(rows)
        yield rows, odds[rows].prod()


def cosine(a: Tensor, b: Tensor) -> float:
    """How far two gradients agree in direction: 1 is a pure rescaling."""
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
