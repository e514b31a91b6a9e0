"""Log-probabilities of tokens, sums over the live ones, KL estimates, and their checks.

Five kinds of function every algorithm stands on:

    token_logprobs, logprobs_from_logits            what the policy gave to each token
    masked_sum, masked_mean, token_mean, ...        many slots -> one number
    kl_k1, kl_k2, kl_k3, kl_ratio_k3, exact_kl      how far from the reference
    probability_ratio                               how far from the sampling policy
    check_shapes, check_mask, check_live, ...       what a loss asks of its inputs first

Slot s of a (B, S) tensor scores the choice of `tokens[:, s + 1]`, and S = T - 1; `mask`
is True where the policy made that choice, EOS included. One rule holds throughout:
**mask before arithmetic**. What lies in a masked slot is replaced by 0 before anything
is computed from it. Multiplying by the mask afterwards gives nan * 0 = nan, and
`torch.where` afterwards gives the right value and a gradient of nan.
"""

import math
from dataclasses import fields
from typing import Protocol

import torch
from torch import Tensor, nn

LARGEST_EXPONENT = 80.0  # nats; float32 overflows to inf at exp(88.7)

# What `check_settings` accepts for a setting's annotation, and how it says so.
TYPES = {
    bool: (bool, "True or False"),
    int: (int, "an int"),
    float: (int | float, "a number"),
    float | None: (int | float | None, "a number or None"),
}
# The usual range of a count is [1, inf), of a number [0, inf). These have another. A
# round bracket leaves its end out, a square one lets it in; at inf there is no limit.
RANGES = {
    "seed": "(-inf, inf)",
    "warmup": "[0, inf)",
    "temperature": "(0, inf)",  # logits are divided by it
    "max_grad_norm": "(0, inf]",  # at 0 no gradient would be left
    "entropy_coef": "(-inf, inf)",
    "memory_decay": "[0, 1)",  # at 1 nothing new would be remembered
    "cooldown": "[0, 1]",
    "gamma": "[0, 1]",
    "lam": "[0, 1]",
    "eps_low": "(0, 1]",  # ratios are above 0: at 1 none is clipped
    "eps_high": "(0, inf]",
    "value_clip": "(0, inf]",
    "kl_stop": "[0, inf]",
}


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
        ValueError for other shapes, ids outside the vocabulary, a mask without a live
        token, a temperature that is not positive.
    """
    check_tokens(model, tokens, mask)
    _check_temperature(temperature)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (B, S) each
    hidden = model(inputs)[mask]  # (N, D), N live tokens
    logits = model.logits(hidden)  # (N, V)
    live = logprobs_from_logits(logits, targets[mask], temperature)  # (N,)
    logprobs = torch.zeros(mask.shape, dtype=live.dtype, device=live.device)
    return logprobs.masked_scatter(mask, live)  # (B, S)


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
    _check_temperature(temperature)
    _check_logits("logits", logits)
    check_shapes(**{"logits[..., 0]": logits[..., 0], "targets": targets})
    _check_ids("targets", targets, logits.shape[-1])
    scaled = _at_least_float32(logits) / temperature
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


def token_mean(x: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    """Σ over live slots / number of live slots: every *token* weighs the same.

    Long rows weigh more than short ones. `count` is the number of live tokens of the
    whole batch when this is one micro-batch of it: then the parts add up to the whole.

    Shapes: x, mask (B, S) -> (). Units: those of x, per token. Reduction: token mean.
    Gradient: 1 / count at live slots.
    Raises: as `check_mask` and `check_live`; ValueError for a count not positive.
    """
    total = masked_sum(x, mask).sum()
    return total / normaliser(count, int(mask.sum()))


def sequence_mean(x: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    """Mean over rows of each row's mean over live slots: every *row* weighs the same.

    A token of a long row weighs less than one of a short row. `count` is the number of
    live rows (those with a live token) of the whole batch; other rows count nowhere.

    Shapes: x, mask (B, S) -> ().
    Units: those of x, per token. Reduction: sequence mean.
    Gradient: 1 / (count * live tokens of the row) at live slots.
    Raises: as `check_mask` and `check_live`; ValueError for a count not positive.
    """
    total = masked_mean(x, mask).sum()
    return total / normaliser(count, int(mask.any(1).sum()))


def sequence_sum(x: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    """Σ over live slots / number of rows: what the policy gradient theorem asks for.

    The only one of the three that leaves E[∇ loss] = -∇ E[R] unbiased: its divisor does
    not depend on how long the policy's answers turned out. `count` is the number of
    live rows (those with a live token) of the whole batch; other rows count nowhere.

    Shapes: x, mask (B, S) -> ().
    Units: those of x, per row. Reduction: sequence sum / B.
    Gradient: 1 / count at live slots.
    Raises: as `check_mask` and `check_live`; ValueError for a count not positive.
    """
    total = masked_sum(x, mask).sum()
    return total / normaliser(count, int(mask.any(1).sum()))


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

    E[k3] = KL(policy ‖ reference), summed per token or of a whole sequence; but as a
    loss its expected gradient is that of the *forward* KL(reference ‖ policy): of the
    whole sequence or, summed per token, of each next-token choice alone.
    `kl_ratio_k3` has the gradient of its own value.

    Shapes: all (B, S) -> (B, S), >= 0, 0 at masked slots. Units: nats.
    Gradient: through logprobs only.
    Raises: as `check_mask` and `check_logprobs`; ValueError where d > 80 nats, which no
        sample of this policy reaches and float32 could not hold.
    Source: Schulman 2020, "Approximating KL divergence"; arXiv 2402.03300, eq. 4.
    """
    d = -kl_k1(logprobs, ref_logprobs, mask)
    _check_exponent("ref_logprobs - logprobs", d)
    return torch.expm1(d) - d  # exp(d) - 1 would round to below d in float32


def kl_ratio_k3(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor
) -> Tensor:
    """k3 weighted by how much likelier the token is now than when it was sampled.

        ratio x k3,  ratio = π / π_old

    On fresh samples the ratio is 1, but its gradient is not 0. Of a whole sequence, the
    expected value is KL(policy ‖ reference) and the expected gradient that KL's, on
    samples of an older policy too. Summed per token, each slot has value and gradient
    of the KL of its own next-token choice, in the contexts the older policy visits:
    what a token does to the KL of later ones is missing.

    Shapes: all (B, S) -> (B, S), >= 0, 0 at masked slots. Units: nats.
    Gradient: through logprobs only, in both factors.
    Raises: as `kl_k3`; ValueError where logprobs - old_logprobs > 80 nats.
    Source: huggingface/trl, pull request 6503.
    """
    k3 = kl_k3(logprobs, ref_logprobs, mask)
    return probability_ratio(logprobs, old_logprobs, mask) * k3


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """ratio = π / π_old of each token: exactly 1 at masked slots and where they agree.

    Shapes: all (B, S) -> (B, S). Gradient: through logprobs only, the ratio itself.
    Raises: as `check_mask` and `check_logprobs`; ValueError where
        logprobs - old_logprobs > 80 nats, which float32 could not hold.
    """
    check_mask(mask)
    check_logprobs("logprobs", logprobs, mask)
    check_logprobs("old_logprobs", old_logprobs, mask)
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)  # (B, S)
    _check_exponent("logprobs - old_logprobs", log_ratio)
    return log_ratio.exp()


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy ‖ reference) of each next-token choice, over the whole vocabulary.

        Σ_v π(v) (log π(v) - log π_ref(v))

    Divide both logits by the sampling temperature first. Summed along sampled sequences
    it estimates the sequence KL, with less variance than k1.

    Shapes: logits, ref_logits (..., V) -> (...). Units: nats, >= 0 but for rounding.
    Gradient: through logits only, that of this position's own KL.
    Raises: TypeError for logits that are not floats; ValueError for unequal shapes or
        logits that are not finite.
    """
    _check_logits("logits", logits)
    _check_logits("ref_logits", ref_logits)
    check_shapes(logits=logits, ref_logits=ref_logits)
    policy = torch.log_softmax(_at_least_float32(logits), dim=-1)  # (..., V)
    reference = torch.log_softmax(_at_least_float32(ref_logits.detach()), dim=-1)
    return (policy.exp() * (policy - reference)).sum(-1)  # (...)


# Checks: what a loss asks of its inputs before it computes anything


def check_shapes(**tensors: Tensor) -> None:
    """All have the shape and device of the first, and something in them.

    (N, 1) against (N,) would broadcast to (N, N), train, and teach nothing.

    Raises: TypeError for what is not a tensor; ValueError naming both tensors.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    (first_name, first), *others = tensors.items()
    if first.numel() == 0:
        raise ValueError(f"{first_name} is empty: shape {tuple(first.shape)}")
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and {first_name} "
                f"{tuple(first.shape)}; they must be equal"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} and {first_name} on {first.device}; "
                f"they must be on one device"
            )


def check_mask(mask: Tensor) -> None:
    """The mask is (B, S) bool with at least one live token.

    Raises: TypeError for another type (an int mask *indexes*, and ~1 is -2); ValueError
        for another rank or no live token, where every mean would be 0 / 0.
    """
    check_shapes(mask=mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"mask must be (B, S), got shape {tuple(mask.shape)}")
    if not mask.any():
        raise ValueError(f"mask has no live token in its {tuple(mask.shape)} slots")


def check_live(name: str, x: Tensor, mask: Tensor) -> None:
    """x is float32 or float64, shaped like the mask, and finite at live slots.

    Raises: TypeError for another type, half precision included; ValueError for another
        shape, or naming the first live slot that holds nan or inf.
    """
    check_shapes(**{"mask": mask, name: x})
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")
    _refuse(name, x, mask & ~x.isfinite(), "finite at live slots")


def check_logprobs(name: str, x: Tensor, mask: Tensor) -> None:
    """x holds log-probabilities: as `check_live`, and <= 0 but for 1e-6 of rounding.

    Raises: as `check_live`; ValueError naming the first live slot above 0.
    """
    check_live(name, x, mask)
    _refuse(name, x, mask & (x > 1e-6), "log-probabilities, <= 0 at live slots")


def check_rows(name: str, x: Tensor, mask: Tensor) -> None:
    """x holds one finite number per row of the mask: (B,), never (B, 1) or (B, S).

    Raises: as `check_live`, with every row live.
    """
    rows = torch.ones_like(mask[:, 0])  # (B,)
    check_shapes(**{"the first column of mask": rows, name: x})
    check_live(name, x, rows)


def check_groups(name: str, x: Tensor, least: int = 1) -> None:
    """x holds one finite number per answer, K >= `least` to each of P problems: (P, K).

    Raises: as `check_live`, with every slot live; ValueError for another rank or K.
    """
    check_shapes(**{name: x})
    if x.dim() != 2 or x.shape[1] < least:
        got = f"got shape {tuple(x.shape)}"
        raise ValueError(f"{name} must be (P, K) with K >= {least}, {got}")
    check_live(name, x, torch.ones_like(x, dtype=torch.bool))


def check_tokens(model: Model, tokens: Tensor, mask: Tensor) -> None:
    """tokens are (B, T) int64 ids that the model knows, and the mask is (B, T - 1).

    Raises: as `check_mask`; TypeError for other tokens; ValueError for other shapes,
        ids below 0 or, where the model's config tells it, beyond the vocabulary.
    """
    check_shapes(tokens=tokens)
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens must be (B, T) with T >= 2, got shape {tuple(tokens.shape)}"
        )
    check_mask(mask)
    check_shapes(mask=mask, **{"tokens[:, 1:]": tokens[:, 1:]})
    _check_ids("tokens", tokens, _vocabulary(model))


def check_settings(config: object, *positive: str) -> None:
    """Every setting of a config, a dataclass, has the type and the range it must have.

    The annotation says the type. A switch (`bool`) is True or False; nothing else is
    one, neither 1 nor "False". A count (`int`) is an int and no bool, 1 or more. A
    number (`float`) is an int or a float and no bool, finite, and 0 or more. Only a
    setting with `None` in its annotation may be None, which turns it off. Settings
    whose range is not the usual one stand in RANGES. Those named in `positive` must
    be above 0, and finite, whatever stands there.

    Raises: TypeError for a value of another type, ValueError for one out of range. Both
        name the setting, what came and what is allowed.
    """
    for field in fields(config):
        name = field.name
        value = getattr(config, name)
        accepted, in_words = TYPES[field.type]
        is_switch = isinstance(value, bool)  # to Python, True is an int as well
        if not isinstance(value, accepted) or is_switch != (field.type is bool):
            raise TypeError(f"{name}: got {value!r}, must be {in_words}")
        if is_switch or value is None:
            continue
        usual = "[1, inf)" if field.type is int else "[0, inf)"
        allowed = "(0, inf)" if name in positive else RANGES.get(name, usual)
        if not _inside(value, allowed):
            raise ValueError(f"{name}: got {value!r}, must be in {allowed}")


def check_reference(
    policy: nn.Module, reference: nn.Module | None, needed: str = ""
) -> None:
    """The reference has the policy's vocabulary and none of its weights.

    Shared weights would move along, and be no reference any more.

    Raises: ValueError if it does not, or if there is none and `needed` says what for.
    """
    if reference is None and needed:
        raise ValueError(f"reference: {needed}, so a reference is needed")
    if reference is not None:
        ours = {weight.data_ptr() for weight in policy.parameters()}
        if any(weight.data_ptr() in ours for weight in reference.parameters()):
            raise ValueError("reference: shares weights with the policy; pass a copy")
        V, ref_V = _vocabulary(policy), _vocabulary(reference)
        if V != ref_V and math.inf not in (V, ref_V):
            raise ValueError(f"reference: knows {ref_V} tokens, the policy {V}")


def _inside(value: float, interval: str) -> bool:
    """Whether the value lies in an interval such as "(0, 1]". nan lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _refuse(name: str, x: Tensor, bad: Tensor, allowed: str) -> None:
    if bad.any():
        where = bad.nonzero()[0].tolist()
        value = x[tuple(where)].item()
        raise ValueError(f"{name} must be {allowed}, got {value} at {where}")


def _check_ids(name: str, ids: Tensor, vocabulary: float) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 ids, got {ids.dtype}")
    allowed = ">= 0" if vocabulary == math.inf else f"in 0..{vocabulary - 1}"
    _refuse(name, ids, (ids < 0) | (ids >= vocabulary), f"ids {allowed}")


def _vocabulary(model: Model) -> float:
    """inf if the model does not say."""
    return getattr(getattr(model, "config", None), "vocab_size", math.inf)


def _check_exponent(name: str, exponent: Tensor) -> None:
    too_large = exponent > LARGEST_EXPONENT
    _refuse(name, exponent, too_large, f"<= {LARGEST_EXPONENT:g} nats at live slots")


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature} "
            f"(greedy decoding is a flag of `generate`, not temperature 0)"
        )


def _check_logits(name: str, logits: Tensor) -> None:
    check_shapes(**{name: logits})
    if not logits.is_floating_point():
        raise TypeError(f"{name} must be floats, got {logits.dtype}")
    # A finite sum has finite terms, and costs a thirtieth of looking at each.
    if not logits.detach().sum().isfinite():
        _refuse(name, logits, ~logits.isfinite(), "finite")


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def normaliser(count: float | None, live: int) -> float:
    """What a reduction divides by: `count`, or the batch's own number for None."""
    if count is None:
        return live
    if isinstance(count, bool) or not isinstance(count, int | float):
        raise TypeError(f"count must be a number or None, got {type(count).__name__}")
    if not 0 < count < math.inf:
        raise ValueError(f"count must be positive and finite, got {count}")
    return count
