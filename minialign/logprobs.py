"""Log-probabilities of tokens, sums over the live ones, KL estimates and ratios.

Four kinds of function every algorithm stands on:

    token_logprobs, logprobs_from_logits            what the policy gave to each token
    masked_sum, masked_mean, token_mean, ...        many slots -> one number
    kl_k1, kl_k2, kl_k3, kl_ratio_k3, exact_kl      how far from the reference
    probability_ratio                               how far from the sampling policy

Slot s of a (B, S) tensor scores the choice of `tokens[:, s + 1]`, and S = T - 1; `mask`
is True where the policy made that choice, EOS included. One rule holds throughout:
**mask before arithmetic**. What lies in a masked slot is replaced by 0 before anything
is computed from it. Multiplying by the mask afterwards gives nan * 0 = nan, and
`torch.where` afterwards gives the right value and a gradient of nan.
"""

import math
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from minialign.checks import (
    check_exponent,
    check_ids,
    check_live,
    check_logits,
    check_logprobs,
    check_mask,
    check_shapes,
    check_temperature,
    check_tokens,
    vocabulary,
)

# How many there are in the whole batch: a number of Python or numpy, or a 0-dim tensor.
Count = float | Tensor


class Model(Protocol):
    """What is scored: `GPT` is one, and so is a table in a test."""

    def __call__(self, tokens: Tensor) -> Tensor: ...  # (B, T) -> hidden (B, T, D)

    def logits(self, hidden: Tensor) -> Tensor: ...  # (..., D) -> (..., V)


# Log-probabilities


def token_logprobs(
    model: Model, tokens: Tensor, mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probability the model gives to every live token, given all tokens before it.

        logprobs[b, s] = log π(tokens[b, s+1] | tokens[b, ..s]) where mask[b, s], else 0

    Only live positions are projected to the vocabulary: the prompt's and the padding's
    logits are never made. Score at the temperature the tokens were sampled at.

    Shapes: tokens (B, T) int64, mask (B, T - 1) bool -> (B, T - 1).
    Units: nats, <= 0, float32 or better. Gradient: through the model.
    Raises: TypeError for tokens that are not int64 or a mask that is not bool;
        ValueError for other shapes, ids outside the vocabulary, logits that are not
        finite, a temperature that is not positive.
    """
    check_tokens(model, tokens, mask)
    check_temperature(temperature)
    rows, slots = mask.nonzero(as_tuple=True)  # (L,) each, of the L live tokens
    hidden = model(tokens[:, :-1])[rows, slots]  # (L, D)
    logits = model.logits(hidden)  # (L, V)
    check_logits("logits", logits)
    targets = tokens[rows, slots + 1]  # (L,)
    if vocabulary(model) == math.inf:  # it did not say, and ids are not known to fit
        check_ids("tokens", targets, logits.shape[-1])
    live = _of_targets(logits, targets, temperature)  # (L,)
    return live.new_zeros(mask.shape).index_put((rows, slots), live)  # (B, S)


def logprobs_from_logits(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each target under softmax(logits / temperature).

    Half-precision logits are lifted to float32 first: a sum over a thousand tokens in
    bfloat16 can be off by hundreds of nats.

    Shapes: logits (..., V), targets (...) int64 -> (...).
    Units: nats, <= 0. Gradient: through logits.
    Raises: TypeError for logits that are not floats or targets that are not int64;
        ValueError for other shapes, logits that are not finite, targets outside 0..V-1,
        a temperature that is not positive.
    """
    check_temperature(temperature)
    check_logits("logits", logits)
    check_shapes(**{"logits[..., 0]": logits[..., 0], "targets": targets})
    check_ids("targets", targets, logits.shape[-1])
    return _of_targets(logits, targets, temperature)


def _of_targets(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    scaled = at_least_float32(logits) / temperature  # (..., V)
    every = torch.log_softmax(scaled, dim=-1)  # (..., V)
    return every.gather(-1, targets[..., None]).squeeze(-1)  # (...)


# Reductions: many slots -> one number


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over the live slots of each row: of `logprobs`, log π(response | prompt).

    Shapes: x, mask (B, S) -> (B,); a row without a live token gives 0.
    Units: those of x. Gradient: 1 at live slots, exactly 0 at masked ones.
    Raises: as `check_mask` and `check_live`.
    """
    check_mask(mask)
    check_live("x", x, mask)
    return torch.where(mask, x, 0.0).sum(1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the live slots of each row: the length-normalised twin of `masked_sum`.

    Shapes: x, mask (B, S) -> (B,); a row without a live token gives 0.
    Units: those of x, per token. Gradient: 1 / live tokens of the row, 0 when masked.
    Raises: as `check_mask` and `check_live`.
    """
    return masked_sum(x, mask) / mask.sum(1).clamp(min=1)


def token_mean(x: Tensor, mask: Tensor, count: Count | None = None) -> Tensor:
    """Σ over live slots / number of live slots: every *token* weighs the same.

    Long rows weigh more than short ones. `count` is the number of live tokens of the
    whole batch when this is one micro-batch of it: then the parts add up to the whole.

    Shapes: x, mask (B, S) -> (). Units: those of x, per token. Reduction: token mean.
    Gradient: 1 / count at live slots.
    Raises: as `check_mask`, `check_live` and `normaliser`.
    """
    total = masked_sum(x, mask).sum()
    return total / normaliser(count, mask.sum())


def sequence_mean(x: Tensor, mask: Tensor, count: Count | None = None) -> Tensor:
    """Mean over rows of each row's mean over live slots: every *row* weighs the same.

    A token of a long row weighs less than one of a short row. `count` is the number of
    live rows (those with a live token) of the whole batch; other rows count nowhere.

    Shapes: x, mask (B, S) -> ().
    Units: those of x, per token. Reduction: sequence mean.
    Gradient: 1 / (count * live tokens of the row) at live slots.
    Raises: as `check_mask`, `check_live` and `normaliser`.
    """
    total = masked_mean(x, mask).sum()
    return total / normaliser(count, mask.any(1).sum())


def sequence_sum(x: Tensor, mask: Tensor, count: Count | None = None) -> Tensor:
    """Σ over live slots / number of rows: what the policy gradient theorem asks for.

    The only one of the three that leaves E[∇ loss] = -∇ E[R] unbiased: its divisor does
    not depend on how long the policy's answers turned out. `count` is the number of
    live rows (those with a live token) of the whole batch; other rows count nowhere.

    Shapes: x, mask (B, S) -> ().
    Units: those of x, per row. Reduction: sequence sum / B.
    Gradient: 1 / count at live slots.
    Raises: as `check_mask`, `check_live` and `normaliser`.
    """
    total = masked_sum(x, mask).sum()
    return total / normaliser(count, mask.any(1).sum())


def normaliser(count: Count | None, live: Tensor | int) -> Tensor | float:
    """What a reduction divides by: `count`, or the batch's own number for None.

    Raises: TypeError for a count that is no number and no 0-dim tensor; ValueError for
        one that is not positive and finite, and for a mask without anything live to
        count. With a count such a mask is legal: its share of the whole is 0.
    """
    if count is None:
        if live == 0:
            raise ValueError("mask has no live token, and no count says of how many")
        return live
    if isinstance(count, Tensor):
        fits = count.dim() == 0 and count.dtype != torch.bool
    else:
        fits = isinstance(count, Real) and not isinstance(count, bool)
    if not fits:
        raise TypeError(
            f"count must be a number, a 0-dim tensor or None, got {count!r}"
        )
    if not 0 < count < math.inf:
        raise ValueError(f"count must be positive and finite, got {count}")
    return count


# KL(policy ‖ reference), from samples of the policy and exactly. What is said of a
# gradient holds for sums over an answer: weights that look at it, such as 1 / its
# length, change the gradient.


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The plain estimate of KL(policy ‖ reference), which may be negative.

        k1 = log π - log π_ref

    E[k1] = KL. Detached, as part of the reward, it leads to ∇KL(policy ‖ reference); as
    a loss its expected gradient is exactly 0, for E[∇ log π] = 0.

    Shapes: all (B, S) -> (B, S), 0 at masked slots. Units: nats.
    Gradient: through logprobs only.
    Raises: as `check_mask` and `check_logprobs`.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_logprobs("ref_logprobs", ref_logprobs, mask)
    return torch.where(mask, logprobs - ref_logprobs.detach(), 0.0)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Half the squared log-ratio: a biased value with the right gradient.

        k2 = (log π - log π_ref)^2 / 2

    As a loss, k2 of a *whole sequence* (its summed log-probs, as one column) has the
    expected gradient ∇KL(policy ‖ reference). Summed per token it has
    E[Σ_t k1_t ∇ log π_t]: what a token does to the KL of later ones is missing.

    Shapes: all (B, S) -> (B, S), >= 0, 0 at masked slots. Units: nats squared.
    Gradient: through logprobs only.
    Raises: as `check_mask` and `check_logprobs`.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    return kl_k1(logprobs, ref_logprobs, mask) ** 2 / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The estimate that is never negative, and GRPO's penalty.

        k3 = exp(d) - 1 - d,  d = log π_ref - log π

    E[k3] = KL(policy ‖ reference), of a whole sequence (its summed log-probs, as one
    column) and summed over its tokens. As a loss it has another expected gradient than
    that value. Of a whole sequence: that of the *forward* KL(reference ‖ policy).
    Summed over tokens: that of the forward KL of each next-token choice alone, in the
    contexts that the policy visits; that it visits them is not differentiated.

    Shapes: all (B, S) -> (B, S), >= 0, 0 at masked slots. Units: nats.
    Gradient: through logprobs only.
    Raises: as `check_mask` and `check_logprobs`; ValueError where d > 80 nats: no
        sample of this policy comes near it, and exp(d) is not far from what float32
        can hold, some 88 nats.
    Source: Schulman 2020, "Approximating KL divergence"; arXiv 2402.03300, eq. 4.
    """
    d = -kl_k1(logprobs, ref_logprobs, mask)
    check_exponent("ref_logprobs - logprobs", d)
    return torch.expm1(d) - d  # exp(d) - 1 would round to below d in float32


def kl_ratio_k3(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor
) -> Tensor:
    """k3 weighted by how much likelier the token is now than when it was sampled.

        ratio x k3,  ratio = π / π_old

    On fresh samples the ratio is 1, but its gradient is not 0. Of a whole sequence (its
    summed log-probs, as one column) the expected value is KL(policy ‖ reference) and
    the expected gradient that KL's, on samples of an older policy too. Summed over
    tokens neither is so: each slot has value and gradient of the KL of its own
    next-token choice, in the contexts that the older policy visits. What a token does
    to the KL of later ones is missing.

    Shapes: all (B, S) -> (B, S), >= 0, 0 at masked slots. Units: nats.
    Gradient: through logprobs only, in both factors.
    Raises: as `kl_k3`; ValueError where logprobs - old_logprobs > 80 nats.
    Source: DeepSeek-V3.2, arXiv 2512.02556, section 3.1, equation 7.
    """
    k3 = kl_k3(logprobs, ref_logprobs, mask)
    return probability_ratio(logprobs, old_logprobs, mask) * k3


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """ratio = π / π_old of each token: exactly 1 at masked slots and where they agree.

    Shapes: all (B, S) -> (B, S). Gradient: through logprobs only, the ratio itself.
    Raises: as `check_mask` and `check_logprobs`; ValueError where
        logprobs - old_logprobs > 80 nats: a ratio of e^80 is no step of training, and
        float32 ends at e^88.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_logprobs("old_logprobs", old_logprobs, mask)
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)  # (B, S)
    check_exponent("logprobs - old_logprobs", log_ratio)
    return log_ratio.exp()


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy ‖ reference) of each next-token choice, over the whole vocabulary.

        Σ_v π(v) (log π(v) - log π_ref(v))

    Divide both logits by the sampling temperature first. Summed along the policy's own
    sequences it estimates the KL of whole sequences without bias. As a rule it varies
    less than the sum of k1 does, but not always: with a reference uniform over aa, ab,
    ba and bb and a policy uniform over the first three, the sum of k1 is log(4/3) for
    each of them, and the sum of exact ones is not.

    Shapes: logits, ref_logits (..., V) -> (...). Units: nats, >= 0 but for rounding.
    Gradient: through logits only, that of this position's own KL.
    Raises: TypeError for logits that are not floats; ValueError for unequal shapes or
        logits that are not finite.
    """
    check_logits("logits", logits)
    check_logits("ref_logits", ref_logits)
    check_shapes(logits=logits, ref_logits=ref_logits)
    policy = torch.log_softmax(at_least_float32(logits), dim=-1)  # (..., V)
    reference = torch.log_softmax(at_least_float32(ref_logits.detach()), dim=-1)
    return (policy.exp() * (policy - reference)).sum(-1)  # (...)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are. Gradient: through."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
