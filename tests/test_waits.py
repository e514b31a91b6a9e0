"""How often a micro-batch makes Python wait for the GPU: no `train` more than it did.

A wait costs little, and it lets the GPU run dry. Micro-batches are what a run does most
often, so what waits there is counted: WAITS has a number for each method, and an added
wait fails with the lines that wait. The first part is about the counting.
"""

import ast
import inspect
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from minialign.training import Sums
from tests.methods import METHODS, Method, start
from tests.other_device import HERE, THERE, other_device
from tests.test_other_device import names
from tests.waits import LIBRARY, Watch, counted

# Waits in one micro-batch, averaged over those of an update. Whoever takes one away
# lowers the number: set to 0, it makes the test say what it is, and list the lines.
WAITS = {
    "sft": 12,  # those of its report are among them, for its batch is one part
    "rejection_sampling": 8,
    "reinforce": 7,
    "remax": 7,
    "rloo": 7,
    "trpo": 9,
    "grpo": 14,
    "ppo": 14,
    "reward_model": 17,  # three for the labels of its pairs
    "dpo": 11,
    "rrhf": 13,
}

# --- the counting -------------------------------------------------------------------

WAIT_ONCE = """
far.one.item()
float(far.one)
int(far.id)
bool(far.one > 0)
1 in far.ids
[1, 2, 3][far.id]
far.x[far.id]
far.x[:far.id]
torch.full((2,), far.one)
far.x.tolist()
far.x.numpy(force=True)
far.x.cpu()
far.x.to("cpu")
far.x.to(near.x)
near.x.copy_(far.x)
near.x[1:] = far.x[1:]
torch.tensor([far.one])
near.x.to(far.x.device)
near.x.cuda()
far.x.copy_(near.x)
far.x[1:] = near.x[1:]
torch.tensor([1, 2], device=far.x.device)
torch.as_tensor([1, 2], device=far.x.device)
far.x.new_tensor([1.0, 2.0])
far.x.nonzero()
far.x.nonzero(as_tuple=True)
torch.where(far.mask)
far.x[far.mask]
far.x[near.mask]
far.x[near.ids]
far.x[[2, 0]]
far.x[far.mask] = far.square
far.x[far.mask] = far.one
far.x.masked_select(far.column)
torch.equal(far.x, far.x)
torch.allclose(far.x, far.x)
far.x.unique()
far.x.unique(dim=0)
far.ids.bincount()
far.ids.repeat_interleave(far.ids)
far.x.masked_scatter(far.column, far.model(far.x)).sum().backward()
far.model(far.x).sum().backward(); clip(far.model.parameters(), 1.0, 2.0, True)
""".strip().splitlines()

NEVER_WAIT = """
far.x / near.one
far.x * far.one
far.x[far.ids]
far.x[1:]
far.x[near.id]
far.x[far.ids] = far.square
far.x[far.ids] = 1.0
far.x[far.mask] = 1.0
far.x[far.mask] = near.one
far.x.masked_fill(far.column, 0.0)
far.x.masked_scatter(far.column, far.square)
far.x.to(far.x.device)
far.x.to(torch.float64)
far.x.to("cpu", non_blocking=True)
near.x.to(far.x.device, non_blocking=True)
far.x.isfinite().all()
torch.zeros(2, device=far.x.device)
torch.full((2,), 3.0, device=far.x.device)
torch.arange(3, device=far.x.device)
torch.rand(3, device=far.x.device, generator=far.draw)
far.x.repeat_interleave(2, 0)
far.ids.repeat_interleave(far.ids, output_size=2)
F.one_hot(far.ids, 3)
far.x.argsort(stable=True)
far.model(far.x)[far.ids].sum().backward()
far.model(far.x).sum().backward(); clip(far.model.parameters(), 1.0)
far.model(far.x).sum().backward(); torch.optim.AdamW(far.model.parameters()).step()
near.x.tolist()
near.x[near.mask]
near.x.nonzero()
near.x.copy_(near.x)
torch.tensor([near.one, 1.0])
bool(near.one)
""".strip().splitlines()


@pytest.mark.parametrize(
    "line, times",
    [(line, 1) for line in WAIT_ONCE]
    + [(line, 0) for line in NEVER_WAIT]
    + [
        ("torch.tensor([far.one, far.id])", 2),
        ("torch.tensor([far.one, far.id], device=far.x.device)", 3),
        ("far.x[far.mask] *= 2", 2),  # it is read, and then written
        ("far.model(far.x)[far.mask].sum().backward()", 2),  # there and back
    ],
)
def test_what_waits(line, times):
    with other_device():
        known = names(THERE, HERE)
        known["clip"] = known["nn"].utils.clip_grad_norm_
        with counted() as watch:
            exec(line, known)  # noqa: S102
    assert len(watch.waits) == times, watch.waits


def test_a_wait_knows_the_lines_that_led_to_it():
    lines, first = inspect.getsourcelines(Sums.read)
    with other_device() as there, counted() as watch:
        sums = Sums()
        for value in (1.0, 2.0):
            sums.add(total=torch.full((), value, device=there))
        assert sums.read() == {"total": 3.0}
    (wait,) = watch.waits
    ((file, line),) = wait.lines
    assert file == "training.py" and line in range(first, first + len(lines))
    assert str(wait) == f"training.py:{line}: tolist"


# --- the methods --------------------------------------------------------------------


def first_update(method: Method) -> Watch:
    """The waits of the first update, with everything on, in micro-batches of two."""
    changes = {"micro_batch": 2} if hasattr(method.config, "micro_batch") else {}
    with other_device():
        _, steps = start(method, {}, THERE, **changes)
        with counted() as watch:
            next(steps)
    return watch


def micro_batch_lines(module: ModuleType) -> tuple[str, range]:
    """The file, and the lines that run once for each micro-batch: around `backward`."""
    loops = []
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.For):
            called = [x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute)]
            if "backward" in called:
                loops.append(node)
    innermost = max(loops, key=lambda loop: loop.lineno)
    lines = range(innermost.body[0].lineno, innermost.end_lineno + 1)
    return str(Path(module.__file__).relative_to(LIBRARY)), lines


@pytest.mark.parametrize("name", METHODS)
def test_a_micro_batch_waits_no_more_than_it_did(name):
    method = METHODS[name]
    watch = first_update(method)
    parts = watch.calls["backward"]
    assert parts > 1 or name == "sft"  # whose batch is its only part
    file, lines = micro_batch_lines(method.module)
    inside = []
    for wait in watch.waits:
        if any(where == file and line in lines for where, line in wait.lines):
            inside.append(str(wait))
    found = len(inside) / parts
    listed = [f"{n / parts:g} at {wait}" for wait, n in Counter(inside).items()]
    assert found <= WAITS[name], "\n".join(
        [f"{name}: {found:g} waits in a micro-batch, {WAITS[name]} before", *listed]
    )
