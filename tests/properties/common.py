"""What every loss owes: each property is a function of the loss.

A loss is called by keyword with named tensors and gives a scalar, one number per row or
one per slot. Options are bound before: `partial(ppo_loss, clip_eps=0.2)`. What the
properties know about a call they read off its tensors:

    (B, S) floats, shaped like `mask`   hold junk where the mask is False
    (B,) floats                         count for nothing in a row without a live token
    all tensors                         have the batch as their first dimension

`cases` is a strategy of calls, dicts by argument name (`strategies.batches` makes
them), and `case` one such dict. `trainable` names the arguments the loss is
differentiated by. The same lines judge the true function and its mutants:

    check_mask_is_inert(loss, cases)
    assert refutes(check_mask_is_inert, wrong_loss, cases)

Pair losses have no mask: the properties about masks are not for them, the rest is.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from hypothesis import Phase, given, settings
from torch import Tensor

LOGPROBS = ("logprobs",)
JUNK = (0.0, -7.25, 1e30, float("inf"), float("-inf"), float("nan"))
# Measured on identities of these sizes: 1e-14 in float64, 8e-6 in float32.
E64 = {"rtol": 1e-9, "atol": 1e-10}
F32 = {"rtol": 1e-5, "atol": 1e-5}

Loss = Callable[..., Tensor]
Case = dict[str, Tensor]
Property = Callable[[Callable], None]  # fails, by assert, for a wrong implementation

float64 = partial(torch.tensor, dtype=torch.float64)


def close(actual: Tensor, expected, atol: float = 1e-10) -> None:
    """Equal within atol; one expected number stands for a tensor full of it."""
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def name_of(check: Property) -> str:
    """Of the function that a property is made of."""
    while isinstance(check, partial):
        check = check.func
    return check.__name__


def said_by(check: Property) -> str:
    """The first sentence of a property's docstring."""
    while isinstance(check, partial):
        check = check.func
    text = " ".join((check.__doc__ or "").split())
    return text.split(". ")[0].rstrip(".")


def with_options(check: Property, options: dict) -> Property:
    """The property of the function with these options set."""

    def checked(function):
        check(partial(function, **options))

    return named_as(check, checked)


def named_as(check: Property, other: Property) -> Property:
    """The other property, which is this one seen from elsewhere."""
    other.__name__ = name_of(check)
    other.__doc__ = said_by(check)
    return other


# The profile in force, for those who only want to know whether there is a failure.
settings.register_profile("first failure", phases=[Phase.explicit, Phase.generate])


def forall(cases, examples: int = 30):
    """`given`, reporting one failure at a time, so that it stays an AssertionError."""
    options = settings(max_examples=examples, report_multiple_bugs=False)
    return lambda holds: options(given(cases)(holds))


def refutes(check, *args, **kwargs) -> bool:
    """Does this property find the implementation wrong?

    ValueError counts: the implementation refused a call that is legal. Other crashes do
    not; and whoever asserts this also asserts that the true function passes the check.
    """
    try:
        with first_failure():
            check(*args, **kwargs)
    except (AssertionError, ValueError):
        return True
    return False


@contextmanager
def first_failure():
    """Hypothesis stops at the first failure: a smaller example is of no interest."""
    profile = settings.get_current_profile_name()
    settings.load_profile("first failure")
    try:
        yield
    finally:
        settings.load_profile(profile)


def value_and_gradients(
    loss: Loss, case: Case, trainable: Sequence[str] = LOGPROBS
) -> tuple[Tensor, Case]:
    """What the loss gives, and the gradient of it (of a mix of it, if it is no scalar).

    The mix weighs columns unequally and rows equally, so that rows may be permuted.
    """
    leaves = {name: case[name].detach().clone().requires_grad_() for name in trainable}
    value = torch.as_tensor(loss(**{**case, **leaves}))
    columns = value.shape[-1] if value.dim() == 2 else 1
    mixed = (value * torch.cos(torch.arange(columns))).sum()
    if not mixed.requires_grad:
        return value, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    slopes = torch.autograd.grad(
        mixed, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return value.detach(), dict(zip(leaves, slopes, strict=True))


def assert_same(actual, expected, what: str, **tolerance) -> None:
    """Values and gradients agree; nan agrees with nothing."""
    (value, slopes), (expected_value, expected_slopes) = actual, expected
    pairs = {"value": (value, expected_value)}
    for name, slope in expected_slopes.items():
        pairs[f"gradient to {name}"] = slopes[name], slope
    for name, (a, b) in pairs.items():
        if a.dtype != b.dtype or not torch.equal(a, b):  # faster than assert_close
            message = partial("{}: {}: {}".format, what, name)
            torch.testing.assert_close(a, b, **(tolerance or E64), msg=message)


def assert_refused(
    loss: Loss, case: Case, error: type, what: str, names: Sequence[str]
) -> None:
    """The call raises this error, and its message has one of these names.

    As a word of its own: in "masks: expected" nothing says that it is about `x`.
    """
    try:
        loss(**case)
    except error as refusal:
        patterns = [rf"(?<!\w){re.escape(name)}(?!\w)" for name in names]
        named = any(re.search(pattern, str(refusal)) for pattern in patterns)
        assert named, f"{what}: the message does not say which argument: {refusal}"
    except Exception as crash:
        raise AssertionError(f"{what}: not refused but {crash!r}") from crash
    else:
        raise AssertionError(f"{what}: accepted")


def rows_of(case: Case, index) -> Case:
    """Some rows of a call."""
    return {name: x[index] for name, x in case.items()}


def copied(case: Case) -> Case:
    """The same call: a wrong version may write into what it is given."""
    return {name: x.clone() for name, x in case.items()}


def with_junk(case: Case, junk: float) -> Case:
    """The same call with other content wherever nobody may look."""
    mask = case["mask"]
    changed = dict(case)
    for name, x in case.items():
        if x.is_floating_point() and x.shape == mask.shape:
            changed[name] = x.masked_fill(~mask, junk)
        elif x.is_floating_point() and x.shape == mask.shape[:1]:
            # A row's number may be asked to be finite, live tokens or not.
            finite = junk if math.isfinite(junk) else -7.25
            changed[name] = x.masked_fill(~mask.any(1), finite)
    return changed


def with_columns(case: Case, left: int, right: int, junk: float) -> Case:
    """The same call with masked columns around it."""
    mask, added = case["mask"], (left, right)
    pad = torch.nn.functional.pad
    wider = {
        name: pad(x, added, value=junk)
        for name, x in case.items()
        if x.shape == mask.shape and x.is_floating_point()
    }
    return {**case, **wider, "mask": pad(mask, added, value=False)}


# What every loss owes


def check_mask_is_inert(loss: Loss, cases, trainable: Sequence[str] = LOGPROBS) -> None:
    """What lies in masked slots changes neither value nor gradient.

    Not even nan or inf; the gradient there is exactly 0; masked columns added on either
    side change nothing. The value alone is no test: most bugs of this kind show a right
    loss and a gradient of nan.
    """

    @forall(cases)
    def holds(case):
        mask = case["mask"]
        expected = value_and_gradients(loss, case, trainable)
        for junk in JUNK:
            actual = value_and_gradients(loss, with_junk(case, junk), trainable)
            assert_same(actual, expected, f"{junk} in masked slots")
            for name in trainable:
                if case[name].shape == mask.shape:
                    unseen = actual[1][name][~mask]
                    assert (unseen == 0).all(), f"gradient to masked {name}: {unseen}"
        for left, right in ((2, 0), (0, 3)):
            columns = slice(left, left + mask.shape[1])

            def narrowed(columns=columns, **wide):
                value = torch.as_tensor(loss(**wide))
                return value[:, columns] if value.dim() == 2 else value

            wide = with_columns(case, left, right, float("nan"))
            value, slopes = value_and_gradients(narrowed, wide, trainable)
            for name, slope in slopes.items():
                slopes[name] = slope[:, columns] if slope.dim() == 2 else slope
            assert_same((value, slopes), expected, f"{left + right} columns added")

    holds()


def check_constant(
    reduce: Callable[[Tensor, Tensor], Tensor],
    masks,
    expected: Callable[[float, Tensor], object] = lambda c, mask: c,
) -> None:
    """C in every live slot reduces to c (or to what the reduction promises).

    `reduce(x, mask)`; a loss goes in as a function of its live elements.
    """

    @forall(masks)
    def holds(mask):
        for c in (1.0, -0.3, 250.0):
            for junk in (0.0, 1e9):
                x = torch.full(mask.shape, junk, dtype=torch.float64)
                actual = reduce(x.masked_fill(mask, c), mask)
                wanted = torch.as_tensor(expected(c, mask), dtype=torch.float64)
                wanted = wanted.expand(actual.shape)
                torch.testing.assert_close(actual, wanted, **E64)

    holds()


def live_tokens(case: Case) -> int:
    """The global normaliser of a token mean."""
    return int(case["mask"].sum())


def live_rows(case: Case) -> int:
    """The global normaliser of a sequence mean or sum."""
    return int(case["mask"].any(1).sum())


def all_rows(case: Case) -> int:
    """The global normaliser of a loss without a mask: the number of pairs."""
    return len(next(iter(case.values())))


def check_microbatches(
    loss: Loss, cases, count: Callable[[Case], int], trainable: Sequence[str] = LOGPROBS
) -> None:
    """Micro-batches, each divided by the *global* count, add up to the batch.

    `loss(..., count=count(case))` on the parts; parts without a live token are skipped,
    as a training loop must. A mean of the parts' own means is another loss.
    """

    @forall(cases)
    def holds(case):
        whole = value_and_gradients(loss, case, trainable)
        rows = torch.arange(all_rows(case))
        for size in range(1, len(rows) + 1):
            value = torch.zeros_like(whole[0])
            slopes = {name: torch.zeros_like(case[name]) for name in trainable}
            for part in rows.split(size):
                micro = rows_of(case, part)
                if "mask" in micro and not micro["mask"].any():
                    continue

                def counted(**tensors):
                    return loss(**tensors, count=count(case))

                part_value, part_slopes = value_and_gradients(counted, micro, trainable)
                value += part_value
                for name in trainable:
                    slopes[name][part] = part_slopes[name]
            assert_same((value, slopes), whole, f"micro-batches of {size}")

    holds()


def check_permutation(
    loss: Loss, cases, trainable: Sequence[str] = LOGPROBS, alone: bool = True
) -> None:
    """Rows may come in any order; a row alone gives what it gives in a batch.

    Not `alone`: what a row gives depends on the others.
    """

    @forall(cases)
    def holds(case):
        value, slopes = value_and_gradients(loss, case, trainable)
        B = all_rows(case)
        for order in (torch.arange(B).flip(0), torch.arange(B).roll(1)):
            expected = (
                value[order] if value.dim() else value,
                {name: slope[order] for name, slope in slopes.items()},
            )
            actual = value_and_gradients(loss, rows_of(case, order), trainable)
            assert_same(actual, expected, f"rows in the order {order.tolist()}")
        for row in range(B if alone and value.dim() else 0):
            lone = rows_of(case, slice(row, row + 1))
            if "mask" in lone and not lone["mask"].any():
                continue
            expected = (
                value[row : row + 1],
                {name: slope[row : row + 1] for name, slope in slopes.items()},
            )
            actual = value_and_gradients(loss, lone, trainable)
            assert_same(actual, expected, f"row {row} alone")

    holds()


def check_shapes_refused(loss: Loss, case: Case) -> None:
    """A tensor of another shape is refused by name; nothing broadcasts.

    All of them with one dimension more are refused too. Give a case with at least two
    rows and two columns.
    """
    loss(**copied(case))  # the case itself is fine
    deeper = {name: x[..., None].clone() for name, x in case.items()}
    assert_refused(loss, deeper, ValueError, "one dimension more", list(case))
    for name, x in case.items():
        others = [x[:, None], x[None], x[..., None], x[:-1], x[:1], x[:0], x[0]]
        if x.dim() > 1:
            others += [x[:, :-1], x[:, :1], x[:, 0], x.T, x.flatten()]
        for other in others:
            if other.shape != x.shape:
                what = f"{name} of shape {tuple(other.shape)} for {tuple(x.shape)}"
                call = copied({**case, name: other})
                assert_refused(loss, call, ValueError, what, [name])


def check_no_gradient_to(loss: Loss, cases, names: Sequence[str]) -> None:
    """No gradient reaches these, even if they ask for one.

    Rows are weighed unevenly. Advantages that add up to 0, weighed alike, would hide a
    leak: the slope of a sum that is always 0 is 0.
    """

    def uneven(**tensors):
        value = torch.as_tensor(loss(**tensors))
        if value.dim() == 0:
            return value
        rows = torch.cos(torch.arange(len(value)) + 1.0)
        return (value.movedim(0, -1) * rows).movedim(-1, 0)

    @forall(cases)
    def holds(case):
        _, slopes = value_and_gradients(uneven, case, names)
        for name, slope in slopes.items():
            assert (slope == 0).all(), f"gradient to {name}: {slope}"

    holds()


def check_gradient_reaches(
    loss: Loss,
    case: Case,
    trainable: Sequence[str] = LOGPROBS,
    options: Sequence[dict] = ({},),
) -> None:
    """A generic call moves every live slot (else no gradient would prove nothing).

    In one of the settings at least: a clip holds some slots back.
    """
    still = [unmoved(partial(loss, **each), case, trainable) for each in options]
    assert {} in still, f"nothing moves {still}"


def unmoved(loss: Loss, case: Case, trainable: Sequence[str]) -> Case:
    """The slopes that are 0 at a live slot, or not finite."""
    _, slopes = value_and_gradients(loss, copied(case), trainable)
    found = {}
    for name, slope in slopes.items():
        mask = case.get("mask")
        seen = slope[mask] if mask is not None and slope.dim() == 2 else slope
        moved = seen.isfinite() & (seen != 0)
        if not moved.all():
            found[name] = slope
    return found


def check_pure(function: Loss, cases, model: torch.nn.Module | None = None) -> None:
    """No randomness drawn, no input touched, the same bits when called again.

    A `model` the function uses keeps its parameters and each module's train/eval mode.
    """

    model = torch.nn.Module() if model is None else model

    def modes():
        return [module.training for module in model.modules()]

    def weights():
        return {name: x.clone() for name, x in model.state_dict().items()}

    @forall(cases, examples=15)
    def holds(case):
        before = {name: x.clone() for name, x in case.items()}
        versions = {name: x._version for name, x in case.items()}
        old_modes, old_weights = modes(), weights()
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        first = torch.as_tensor(function(**case))
        assert torch.equal(torch.get_rng_state(), states[0]), "torch's generator moved"
        assert random.getstate() == states[1], "Python's generator moved"
        assert all(
            np.array_equal(a, b)
            for a, b in zip(np.random.get_state(), states[2], strict=True)
        ), "NumPy's generator moved"
        assert modes() == old_modes, "train/eval mode changed"
        for name, weight in weights().items():
            assert torch.equal(weight, old_weights[name]), f"parameter {name} changed"
        for name, x in case.items():
            assert x._version == versions[name], f"{name} was written to"
            assert torch.equal(x, before[name]), f"{name} changed"
        second = torch.as_tensor(function(**case))
        assert torch.equal(second, first), "the second call differs"

    holds()


def check_float32(loss: Loss, cases, trainable: Sequence[str] = LOGPROBS) -> None:
    """Float32 agrees with float64 and stays float32."""

    @forall(cases)
    def holds(case):
        floats = [name for name, x in case.items() if x.is_floating_point()]
        double = value_and_gradients(loss, case, trainable)
        single = value_and_gradients(loss, cast(case, torch.float32, floats), trainable)
        assert single[0].dtype == torch.float32, f"float32 in, {single[0].dtype} out"
        raised = single[0].double(), {k: v.double() for k, v in single[1].items()}
        assert_same(raised, double, "float32", **F32)

    holds()


def cast(case: Case, dtype: torch.dtype, names: Sequence[str]) -> Case:
    return copied({k: x.to(dtype) if k in names else x for k, x in case.items()})


def check_types_refused(loss: Loss, case: Case) -> None:
    """Integers, half precision and an integer mask are TypeErrors that name the
    argument."""
    loss(**copied(case))  # the case itself is fine
    for name in case:
        refused = [torch.int64] if name == "mask" else [torch.int64, torch.bfloat16]
        for dtype in refused:
            other = cast(case, dtype, [name])
            assert_refused(loss, other, TypeError, f"{name} as {dtype}", [name])


def check_duplication(
    loss: Loss, cases, trainable: Sequence[str] = LOGPROBS, factor: float = 1.0
) -> None:
    """Every row twice leaves a mean as it was (a sum doubles: factor 2)."""

    @forall(cases)
    def holds(case):
        value, slopes = value_and_gradients(loss, case, trainable)
        twice = {name: torch.cat((x, x)) for name, x in case.items()}
        expected = (
            factor * value,
            {name: factor / 2 * torch.cat((g, g)) for name, g in slopes.items()},
        )
        assert_same(value_and_gradients(loss, twice, trainable), expected, "rows twice")

    holds()


def check_options_matter(loss: Loss, case: Case, options: Sequence[dict]) -> None:
    """Each option does something, the others being what they were.

    `options` are settings, the usual one first. One at a time is changed to what the
    other settings say of it, until one change is felt.
    """
    usual = options[0]
    expected = torch.as_tensor(loss(**copied(case), **usual))
    for name in dict.fromkeys(name for setting in options for name in setting):
        changed = [{**usual, name: each[name]} for each in options if name in each]
        values = [torch.as_tensor(loss(**copied(case), **each)) for each in changed]
        assert any(not torch.equal(x, expected) for x in values), f"{name} does nothing"


def check_defaults(loss: Loss, case: Case, defaults: dict, given: dict) -> None:
    """What is not said is this, option by option; the others are given."""
    whole = loss(**copied(case), **given, **defaults)
    for name in defaults:
        told = {key: value for key, value in defaults.items() if key != name}
        silent = loss(**copied(case), **given, **told)
        assert torch.equal(silent, whole), f"{name}: another default"
