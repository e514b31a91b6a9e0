"""What every `train` owes: each property is a function of the implementation.

A test module describes its method by two functions at its top level.

    begin(state)                builds everything anew (a model with *other* weights
                                when the state is to bring them) and gives the generator
                                that `train` returns; an empty state starts a run
    run(policy, config, reward, seed=, reference=, state=, ...)
                                calls `train` on the problems of tests/toy.py; all but
                                the policy has a default

`begin` is slow enough that its last draws are still draws, and uses all there is. A
method with more models makes them in `run`, from the policy that it is handed. `config`
is that method's, with what the property needs set by the caller where it says so.
"""

import copy
import inspect
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from minialign import checkpoint
from tests.properties import common
from tests.toy import (
    always,
    base,
    base_weights,
    chance_of_yes,
    generator,
    judged,
    new_gpt,
    yes,
)

Metrics = dict[str, float]
Begin = Callable[[dict], Iterator[Metrics]]
Run = Callable[..., Iterator[Metrics]]

CONTINUE = """
import importlib, json, sys, torch
from minialign import checkpoint
torch.set_num_threads(1)
module, begin, before, after = sys.argv[1:]
state = checkpoint.load(before)
metrics = list(getattr(importlib.import_module(module), begin)(state))
checkpoint.save(after, state)
print(json.dumps(metrics))
"""


def assert_same_bits(actual, expected, where: str = "state") -> None:
    """Two states are equal in every tensor and number, not just close."""
    assert type(actual) is type(expected), f"{where}: {actual!r}, not {expected!r}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected), f"{where}: {actual.keys()}"
        for key, value in expected.items():
            assert_same_bits(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{where}: {len(actual)} entries"
        for i, value in enumerate(expected):
            assert_same_bits(actual[i], value, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, f"{where}: {actual.dtype}"
        assert torch.equal(actual, expected), f"{where} differs"
    else:
        assert actual == expected, f"{where}: {actual!r}, not {expected!r}"


def check_resume(begin: Begin, stops: Sequence[int], path: Path) -> None:
    """IO-3: stopped after any of these updates and resumed from a file: the same bits.

    Compared are the metrics of every update and, at the end, all of the state.
    """
    whole: dict = {}
    expected = list(begin(whole))
    for stop in stops:
        state: dict = {}
        metrics = list(islice(begin(state), stop))
        assert metrics == expected[:stop], f"up to {stop}: other metrics"
        checkpoint.save(path, state)
        check_rest(begin, path, expected[stop:], whole)


def check_rest(
    begin: Begin,
    path: Path,
    expected: Sequence[Metrics],
    end: dict,
    load: Callable[[Path], dict] = checkpoint.load,
) -> None:
    """From this file on: these metrics and, at the end, this state."""
    state = load(path)
    assert list(begin(state)) == expected, "other metrics than without a stop"
    assert_same_bits(state, end)


def check_resume_in_new_process(begin: Begin, stop: int, folder: Path) -> None:
    """IO-3, the rest of the run in a process that has nothing but the file."""
    whole: dict = {}
    expected = list(begin(whole))
    state: dict = {}
    list(islice(begin(state), stop))
    before, after = folder / "before.pt", folder / "after.pt"
    checkpoint.save(before, state)
    names = begin.__module__, begin.__qualname__
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, *names, str(before), str(after)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected[stop:]
    assert_same_bits(checkpoint.load(after), whole)


def check_global_randomness_untouched(begin: Begin) -> None:
    """Training draws from its own generators only, and does not hang on the others."""
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        runs.append(list(begin({})))
        assert torch.equal(torch.get_rng_state(), states[0]), "torch's generator moved"
        assert random.getstate() == states[1], "Python's generator moved"
        same = zip(np.random.get_state(), states[2], strict=True)
        assert all(np.array_equal(a, b) for a, b in same), "NumPy's generator moved"
    assert runs[0] == runs[1], "the run depends on a global generator"


# What a state holds, and something else in its place. An algorithm adds its own.
GAPS: dict[str, Callable] = {
    "policy": lambda saved: new_gpt(9).state_dict(),
    "optimizer": lambda saved: {**saved, "state": {}},
    "generator": lambda saved: generator(9).get_state(),
    "update": lambda saved: 0,
}


def load_with_gap(path: Path, entry: str, forget: Callable) -> dict:
    state = checkpoint.load(path)
    state[entry] = forget(state[entry])
    return state


def check_every_entry_is_needed(
    begin: Begin, path: Path, gaps: Mapping[str, Callable] = GAPS, stop: int = 2
) -> None:
    """The negative control of check_resume: it sees a gap, whichever entry it is in."""
    whole: dict = {}
    rest = list(begin(whole))[stop:]
    state: dict = {}
    list(islice(begin(state), stop))
    assert state.keys() == gaps.keys()
    checkpoint.save(path, state)
    for entry, forget in gaps.items():
        load = partial(load_with_gap, entry=entry, forget=forget)
        found = common.refutes(check_rest, begin, path, rest, whole, load)
        assert found, f"{entry} is saved and not needed"


def check_own_generator(begin: Begin, run: Run) -> None:
    """The generator handed in decides what is drawn, and no global one does."""
    check_global_randomness_untouched(begin)
    torch.manual_seed(0)
    assert next(run(base(), seed=1)) != next(run(base(), seed=2))


# What a run does, seen from outside


def weights_of(state: dict, models: Sequence[str] = ("policy",)) -> torch.Tensor:
    """All weights of these models in a state, one after the other."""
    return torch.cat([x.flatten() for name in models for x in state[name].values()])


def gradient_norm(loss: torch.Tensor, model: torch.nn.Module) -> float:
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    return math.sqrt(sum(slope.double().square().sum().item() for slope in slopes))


def spied(monkeypatch, module, name: str) -> list[tuple]:
    """(arguments, result) of every call that `train` makes of a function of its module,
    as the run goes on."""
    original, calls = getattr(module, name), []

    def spy(*args, **kwargs):
        calls.append((args, original(*args, **kwargs)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, spy)
    return calls


def flip(monkeypatch, module, name: str) -> None:
    """The negative control of learning: this loss with the other sign."""
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **more: -right(*args, **more))


def reward_rises(metrics: Sequence[Metrics]) -> bool:
    return metrics[-1]["reward"] - metrics[0]["reward"] > 0.2


def learns(
    run: Run,
    config,
    sure: float = 0.95,
    shows: Callable[[Sequence[Metrics]], bool] = reward_rises,
    **more,
) -> bool:
    """Does the exact chance of the rewarded answer go from rare to nearly sure?

    And does it show in the metrics of the run?
    """
    policy = base()
    before = chance_of_yes(policy)
    metrics = list(run(policy, config, **more))
    assert 0.1 < before < 0.6  # of the world, not of the algorithm
    return chance_of_yes(policy) > sure and shows(metrics)


@torch.no_grad()
def row_kl(policy, reference, rollout, temperature: float = 1.0) -> list[float]:
    """Nats from the reference at each choice of each answer, summed: exact over the
    vocabulary, alone, without padding."""
    found = []
    for row, response in enumerate(rollout.responses()):
        start = rollout.prompt_lengths[row].item()
        ids = rollout.tokens[None, row, : start + len(response) - 1]
        own, other = (
            F.log_softmax(model.logits(model(ids))[0, start - 1 :] / temperature, -1)
            for model in (policy, reference)
        )
        found.append(F.kl_div(other, own, log_target=True, reduction="sum").item())
    return found


def assert_metrics(
    metrics: Metrics, rollout, expected: Metrics, rel: float = 1e-4, floor: float = 1e-5
) -> None:
    """The first metrics of a run are these, and what its one draw shows by itself.

    `expected` is all there is but update, reward, truncated, length and the styles.
    """
    rewards, responses = judged(rollout), rollout.responses()
    shown = {
        "update": 1,
        "reward": rewards.mean().item(),
        "truncated": sum(rollout.truncated.tolist()) / len(responses),
        "length": sum(map(len, responses)) / len(responses),
    }
    measured, styles = dict(metrics), Counter()
    for name in [name for name in metrics if "style_" in name]:
        styles[name.partition("style_")[0]] += measured.pop(name)
    assert styles[""] and all(x == pytest.approx(1) for x in styles.values())
    assert measured == pytest.approx({**shown, **expected}, rel=rel, abs=floor)
    assert all(type(value) in (int, float) for value in metrics.values())
    assert 0 < metrics["reward"] < 1 and abs(metrics.get("kl", 1)) > 1e-3  # a fair test


def check_lazy(
    run: Run, answers: Callable[[int], list[int]], length: int, stop: int = 2
) -> None:
    """A generator; the caller's code runs with gradients on, and may stop at any yield.

    answers(u): how many answers each call of the reward has had by update u; `length`:
    all updates there are; `stop`: where this caller has had enough.
    """
    calls, state = [], {}

    def spy(problems, texts):
        calls.append(len(texts))
        return yes(problems, texts)

    policy = base()
    steps = run(policy, reward=spy, state=state)
    assert inspect.isgenerator(steps) and not calls
    for update in range(1, stop + 1):
        assert next(steps)["update"] == update and calls == answers(update)
        assert torch.is_grad_enabled()
        assert_same_bits(dict(state["policy"]), dict(policy.state_dict()))
        assert state["update"] == update
    steps.close()
    assert calls == answers(stop) and len(list(run(policy))) == length


def check_order_of_problems(
    run: Run, config, asked: Sequence[str], module, monkeypatch, calls: int = 1
) -> None:
    """One problem after the other is asked, and the first again after the last.

    `asked`: the questions in each call of the reward, `calls` of them per update; what
    the first of these judges is what the metrics are about. All answers are counted.
    """
    seen = []

    def spy(problems, texts):
        seen.append("".join(problem.question for problem in problems))
        return always(problems, texts)

    def measured(problems, rollout, rewards, tokenizer):
        repeated = [p.question for p in problems for _ in range(rollout.samples)]
        assert "".join(repeated) == seen[-calls]
        return {"measured": 1.0}

    monkeypatch.setattr(module, "answer_metrics", measured)
    metrics = list(run(base(), config, spy))
    assert seen == list(asked)
    drawn = list(accumulate(map(len, asked)))
    assert [row["completions"] for row in metrics] == drawn[calls - 1 :: calls]
    assert [row["update"] for row in metrics] == list(range(1, config.updates + 1))
    assert all(row["measured"] for row in metrics)


def check_schedule(run: Run, config, steps: int = 1) -> None:
    """Of 6 updates with 2 of warm-up: 1/2, 1, then a line that would meet 0 at 6.

    `steps` of the optimiser make one update; a config that has them so is the caller's.
    """
    rates = []

    def watch(optimizer, args, kwargs):
        rates.append(optimizer.param_groups[0]["lr"])

    watched = register_optimizer_step_pre_hook(watch)
    try:
        list(run(base(), replace(config, lr=1.0)))
    finally:
        watched.remove()
    expected = [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]
    assert rates == pytest.approx([rate for rate in expected for _ in range(steps)])


def check_scoring_repeats_the_sampler(run: Run, config, module, monkeypatch) -> None:
    """One temperature for both, else the policy scored is not the one that answered."""
    drawn = spied(monkeypatch, module, "generate")
    scored = spied(monkeypatch, module, "token_logprobs")
    list(run(base(), replace(config, temperature=0.6, micro_batch=99, updates=2)))
    rollouts = [rollout for _, rollout in drawn if not rollout.greedy]
    assert len(rollouts) == 2
    for rollout, (_, logprobs) in zip(rollouts, scored, strict=True):
        (rows,) = rollout.micro_batches(99)
        expected = rollout.select(rows).logprobs
        torch.testing.assert_close(logprobs.detach(), expected, rtol=0, atol=1e-5)
        assert (logprobs < -0.01).any()


def check_micro_batches(
    run: Run,
    config,
    sizes: Sequence[int] = (100, 12, 5, 1),
    models: Sequence[str] = ("policy",),
    rel: float = 1e-6,
    floor: float = 1e-12,
    **more,
) -> None:
    """C-4, in float64: sizes that do and do not divide a batch change nothing."""
    ends = []
    for size in sizes:
        state: dict = {}
        policy, reference = base().double(), base().double()
        sized = replace(config, micro_batch=size)
        metrics = list(run(policy, sized, reference=reference, state=state, **more))
        ends.append((weights_of(state, models), metrics))
    for weights, metrics in ends[1:]:
        torch.testing.assert_close(weights, ends[0][0], rtol=0, atol=1e-7)
        for row, expected in zip(metrics, ends[0][1], strict=True):
            assert row == pytest.approx(expected, rel=rel, abs=floor)


def check_reference_in_parts(run: Run, config, **more) -> None:
    """The reference too reads no more than `micro_batch` answers at a time."""
    reference, rows = base(), []
    reference.register_forward_pre_hook(lambda _, read: rows.append(len(read[0])))
    list(run(base(), replace(config, micro_batch=3), reference=reference, **more))
    assert 0 < max(rows) <= 3


def check_truncation(run: Run, config, worth: float = 1.0) -> Metrics:
    """An answer that does not end earns nothing and is counted, whatever it is worth.

    Two tokens are enough for "y" and its end, not for "no" and its end.
    """
    config = replace(config, max_new_tokens=2)
    metrics = next(run(base(), config, lambda _, texts: [worth] * len(texts)))
    assert 0.2 < metrics["truncated"] < 0.9
    assert metrics["reward"] == pytest.approx(worth * (1 - metrics["truncated"]))
    return metrics


def check_options(
    begin: Callable[..., Iterator[Metrics]],
    config,
    changes: Mapping[str, float],
    updates: int | None = 4,
    models: Sequence[str] = ("policy",),
) -> None:
    """C-10: with any of these options changed, other weights after some updates."""
    assert changes.keys() <= vars(config).keys()

    def end(config):
        state: dict = {}
        list(islice(begin(state, config), updates))
        return weights_of(state, models)

    expected = end(config)
    for name, value in changes.items():
        same = torch.equal(end(replace(config, **{name: value})), expected)
        assert not same, f"{name} = {value} changes nothing"


def check_kl(run: Run, config, beta: float = 1.0, **more) -> None:
    """Reported with a reference only, which stays as it is; a price on it holds back.

    The optimum of E[r] - beta KL has odds of yes e^(1 / beta) times the reference's.
    """
    assert "kl" not in next(run(base()))
    assert "kl" in next(run(base(), reference=base()))
    ends = []
    for price in (0.0, beta):
        policy, reference = base(), base()
        priced = replace(config, beta=price)
        metrics = list(run(policy, priced, reference=reference, **more))
        assert abs(metrics[0]["kl"]) < 1e-5  # a copy of the policy, still
        assert_same_bits(dict(reference.state_dict()), dict(base_weights()))
        assert all(p.grad is None for p in reference.parameters())
        ends.append(chance_of_yes(policy))
    start = chance_of_yes(base())
    odds = math.exp(1 / beta) * start / (1 - start)
    assert ends[0] > 0.9 > ends[1]
    assert ends[1] < odds / (1 + odds) + 0.2


# What is refused


def assert_refused(run: Run, match: str, policy, *args, **more) -> None:
    """The call is refused before it changes a weight."""
    before = copy.deepcopy(dict(policy.state_dict()))
    with pytest.raises(ValueError, match=match):
        list(run(policy, *args, **more))
    assert_same_bits(dict(policy.state_dict()), before)


def check_beta_refused(run: Run, config, alone: str = "beta: got") -> None:
    """What is no strength; `alone`: what is said where there is no reference either."""
    for beta in (-1.0, math.nan, math.inf):
        wrong = replace(config, beta=beta)
        assert_refused(run, alone, base(), wrong)
        assert_refused(run, "beta: got", base(), wrong, reference=base())


def check_reference_refused(run: Run, config) -> None:
    """It shares no weight with the policy, not even one."""
    policy, other = base(), base()
    other.embed_tokens.weight = policy.embed_tokens.weight
    for reference in (policy, other):
        match = "reference: shares weights"
        assert_refused(run, match, policy, config, reference=reference)


def check_beta_needs_a_reference(run: Run, config) -> None:
    """One of its own; and where beta is 0 none that shares weights either."""
    priced = replace(config, beta=0.1)
    assert_refused(run, "reference: beta is 0.1", base(), priced)
    for each in (config, priced):
        check_reference_refused(run, each)


def check_gradient_refused(run: Run, new_model: Callable = base) -> None:
    """A gradient that is not finite stops training."""
    for bad in (math.nan, math.inf):
        model = new_model()
        model.norm.weight.register_hook(lambda slope, bad=bad: slope * bad)
        assert_refused(run, "update 0: gradient norm", model)


def check_reward_refused(run: Run) -> None:
    """A reward that is not finite stops training."""
    nothing = {"reward": lambda problems, texts: [math.nan] * len(texts)}
    assert_refused(run, "not finite", base(), **nothing)
