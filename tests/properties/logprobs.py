"""What log-probabilities, their sums and KL estimates owe, beside test_logprobs.py."""

import math
from functools import partial

import torch

from minialign.logprobs import masked_sum
from tests import strategies
from tests import test_logprobs as of
from tests.properties import common


def check_scores_at_temperature(token_logprobs) -> None:
    """GEN-8."""
    cold = partial(token_logprobs, temperature=0.5)
    of.check_scores_one_by_one(cold, temperature=0.5)


def check_all_but_impossible(score) -> None:
    """A thousand nats below the rest: the value and the gradient stay finite."""
    logits = torch.tensor([[0.0, -1000.0]]).requires_grad_()
    value = score(logits, torch.tensor([1]))
    assert value.item() == -1000.0
    (slope,) = torch.autograd.grad(value, logits)
    assert slope.tolist() == [[-1.0, 1.0]]


def check_half_is_lifted_first(score) -> None:
    """In half precision nothing is computed, at no temperature."""
    low = of.THREE.bfloat16()[None].expand(3, -1)
    for temperature in (1.0, 0.7):
        call = torch.arange(3), temperature
        assert torch.equal(score(low, *call), score(low.float(), *call))


def check_sums_row_by_row(reduce) -> None:
    """As Python adds up the live slots."""

    @common.forall(of.X_CASES, examples=20)
    def holds(case):
        expected = of.by_loops(**case)[masked_sum]
        of.close(reduce(**case), of.tensor(expected))

    holds()


def check_sure_choices(exact) -> None:
    """KL-4 where a probability is 0 in float32: log 2, 0, and finite slopes."""
    sure, even = torch.tensor([0.0, -1000.0]), torch.zeros(2)
    pairs = (
        (sure, even, math.log(2)),
        (sure, sure, 0.0),
        (even, sure, 500 - math.log(2)),
    )
    for policy, reference, expected in pairs:
        leaf = policy.clone().requires_grad_()
        value = exact(leaf, reference)
        assert math.isclose(value.item(), expected, abs_tol=1e-4)
        assert torch.autograd.grad(value, leaf)[0].isfinite().all()


def check_shift_of_all_logits(score) -> None:
    """LP-4: a constant on all logits of a choice changes nothing; half is half."""
    logits, targets = torch.tensor([[3e38, 3e38, 0.0]]), torch.tensor([1])
    of.close(score(logits, targets), torch.tensor([0.5]).log())
    logits = of.tensor([[0.5, -0.2, 0.1], [2.0, 0.0, -5.0]])
    targets = torch.tensor([0, 2])
    expected = score(logits, targets)
    of.close(score(logits + 7.0, targets), expected)
    assert (expected <= 0).all()


def check_sum_of_a_constant(reduce) -> None:
    """C-3: the mean length of the rows that live, times the constant."""

    def expected(c, mask):
        lengths = mask.sum(1).double()
        return c * lengths[lengths > 0].mean()

    masks = strategies.shapes().flatmap(strategies.masks)
    common.check_constant(reduce, masks, expected)


def check_on_policy_gradient(estimate) -> None:
    """KL-8: on fresh samples the expected gradient is that of KL(policy ‖ reference)"""
    on_policy = of.on_policy(estimate)
    of.check_gradient_whole(on_policy, of.KL_GRADIENT)


def check_ratio_slot_by_slot(ratio) -> None:
    """π / π_old in value and gradient, 1 where masked."""

    @common.forall(of.RATIOS, examples=20)
    def holds(case):
        value, slopes = common.value_and_gradients(lambda **x: ratio(**x).sum(), case)
        live, new, old = (case[k] for k in ("mask", "logprobs", "old_logprobs"))
        expected = torch.where(live, new.exp() / old.exp(), 1.0)
        of.close(value, expected.sum())
        of.close(slopes["logprobs"], expected * live)

    holds()


def check_ratio_is_bounded(ratio) -> None:
    """NUM-4: what float32 could not hold is refused, and not inf."""
    far, near = torch.tensor([[-1.0, -100.0]]), -torch.ones(1, 2)
    mask = torch.tensor([[True, True]])
    case = {"logprobs": near, "old_logprobs": far, "mask": mask}
    common.assert_refused(ratio, case, ValueError, "e^99", ["old_logprobs"])
    assert ratio(far, near, mask)[0, 1] > 0
