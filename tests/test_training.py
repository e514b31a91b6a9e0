"""What every `train` owes, for each entry of tests/methods.py.

The checks themselves are in tests/properties/training.py. What is one method's own is
in its own file: an update by hand, above all.
"""

import json
import math
import os
import pkgutil
import subprocess
import sys
from dataclasses import fields
from functools import cache, partial
from itertools import islice
from pathlib import Path

import pytest
import torch

from minialign import algorithms, checkpoint
from tests.methods import METHODS, Method, another, start
from tests.properties import training
from tests.toy import base, base_weights, stretched

DRAWING = {name: each for name, each in METHODS.items() if each.draws}
PRICED = {name: each for name, each in DRAWING.items() if each.price}
WATCHED = {name: each for name, each in DRAWING.items() if not each.price}


def of(methods: dict[str, Method]):
    return pytest.mark.parametrize("method", methods.values(), ids=methods)


def each_change(attribute: str, methods: dict[str, Method] = METHODS):
    """Every method with each of the changes that its entry has under this name."""
    cases = [
        pytest.param(method, changes, id=f"{name}, {title}")
        for name, method in methods.items()
        for title, changes in getattr(method, attribute).items()
    ]
    return pytest.mark.parametrize("method, changes", cases)


def learns(method: Method, changes: dict) -> bool:
    run = partial(method.run, **method.long | changes)
    return training.learns(run, method.sure, method.shows)


def begun(method: Method, **changes) -> training.Begin:
    """Of a state: the metrics of a run with everything switched on."""
    return lambda state: start(method, state, **changes)[1]


def test_every_algorithm_has_an_entry():
    modules = pkgutil.iter_modules(algorithms.__path__)
    assert METHODS.keys() == {module.name for module in modules}


# Learning


@each_change("variants")
def test_it_learns_what_is_rewarded(method, changes):
    assert learns(method, changes)


FLIPS = [
    pytest.param(method, loss, id=f"{name}, {loss}")
    for name, method in METHODS.items()
    for loss in method.flips
]


@pytest.mark.parametrize("method, loss", FLIPS)
def test_with_a_flipped_sign_it_does_not(method, loss, monkeypatch):
    """The negative control: the same test fails."""
    training.flip(monkeypatch, method.module, loss)
    assert not learns(method, method.flips[loss])


@of(DRAWING)
def test_with_another_rows_rewards_it_does_not(method, monkeypatch):
    """A shuffled reward has nothing to say about any answer."""
    right = method.module.score

    def shuffled(*args):
        return right(*args).roll(1)

    monkeypatch.setattr(method.module, "score", shuffled)
    assert not learns(method, method.shuffled)


@each_change("misleading")
def test_with_nothing_to_learn_from_it_does_not(method, changes):
    """The other controls: whatever is compared says nothing, or nothing is compared."""
    assert not learns(method, changes)


# What is drawn and scored


@of(DRAWING)
def test_problems_are_asked_in_order_and_again_when_they_run_out(method, monkeypatch):
    draws = {"rounds": 3, "updates": 1} if method.in_rounds else {"updates": 3}
    run = partial(method.run, prompts=2, samples=2, **draws)
    asked = ["aabb", "ccdd", "eeaa"]
    if method.greedy:
        asked = ["aabb", "ab", "ccdd", "cd", "eeaa", "ea"]
    calls = len(asked) // 3
    training.check_order_of_problems(run, asked, method.module, monkeypatch, calls)


@of(METHODS)
def test_train_is_a_generator(method):
    config = method.config
    updates_a_draw = config.updates if method.in_rounds else 1
    draws = config.rounds if method.in_rounds else config.updates
    judged = []  # answers in each call of the reward, in one draw
    if method.draws:
        judged.append(config.prompts * config.samples)
    if method.greedy:
        judged.append(config.prompts)

    def answers(update):
        return judged * math.ceil(update / updates_a_draw)

    length = draws * updates_a_draw
    training.check_lazy(method.run, answers, length, stop=updates_a_draw + 1)


@of(DRAWING)
def test_an_answer_that_does_not_end_earns_nothing_and_is_counted(method):
    training.check_truncation(partial(method.run, **method.long))


@of(DRAWING)
def test_scoring_repeats_the_sampler(method, monkeypatch):
    check = training.check_scoring_repeats_the_sampler
    check(method.run, method.module, monkeypatch, method.still, method.scores)


@each_change("variants", DRAWING)
def test_micro_batches_change_nothing(method, changes):
    def run(policy, config, **more):
        steps = method.run(policy, config, **method.everything | changes, **more)
        return islice(steps, 2)

    more = {"sizes": (100, 5, 1), "models": method.models, **method.rounding}
    training.check_micro_batches(run, method.config, **more)


@of(DRAWING)
def test_micro_batches_bound_memory(method):
    most = 4 * method.answers_per_item
    training.check_memory(method.run, most, micro_batch=4)


@of(PRICED)
def test_the_reference_too_is_read_in_parts(method):
    training.check_reference_in_parts(method.run, updates=2)


DEALING = {name: each for name, each in DRAWING.items() if each.dealt}


@of(DEALING)
def test_how_answers_are_dealt_never_moves_what_is_sampled(method, monkeypatch):
    """While no weight moves, every draw is the same, in whatever order it is used."""
    drawn = training.spied_draws(monkeypatch)
    runs = []
    for dealt in ({}, method.dealt):
        drawn.clear()
        list(method.run(base(), **method.still | dealt))
        runs.append([rollout.tokens for _, rollout in drawn])
    assert len(runs[0]) == len(runs[1]) >= 2
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# Several steps a draw

STEPPING = {
    name: each for name, each in DRAWING.items() if "epochs" in vars(each.config)
}


@of(STEPPING)
def test_every_step_is_a_step_of_its_own(method):
    """At rates of 0 each pass over the same answers is the first once more: no gradient
    is left over from the step before, and the price on the KL is in each."""
    still = {**method.still, "beta": 0.5}
    once, thrice = (
        next(method.run(stretched(), reference=base(), epochs=epochs, **still))
        for epochs in (1, 3)
    )
    for name in ("loss", "grad_norm"):
        assert thrice[name] == pytest.approx(once[name], rel=1e-4, abs=1e-6)
    assert once["grad_norm"] > 0.01


# Nothing to learn


@each_change("idle", DRAWING)
def test_where_the_gradient_is_only_rounding_the_policy_stays_as_it_is(method, changes):
    """Adam makes a whole step of any gradient, were it 1e-8: so it must be exactly 0.

    From a fresh optimiser; methods that rightly have a gradient there are not asked.
    """
    policy = base()
    if "reference" in changes:
        changes = {**changes, "reference": changes["reference"]()}
    if "warmup" in vars(method.config):
        changes = {**changes, "warmup": 0}
    metrics = next(method.run(policy, **changes))
    training.assert_same_bits(dict(policy.state_dict()), dict(base_weights()))
    assert metrics["grad_norm"] == 0


# A reference


@of(PRICED)
def test_beta_holds_the_policy_back_and_the_reference_stays_as_it_is(method):
    training.check_kl(method.run, **method.price)


@of(WATCHED)
def test_the_reference_only_watches(method):
    training.check_reference_only_watches(method.run)


# A state


@of(METHODS)
def test_the_state_is_the_callers_models_at_every_yield(method):
    state: dict = {}
    models, metrics = start(method, state)
    for row in metrics:
        assert state["update"] == row["update"]
        for name in method.models:
            weights = dict(models[name].state_dict())
            training.assert_same_bits(dict(state[name]), weights)


@each_change("states")
def test_resuming_gives_the_same_bits(method, changes, tmp_path):
    """Weights, optimiser, generators, position, and what else there is."""
    path = tmp_path / "state.pt"
    training.check_resume(begun(method, **changes), method.stops, path)


CONTINUE = """
import json, sys, torch
from minialign import algorithms, checkpoint
from tests.methods import METHODS, start
torch.set_num_threads(1)
rest = {}
for name, method in METHODS.items():
    state = checkpoint.load(f"{sys.argv[1]}/{name}.before")
    _, metrics = start(method, state)
    rest[name] = list(metrics)
    checkpoint.save(f"{sys.argv[1]}/{name}.after", state)
print(json.dumps(rest))
"""


@pytest.mark.slow
def test_resuming_in_a_new_process_gives_the_same_bits(tmp_path):
    """The rest of each run in a process that has nothing but the files."""
    ends = {}
    expected = {}
    for name, method in METHODS.items():
        state: dict = {}
        steps = begun(method)(state)
        next(steps)
        checkpoint.save(tmp_path / f"{name}.before", state)
        expected[name] = list(steps)
        ends[name] = state
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
    for name, end in ends.items():
        state = checkpoint.load(tmp_path / f"{name}.after")
        training.assert_same_bits(state, end, name)


@of({name: each for name, each in DRAWING.items() if "data_order" in each.gaps})
def test_a_state_without_an_order_of_its_data_is_refused(method):
    """As one that was written before there was such a thing."""
    state: dict = {}
    next(start(method, state)[1])
    del state["data_order"]
    with pytest.raises(ValueError, match=r"state.*'data_order'"):
        next(start(method, state)[1])


@of(METHODS)
def test_a_state_with_a_gap_would_be_found(method, tmp_path):
    path = tmp_path / "state.pt"
    training.check_every_entry_is_needed(begun(method), path, method.gaps)


@of(METHODS)
def test_no_global_generator_is_touched_or_asked(method):
    training.check_global_randomness_untouched(begun(method))


@of(DRAWING)
def test_training_draws_from_its_own_generator(method):
    training.check_own_generator(method.run)


# Settings


@of({name: each for name, each in METHODS.items() if each.rates})
def test_the_learning_rate_rises_and_falls_to_zero(method):
    """That of every group of parameters, in every step of an update."""
    six = {} if method.in_rounds else {"updates": 6}
    steps = 1
    if hasattr(method.config, "epochs"):
        six |= {"epochs": 2, "minibatches": 2}
        steps = 4
    run = partial(method.run, **six)
    training.check_schedule(run, method.rates, steps)


# The settings that do nothing, and why.
INERT = {"micro_batch": "it bounds memory and must not change the result: see above"}
# What a setting is changed to, in every method, so that it is felt.
FELT = {"max_grad_norm": 0.1}
SETTINGS = [
    pytest.param(method, setting.name, id=f"{name}, {setting.name}")
    for name, method in METHODS.items()
    for setting in fields(method.config)
    if setting.name not in INERT
]


@cache
def weights_after(method: Method, setting: str = "") -> torch.Tensor:
    """After a run with everything switched on, and one setting changed."""
    changes = {}
    if setting:
        value = method.everything.get(setting, getattr(method.config, setting))
        changes[setting] = (FELT | method.changed).get(setting, another(value))
    state: dict = {}
    list(begun(method, **changes)(state))
    return training.weights_of(state, method.models)


@pytest.mark.filterwarnings("ignore:.*not to end pays")
@pytest.mark.parametrize("method, setting", SETTINGS)
def test_every_setting_does_something(method, setting):
    """With any of them changed, a run ends with other weights."""
    same = torch.equal(weights_after(method, setting), weights_after(method))
    assert not same, f"{setting} changes nothing"


@of(METHODS)
def test_every_variant_is_a_method_of_its_own(method):
    """For what is handed to `train`: no two end with the same policy."""
    ends = []
    for changes in method.variants.values():
        state: dict = {}
        list(islice(begun(method, **changes)(state), 3))
        ends.append(training.weights_of(state, method.models[:1]))
    for i, end in enumerate(ends):
        assert not any(torch.equal(end, other) for other in ends[:i])
