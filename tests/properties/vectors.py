"""What every function with golden vectors owes: to agree with data/golden."""

import importlib
import json
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from minialign.algorithms import dpo, grpo, rrhf
from tests import golden

# |ours - expected| <= this x (1 + |expected|), as data/golden/README.md promises.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


@cache
def committed(module: str) -> dict[str, dict]:
    text = (golden.FOLDER / f"{module}.json").read_text(encoding="utf-8")
    return {entry["function"]: entry for entry in json.loads(text)["functions"]}


def cases(name: str) -> list[dict]:
    module, function = name.split(".")
    assert function in committed(module), f"{name}: run python -m tests.golden"
    return committed(module)[function]["cases"]


# Calling a function as the files call it


class Table:
    """A model whose logits are given, whatever it reads."""

    def __init__(self, logits: Tensor) -> None:
        self.given = logits

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.given[:, : tokens.shape[1]]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def named(argument, module, f):
    """The files name a function where ours take the function."""
    return lambda **call: f(**call | {argument: getattr(module, call[argument])})


def asked(f, logits, **call):
    return f(Table(logits), **call)


def given_lots(f):
    return lambda **call: f(**call, generator=torch.Generator())


def value_of(f):
    return lambda **call: f(**call).value


def ends_of(estimate):
    return [estimate.value, estimate.low, estimate.high]


ADAPTED = {
    "logprobs.token_logprobs": lambda f: partial(asked, f),
    "grpo.grpo_loss": partial(named, "kl_term", grpo),
    "dpo.dpo_loss": partial(named, "per_pair", dpo),
    "rrhf.rrhf_loss": partial(named, "likelihood", rrhf),
    "dpo.make_pairs": given_lots,
    "rejection_sampling.select_right": given_lots,
    "rejection_sampling.select_best": given_lots,
    "rejection_sampling.select_top": given_lots,
    "rejection_sampling.select_random": lambda f: (
        lambda **call: given_lots(f)(**call).sum()
    ),
    "intervals.difference": value_of,
    "intervals.gap_closed": value_of,
    "evaluation.reward_variance_share": value_of,
    "evaluation.dead_share": value_of,
    "intervals.over_seeds": lambda f: lambda **call: ends_of(f(**call)),
    "intervals.verdict": lambda f: lambda **call: ends_of(f(**call).estimate),
}


def module_of(name: str):
    room = name in ("logprobs", "intervals", "evaluation")
    return importlib.import_module(f"minialign{'' if room else '.algorithms'}.{name}")


def adapted(name: str, function: Callable) -> Callable:
    """The function, called as the files call it."""
    return ADAPTED.get(name, lambda f: f)(function)


def ours(name: str) -> Callable:
    module, function = name.split(".")
    return adapted(name, getattr(module_of(module), function))


def tensor(x) -> Tensor:
    """float64, int64 or bool; infinity is the text "inf"."""
    array = np.array(x)
    return torch.tensor(array.astype(float) if array.dtype.kind == "U" else array)


def as_arguments(name: str, inputs: dict, dtype=torch.float64) -> dict:
    """Lists as tensors where the function takes them; the floats of these as leaves."""
    if name.startswith(golden.STATISTICS) and name != "evaluation.signal_to_noise":
        return dict(inputs)
    call = dict(inputs)
    for argument, x in inputs.items():
        if isinstance(x, list) and argument != "counts":
            call[argument] = tensor(x)
            if call[argument].is_floating_point():
                call[argument] = call[argument].to(dtype).requires_grad_()
    return call


def moved_by(call: dict) -> dict:
    """The tables of floats: their gradients are looked at."""
    return {k: x for k, x in call.items() if getattr(x, "requires_grad", False)}


def same(what: str, actual, expected, tolerance: float) -> None:
    """Same shape and numbers; nan equals nothing."""
    is_tensor = isinstance(actual, Tensor)
    a = actual.detach() if is_tensor else torch.tensor(np.array(actual))
    b = tensor(expected)
    if b.is_floating_point() and b.numel():
        options = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
        torch.testing.assert_close(a, b, **options, msg=lambda why: f"{what}: {why}")
    else:
        assert a.tolist() == expected, f"{what}: {a.tolist()}, expected {expected}"


def check_golden_vectors(function: Callable, name: str) -> None:
    """It has the values and slopes of data/golden, for all cases of this name."""
    check_cases(adapted(name, function), name)


def check_cases(
    function: Callable, name: str, dtype: torch.dtype = torch.float64
) -> None:
    """All cases. The function is called as the files call it."""
    for case in cases(name):
        if dtype == torch.float64 or "1e-9" not in case["note"]:
            check_case(function, name, case, dtype)


def check_case(
    function: Callable, name: str, case: dict, dtype: torch.dtype = torch.float64
) -> None:
    """Value and slopes; none to a constant, exactly 0 where masked."""
    what = f"{name}, {case['note']!r}"
    call = as_arguments(name, case["inputs"], dtype)
    output = function(**call)
    same(what, output, case["expected"], TOLERANCE[dtype])
    leaves = moved_by(call)
    slopes = dict.fromkeys(leaves)
    if getattr(output, "requires_grad", False):
        weighed = (output * tensor(case.get("upstream", 1.0))).sum()
        found = torch.autograd.grad(weighed, [*leaves.values()], allow_unused=True)
        slopes = dict(zip(leaves, found, strict=True))
    for argument, slope in slopes.items():
        if argument not in case["gradients"]:
            leak = f"a gradient reaches {argument}, which should be a constant"
            assert slope is None or not slope.any(), f"{what}: {leak}"
            continue
        assert slope is not None, f"{what}: no gradient reaches {argument}"
        expected = case["gradients"][argument]
        same(f"{what}: {argument}'s slope", slope, expected, TOLERANCE[dtype])
        if "mask" in call and slope.shape == call["mask"].shape:
            unseen = slope[~call["mask"]]
            assert not unseen.any(), f"{what}: {argument} moves where masked"
