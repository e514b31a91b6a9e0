"""What every `train` owes: each property is a function of the implementation.

A method is handed in as one of two functions, or both; tests/methods.py has them all.

    begin(state)                builds everything anew (a model with *other* weights
                                when the state is to bring them) and gives the generator
                                that `train` returns; an empty state starts a run
    run(policy, config, reward, reference=, state=, ...)
                                calls `train` on the problems of tests/toy.py; all but
                                the policy has a default

`begin` is slow enough that its last draws are still draws, and uses all there is. A
method with more models makes them in `run`, from the policy that it is handed. Whatever
else `run` is handed by name is a setting of the config or an argument of `train`.
"""

import inspect
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from minialign import checkpoint
from minialign import training as room
from tests.properties import common
from tests.toy import (
    always,
    base,
    base_weights,
    chance_of_yes,
    generator,
    judged,
    new_gpt,
    stretched,
    yes,
)

Metrics = dict[str, float]
Begin = Callable[[dict], Iterator[Metrics]]
Run = Callable[..., Iterator[Metrics]]


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


def run_and_save(
    begin: Begin, stops: Sequence[int], path: Path
) -> tuple[list[Metrics], dict, dict[int, Path]]:
    """A whole run: its metrics, its state, and a file of the state after each stop."""
    state: dict = {}
    metrics, saved = [], {}
    for row in begin(state):
        metrics.append(row)
        if len(metrics) in stops:
            saved[len(metrics)] = path.with_name(f"{len(metrics)}-{path.name}")
            checkpoint.save(saved[len(metrics)], state)
    assert list(saved) == list(stops)
    return metrics, state, saved


def check_resume(begin: Begin, stops: Sequence[int], path: Path) -> None:
    """Resumed from what was saved after any of these updates: the same bits.

    Compared are the metrics of every later update and, at the end, all of the state.
    """
    expected, end, saved = run_and_save(begin, stops, path)
    for stop, file in saved.items():
        check_rest(begin, file, expected[stop:], end)


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
    "data_order": lambda saved: generator(9).get_state(),
    "update": lambda saved: 0,
}


def load_with_gap(path: Path, entry: str, forget: Callable) -> dict:
    state = checkpoint.load(path)
    state[entry] = forget(state[entry])
    return state


def check_every_entry_is_needed(
    begin: Begin, path: Path, gaps: Mapping[str, Callable] = GAPS, stop: int = 1
) -> None:
    """The negative control of check_resume: it sees a gap, whichever entry it is in."""
    metrics, end, saved = run_and_save(begin, [stop], path)
    assert end.keys() == gaps.keys()
    for entry, forget in gaps.items():
        load = partial(load_with_gap, entry=entry, forget=forget)
        rest = saved[stop], metrics[stop:], end, load
        found = common.refutes(check_rest, begin, *rest)
        assert found, f"{entry} is saved and not needed"


def check_own_generator(run: Run) -> None:
    """The generator handed in decides what is drawn, and no global one does."""
    torch.manual_seed(0)
    first = next(run(base(), generator=generator(1)))
    assert next(run(base(), generator=generator(2))) != first


# What a run does, seen from outside


def weights_of(state: dict, models: Sequence[str] = ("policy",)) -> torch.Tensor:
    """All weights of these models in a state, one after the other."""
    return torch.cat([x.flatten() for name in models for x in state[name].values()])


def gradient_norm(loss: torch.Tensor, model: torch.nn.Module) -> float:
    slopes = torch.autograd.grad(loss, list(model.parameters()))
    return math.sqrt(sum(slope.double().square().sum().item() for slope in slopes))


def spied(monkeypatch, module, name: str) -> list[tuple]:
    """(arguments, result) of every call that `train` makes of a function of its module,
    as the run goes on. Those that it names come last."""
    original, calls = getattr(module, name), []

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(((*args, *kwargs.values()), result))
        return result

    monkeypatch.setattr(module, name, spy)
    return calls


def spied_draws(monkeypatch) -> list[tuple]:
    """(arguments, result) of every draw, greedy ones too, as the run goes on."""
    return spied(monkeypatch, room, "generate")


def flip(monkeypatch, module, name: str) -> None:
    """The negative control of learning: this loss with the other sign."""
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **more: -right(*args, **more))


def reward_rises(metrics: Sequence[Metrics]) -> bool:
    return metrics[-1]["reward"] - metrics[0]["reward"] > 0.2


def learns(
    run: Run,
    sure: float = 0.95,
    shows: Callable[[Sequence[Metrics]], bool] = reward_rises,
    **more,
) -> bool:
    """Does the exact chance of the rewarded answer go from rare to nearly sure?

    And does it show in the metrics of the run?
    """
    policy = base()
    before = chance_of_yes(policy)
    metrics = list(run(policy, **more))
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

    `expected` is all there is but update, reward, truncated, length, entropy and the
    styles, and what is usual of one step that no guard had to hold back.
    """
    rewards, responses = judged(rollout), rollout.responses()
    tokens = sum(map(len, responses))
    shown = {
        "steps": 1,
        "tokens_trained": tokens,
        "guarded": 0.0,
        "entropy": -rollout.logprobs.sum().item() / tokens,
        "update": 1,
        "reward": rewards.mean().item(),
        "truncated": sum(rollout.truncated.tolist()) / len(responses),
        "length": tokens / len(responses),
    }
    measured, styles = dict(metrics), Counter()
    for name in [name for name in metrics if "style_" in name]:
        styles[name.partition("style_")[0]] += measured.pop(name)
    assert styles[""] and all(x == pytest.approx(1) for x in styles.values())
    assert measured == pytest.approx({**shown, **expected}, rel=rel, abs=floor)
    assert all(type(value) in (int, float) for value in metrics.values())
    assert 0 < metrics["reward"] < 1 and abs(metrics.get("kl", 1)) > 1e-4  # a fair test


def check_lazy(
    run: Run,
    answers: Callable[[int], list[int]],
    length: int,
    stop: int,
) -> None:
    """A generator; the caller's code runs with gradients on, and may stop at any yield.

    answers(u): how many answers each call of the reward has had by update u; `length`:
    all updates there are; `stop`: where this caller has had enough.
    """
    calls = []

    def spy(problems, texts):
        calls.append(len(texts))
        return yes(problems, texts)

    policy = base()
    steps = run(policy, reward=spy)
    assert inspect.isgenerator(steps) and not calls
    assert_same_bits(dict(policy.state_dict()), dict(base_weights()))
    for update in range(1, stop + 1):
        assert next(steps)["update"] == update and calls == answers(update)
        assert torch.is_grad_enabled()
    steps.close()
    assert calls == answers(stop) and len(list(run(policy))) == length


def check_order_of_problems(
    run: Run, asked: Sequence[str], module, monkeypatch, calls: int = 1
) -> None:
    """One problem after the other is asked, and the first again after the last.

    `asked`: the questions in each call of the reward, `calls` of them per draw, and
    there is one update per draw. What the first of these calls judges is what the
    metrics are about. All answers are counted.
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
    metrics = list(run(base(), reward=spy))
    assert seen == list(asked)
    drawn = list(accumulate(map(len, asked)))
    assert [row["completions"] for row in metrics] == drawn[calls - 1 :: calls]
    updates = list(range(1, len(metrics) + 1))
    assert [row["update"] for row in metrics] == updates
    assert all(row["measured"] for row in metrics)


def check_schedule(run: Run, groups: Sequence[str] = ("lr",), steps: int = 1) -> None:
    """Of 6 updates with 2 of warm-up: 1/2, 1, then a line that would meet 0 at 6.

    `groups`: which setting is the peak of each group of parameters, in the order of the
    optimisers that have them. So many `steps` of each make one update.
    """
    peaks = {name: 1e-3 / (1 + i) for i, name in enumerate(dict.fromkeys(groups))}
    rates = []

    def watch(optimizer, args, kwargs):
        rates.extend(group["lr"] for group in optimizer.param_groups)

    watched = register_optimizer_step_pre_hook(watch)
    try:
        list(run(base(), warmup=2, **peaks))
    finally:
        watched.remove()
    expected = []
    for share in (1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4):
        expected += [share * peaks[name] for name in groups] * steps
    assert rates == pytest.approx(expected)


def check_scoring_repeats_the_sampler(
    run: Run,
    module,
    monkeypatch,
    still: Mapping[str, float],
    scores: str = "token_logprobs",
) -> None:
    """One temperature for both, else the policy scored is not the one that answered.

    `scores`: the function of the module that scores. While no weight moves, which the
    settings `still` see to, every answer that is learnt from has the log-probability
    that the sampler gave to one.
    """
    drawn = spied_draws(monkeypatch)
    scored = spied(monkeypatch, module, scores)
    list(run(base(), temperature=0.6, **still))
    rollouts = [rollout for _, rollout in drawn if not rollout.greedy]
    sampled = torch.cat([rollout.logprobs.sum(1) for rollout in rollouts])
    learnt = 0
    for _, result in scored:
        logprobs = result[0] if isinstance(result, tuple) else result
        if logprobs.requires_grad:
            nats = logprobs.detach().sum(1)
            apart = (nats[:, None] - sampled).abs().amin(1)
            assert apart.max() < 1e-5
            learnt += len(nats)
    assert learnt > 5 and (sampled < -0.01).any()


def check_micro_batches(
    run: Run,
    config,
    sizes: Sequence[int] = (100, 12, 5, 1),
    models: Sequence[str] = ("policy",),
    rel: float = 1e-6,
    floor: float = 1e-12,
    **more,
) -> None:
    """In float64: sizes that do and do not divide a batch change nothing."""
    ends = []
    for size in sizes:
        state: dict = {}
        policy = base().double()
        reference = stretched().double()
        sized = replace(config, micro_batch=size)
        metrics = list(run(policy, sized, reference=reference, state=state, **more))
        ends.append((weights_of(state, models), metrics))
    for weights, metrics in ends[1:]:
        torch.testing.assert_close(weights, ends[0][0], rtol=0, atol=1e-7)
        for row, expected in zip(metrics, ends[0][1], strict=True):
            assert row == pytest.approx(expected, rel=rel, abs=floor)


def rows_read(model: torch.nn.Module, learning: bool) -> list[int]:
    """The rows of each pass through the model from now on, with gradients or without.

    It grows as the model is used.
    """
    rows = []

    def note(model, read):
        if torch.is_grad_enabled() == learning:
            rows.append(len(read[0]))

    model.register_forward_pre_hook(note)
    return rows


def check_memory(run: Run, most: int, **more) -> None:
    """No pass with a gradient reads more than so many answers at a time."""
    policy = base()
    rows = rows_read(policy, learning=True)
    list(run(policy, **more))
    assert 0 < max(rows) <= most


def check_reference_in_parts(run: Run, **more) -> None:
    """The reference too reads no more than `micro_batch` answers at a time."""
    reference = base()
    rows = rows_read(reference, learning=False)
    list(run(base(), micro_batch=3, reference=reference, **more))
    assert 0 < max(rows) <= 3


def check_truncation(run: Run, worth: float = 0.1) -> Metrics:
    """An answer that does not end earns nothing and is counted, whatever it is worth.

    Two tokens are enough for "y" and its end, not for "no" and its end.
    """

    def reward(problems, texts):
        return [worth] * len(texts)

    metrics = next(run(base(), reward=reward, max_new_tokens=2))
    assert 0.2 < metrics["truncated"] < 0.9
    assert metrics["reward"] == pytest.approx(worth * (1 - metrics["truncated"]))
    options = {"max_new_tokens": 2, "truncated_reward": -2.0, "state": {}}
    other = next(run(base(), reward=reward, **options))
    lost = -2.0 * metrics["truncated"]
    assert other["reward"] == pytest.approx(metrics["reward"] + lost)
    return metrics


def assert_untouched(reference: torch.nn.Module) -> None:
    """It is the base still, and nobody asked for its gradients."""
    assert_same_bits(dict(reference.state_dict()), dict(base_weights()))
    assert all(weight.grad is None for weight in reference.parameters())


def check_kl(run: Run, beta: float = 1.0, **more) -> None:
    """Reported with a reference only, which stays as it is; a price on it holds back.

    The optimum of E[r] - beta KL has odds of yes e^(1 / beta) times the reference's.
    """
    assert "kl" not in next(run(base()))
    assert "kl" in next(run(base(), reference=base()))
    ends = []
    for price in (0.0, beta):
        policy = base()
        reference = base()
        metrics = list(run(policy, beta=price, reference=reference, **more))
        assert abs(metrics[0]["kl"]) < 1e-5  # a copy of the policy, still
        assert_untouched(reference)
        ends.append(chance_of_yes(policy))
    start = chance_of_yes(base())
    odds = math.exp(1 / beta) * start / (1 - start)
    assert ends[0] > 0.9 > ends[1]
    assert ends[1] < odds / (1 + odds) + 0.2


def check_reference_only_watches(run: Run) -> None:
    """With a reference the KL to it is reported; it stays as it is, and so does all."""
    ends = []
    for reference in (None, base()):
        policy = base()
        metrics = list(run(policy, reference=reference))
        assert ("kl" in metrics[0]) == (reference is not None)
        ends.append(dict(policy.state_dict()))
    assert_same_bits(*ends)
    assert abs(metrics[0]["kl"]) < 1e-5 < metrics[-1]["kl"]
    assert_untouched(reference)
