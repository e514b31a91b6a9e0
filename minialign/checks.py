"""What a loss asks of its inputs before it computes anything, and how it refuses.

Every check ends in silence or in an error that names the argument, what came and what
is allowed: a TypeError for the wrong kind of thing, a ValueError for the wrong value.

    check_shapes, check_mask, check_live, ...    of the tensors that a loss is given
    check_tokens, check_ids, check_logits        of what a model reads and says
    check_settings, check_problems, check_reference    of a run, before it begins
"""

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

LARGEST_EXPONENT = 80.0  # nats, by choice: exp(80) fits in float32, exp(88.8) does not

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
    "learning_temperature": "(0, inf)",
    "max_grad_norm": "(0, inf]",  # at 0 no gradient would be left
    "entropy_coef": "(-inf, inf)",
    "truncated_reward": "(-inf, inf)",
    "threshold": "(-inf, inf)",
    "memory_decay": "[0, 1)",  # at 1 nothing new would be remembered
    "cooldown": "[0, 1]",
    "shrink": "(0, 1)",  # at 1 every length would be tried again
    "gamma": "[0, 1]",
    "lam": "[0, 1]",
    "delta": "(0, inf)",  # at 0 no step would be allowed
    "eps_low": "(0, 1]",  # ratios are above 0: at 1 none is clipped
    "eps_high": "(0, inf]",
    "value_clip": "(0, inf]",
    "kl_stop": "[0, inf]",
}


def check_shapes(**tensors: Tensor) -> None:
    """All have the shape and device of the first, and something in them.

    (N, 1) against (N,) would broadcast to (N, N), train, and teach nothing.

    Raises: TypeError for what is not a tensor; ValueError naming both tensors.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    first_name = next(iter(tensors))
    first = tensors[first_name]
    if first.numel() == 0:
        raise ValueError(f"{first_name} is empty: shape {tuple(first.shape)}")
    for name, tensor in tensors.items():
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
    """The mask is (B, S) bool. Whether any token is live is not asked here.

    Raises: TypeError for another type (an int mask *indexes*, and ~1 is -2); ValueError
        for another rank.
    """
    check_shapes(mask=mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.dim() != 2:
        raise ValueError(f"mask must be (B, S), got shape {tuple(mask.shape)}")


def check_some_live(mask: Tensor) -> None:
    """As `check_mask`, and there is a live token: without one a mean would be 0 / 0.

    Raises: as `check_mask`; ValueError for no live token.
    """
    check_mask(mask)
    if not mask.any():
        raise ValueError(f"mask has no live token in its {tuple(mask.shape)} slots")


def check_live(name: str, x: Tensor, mask: Tensor) -> None:
    """x is float32 or float64, shaped like the mask, and finite at live slots.

    Raises: TypeError for another type, half precision included; ValueError for another
        shape, or naming the first live slot that holds nan or inf.
    """
    _check_floats(name, x, mask)
    _refuse(name, x, mask & ~x.isfinite(), "finite at live slots")


def check_logprobs(name: str, x: Tensor, mask: Tensor) -> None:
    """x holds log-probabilities: as `check_live`, and <= 0 but for 1e-6 of rounding.

    Raises: as `check_live`; ValueError naming the first live slot above 0.
    """
    _check_floats(name, x, mask)
    # One look for both: on a GPU each look is a wait. A nan is not <= anything.
    fine = (x <= 1e-6) & x.isfinite()
    if (mask & ~fine).any():
        check_live(name, x, mask)
        _refuse(name, x, mask & ~fine, "log-probabilities, <= 0 at live slots")


def check_weights(name: str, x: Tensor, mask: Tensor) -> None:
    """x holds weights: as `check_live`, and 0 or more at live slots.

    Raises: as `check_live`; ValueError naming the first live slot below 0.
    """
    _check_floats(name, x, mask)
    fine = (x >= 0) & x.isfinite()
    if (mask & ~fine).any():
        check_live(name, x, mask)
        _refuse(name, x, mask & ~fine, "0 or more at live slots")


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


def check_tokens(model: object, tokens: Tensor, mask: Tensor) -> None:
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
    check_ids("tokens", tokens, vocabulary(model))


def check_ids(name: str, ids: Tensor, known: float) -> None:
    """ids are int64 and in 0..known - 1; with `known` inf, 0 or more.

    Raises: TypeError for another type; ValueError naming the first id outside.
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64 ids, got {ids.dtype}")
    allowed = ">= 0" if known == math.inf else f"in 0..{known - 1}"
    outside = (ids < 0) | (ids >= known)
    _refuse(name, ids, outside, f"ids {allowed}")


def check_logits(name: str, logits: Tensor) -> None:
    """logits are floats of any precision, and finite.

    Raises: TypeError for another type; ValueError for nan, inf or no words at all.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must be (..., V), got shape {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"{name} must be floats, got {logits.dtype}")
    # A finite sum has finite terms, and costs a thirtieth of looking at each.
    if not logits.detach().sum().isfinite():
        _refuse(name, logits, ~logits.isfinite(), "finite")


def check_exponent(name: str, exponent: Tensor) -> None:
    """Nowhere above LARGEST_EXPONENT, so that its exp can be computed with.

    Raises: ValueError naming the first slot above it.
    """
    too_large = exponent > LARGEST_EXPONENT
    _refuse(name, exponent, too_large, f"<= {LARGEST_EXPONENT:g} nats at live slots")


def check_temperature(temperature: float) -> None:
    """Logits can be divided by it.

    Raises: ValueError for 0, a negative number, nan or inf.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature must be positive and finite, got {temperature} "
            f"(greedy decoding is a flag of `generate`, not temperature 0)"
        )


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


def check_problems(problems: Sequence) -> None:
    """There is a problem to ask.

    Raises: ValueError if there is none.
    """
    if len(problems) == 0:
        raise ValueError("problems: got none, need at least one")


def check_apart(**models: nn.Module | None) -> None:
    """No two of these models share a weight; None is no model.

    A step of one would else be a step of the other, unseen.

    Raises: ValueError naming both.
    """
    owners = {}
    for name, model in models.items():
        weights = () if model is None else model.parameters()
        for weight in weights:
            owner = owners.setdefault(weight.data_ptr(), name)
            if owner != name:
                raise ValueError(
                    f"{name}: shares weights with the {owner}; pass a copy"
                )


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
        check_apart(policy=policy, reference=reference)
        known = vocabulary(policy)
        ref_known = vocabulary(reference)
        if known != ref_known and math.inf not in (known, ref_known):
            raise ValueError(f"reference: knows {ref_known} tokens, the policy {known}")


def _inside(value: float, interval: str) -> bool:
    """Whether the value lies in an interval such as "(0, 1]". nan lies in none."""
    ends = interval[1:-1].split(",")
    low = float(ends[0])
    high = float(ends[1])
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _check_floats(name: str, x: Tensor, mask: Tensor) -> None:
    """x has the shape of the mask, and float32 or float64 in it."""
    check_shapes(**{"mask": mask, name: x})
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")


def _refuse(name: str, x: Tensor, bad: Tensor, allowed: str) -> None:
    """Raise if anything is bad, naming the first bad place and what stands there."""
    if bad.any():
        where = bad.nonzero()[0].tolist()
        value = x[tuple(where)].item()
        raise ValueError(f"{name} must be {allowed}, got {value} at {where}")


def vocabulary(model: object) -> float:
    """The number of ids that a model knows; inf if it does not say."""
    config = getattr(model, "config", None)
    return getattr(config, "vocab_size", math.inf)
