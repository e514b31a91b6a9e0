"""A world of 15 answers, in which every expectation is a sum and nothing is noise.

There is one question. An answer is made of three tokens: `a`, `b`, and `.`, which ends
it. After three tokens it is cut off, so that there are 15 answers: seven that end and
eight that do not. An answer is *right* if it ends and holds exactly one `b`.

A policy is a table of *logits* (7, 3): one row for each of the 7 beginnings after which
a token has to be chosen, one column a token. So it can give the 15 answers any chances
at all, and what a method makes of it is due to the method alone. All is float64, on the
CPU.

    token_logprobs, chances     what a policy says of every answer
    kl, best_policy             distances, and the best policy at a price of distance
    gradient                    of any number that the policy determines
    expected_gradient           of a loss on answers that are drawn: the mean over draws
"""

from collections.abc import Callable

import torch
from torch import Tensor

ALPHABET = "ab."
LONGEST = 3  # tokens


def _list_answers() -> tuple[list[str], list[str]]:
    """All beginnings that are not yet answers, and all answers."""
    beginnings = [""]
    answers = []
    for beginning in beginnings:  # the list grows while we walk along it
        for token in ALPHABET:
            text = beginning + token
            if token == "." or len(text) == LONGEST:
                answers.append(text)
            else:
                beginnings.append(text)
    return beginnings, answers


def _choices() -> tuple[Tensor, Tensor]:
    """(15, 3) each: the row of the table at every choice of an answer, and the column.

    Where an answer has no token any more, both are those of its last one.
    """
    states = []
    tokens = []
    for answer in ANSWERS:
        places = [min(place, len(answer) - 1) for place in range(LONGEST)]
        states.append([BEGINNINGS.index(answer[:place]) for place in places])
        tokens.append([ALPHABET.index(answer[place]) for place in places])
    return torch.tensor(states), torch.tensor(tokens)


BEGINNINGS, ANSWERS = _list_answers()
STATES, TOKENS = _choices()  # (15, 3) each
LENGTHS = torch.tensor([len(answer) for answer in ANSWERS])  # (15,)
MASK = torch.arange(LONGEST) < LENGTHS[:, None]  # (15, 3)
ENDED = torch.tensor([float(answer[-1] == ".") for answer in ANSWERS]).double()  # (15,)
RIGHT = ENDED * torch.tensor([answer.count("b") == 1 for answer in ANSWERS])  # (15,)
EACH = torch.arange(len(ANSWERS))[:, None]  # (15, 1): groups of one answer


def random_policy(generator: torch.Generator, scale: float = 0.6) -> Tensor:
    """(7, 3) logits, each drawn from a normal distribution of this deviation."""
    shape = (len(BEGINNINGS), len(ALPHABET))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def token_logprobs(logits: Tensor) -> Tensor:
    """What a policy says of every choice in every answer.

    Shapes: (7, 3) -> (15, 3), 0 where an answer has no token. Units: nats.
    Gradient: through the logits. Raises: ValueError for another shape.
    """
    shape = (len(BEGINNINGS), len(ALPHABET))
    if logits.shape != shape:
        raise ValueError(f"logits: got {tuple(logits.shape)}, must be {shape}")
    every = logits.log_softmax(1)  # (7, 3)
    return torch.where(MASK, every[STATES, TOKENS], 0.0)


def chances(logits: Tensor) -> Tensor:
    """(7, 3) logits -> (15,): the chance of every answer. They sum to 1."""
    return token_logprobs(logits).sum(1).exp()


def kl(policy: Tensor, other: Tensor) -> Tensor:
    """KL(policy ‖ other) = Σ_y p(y) (log p(y) − log q(y)), in nats.

    Shapes: logits (7, 3), (7, 3) -> ().
    """
    apart = (token_logprobs(policy) - token_logprobs(other)).sum(1)  # (15,)
    return (chances(policy) * apart).sum()


def best_policy(reference: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """π* = reference · e^(r/β) / Z: no policy has more E[r] − β KL(π ‖ reference).

    Shapes: (7, 3) logits, (15,) -> (7, 3) logits. Raises: ValueError for other shapes,
    and for a beta that is not above 0.
    """
    _check(rewards, beta)
    share = (token_logprobs(reference).sum(1) + rewards / beta).softmax(0)  # (15,)
    # How much of all that passes through each choice of the table:
    passing = torch.zeros_like(reference)  # (7, 3)
    through = share.repeat_interleave(LENGTHS)  # one for each token of each answer
    passing.index_put_((STATES[MASK], TOKENS[MASK]), through, accumulate=True)
    return passing.log()


def best_value(reference: Tensor, rewards: Tensor, beta: float) -> float:
    """β log Z = β log Σ_y reference(y) e^(r(y)/β): what π* is worth.

    Shapes, raises: as `best_policy`. Units: of the reward.
    """
    _check(rewards, beta)
    scores = token_logprobs(reference).sum(1) + rewards / beta  # (15,)
    return beta * scores.logsumexp(0).item()


def _check(rewards: Tensor, beta: float) -> None:
    if rewards.shape != (len(ANSWERS),):
        raise ValueError(f"rewards: got {tuple(rewards.shape)}, must be (15,)")
    if not beta > 0:
        raise ValueError(f"beta: got {beta}, must be above 0")


def gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """The gradient of a number that the logits determine: (7, 3) -> (7, 3)."""
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def expected_gradient(
    loss: Callable[[Tensor], Tensor],
    logits: Tensor,
    chance: Tensor,
    groups: Tensor = EACH,
) -> Tensor:
    """E[∇ loss] over groups of answers that are drawn with `chance`.

    `loss` takes the log-probabilities (N K, 3) of a batch that holds every group once,
    and is a mean over groups that do not look at each other. As in a real run, how the
    answers were drawn is not differentiated.

    Shapes: logits (7, 3), chance (N,), groups (N, K) of answers' numbers -> (7, 3).
    Raises: ValueError for other shapes.
    """
    if groups.dim() != 2 or chance.shape != groups.shape[:1]:
        raise ValueError(
            f"chance: got {tuple(chance.shape)}, must be one number for each of the "
            f"{len(groups)} groups"
        )
    logits = logits.detach().requires_grad_()
    logprobs = token_logprobs(logits)  # (15, 3)
    rows = groups.flatten()  # (N K,)
    leaf = logprobs.detach()[rows].requires_grad_()  # (N K, 3)
    (slopes,) = torch.autograd.grad(loss(leaf), leaf)
    weights = len(groups) * chance  # (N,): each group counts by its chance
    slopes = slopes.view(*groups.shape, LONGEST) * weights[:, None, None]
    total = torch.zeros_like(logprobs).index_add(0, rows, slopes.flatten(0, 1))
    return torch.autograd.grad(logprobs, logits, total)[0]
