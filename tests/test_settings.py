"""Every setting of every config is checked, by type and range, before a run begins.

The configs are found, not listed. What each setting must be is said here once more: its
annotation tells the type, and four sets tell which numbers have a range of their own.
"""

import copy
import functools
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable
from dataclasses import Field, fields, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from minialign import algorithms
from minialign.algorithms import dpo, grpo, ppo, reinforce, reward_model, sft, trpo
from minialign.checks import check_settings
from tests.toy import PROBLEMS, TOKENIZER, generator, new_gpt

inf, nan = math.inf, math.nan
Check = Callable[[object], None]

NAMES = [module.name for module in pkgutil.iter_modules(algorithms.__path__)]
MODULES = [importlib.import_module(f"{algorithms.__name__}.{name}") for name in NAMES]
TRAINS = [module.train for module in MODULES]


def config_of(train: Callable) -> type:
    return inspect.signature(train).parameters["config"].annotation


CONFIGS = [config_of(train) for train in TRAINS]

# What a setting's annotation refuses, whatever its name.
WRONG_TYPES = {
    bool: ["0.1", "False", 0, 1, 0.0, None],
    int: ["1", None, True, 2.5, 2.0, np.float64(2), inf, nan],
    float: ["0.1", None, True, [0.1]],
    float | None: ["0.1", True, [0.1]],
}
# Numbers with a range of their own; the others are finite, and 0 or more.
SHARES = {"gamma", "lam", "cooldown", "memory_decay", "eps_low", "shrink"}
NO_LIMIT = {"max_grad_norm", "eps_high", "value_clip", "kl_stop"}  # inf switches it off
ABOVE_0 = {"temperature", "max_grad_norm", "eps_low", "eps_high", "value_clip"}
ABOVE_0 |= {"shrink", "delta", "learning_temperature"}
BELOW_1 = {"memory_decay", "shrink"}
SIGNED = {"entropy_coef", "truncated_reward", "threshold"}

COUNTS = [-1, 0, 1, 10**6]
NUMBERS = [nan, -inf, -1, -1e-9, 0, 0.0, 1e-9, 0.5, 1, 1.0, 1 + 1e-9, 2, inf]
NUMBERS += [np.float64(0.5)]  # what np.linspace gives is a float as well


def in_short(value: object) -> str:
    """For the names of tests."""
    if getattr(value, "__name__", "") == "train":
        return value.__module__.rpartition(".")[2]
    if isinstance(value, Field):
        return value.name
    return getattr(value, "__name__", str(value))


class Case(NamedTuple):
    """One setting, the others as they are by default; no `error`: it is legal."""

    config: type
    name: str
    value: object
    error: type[Exception] | None

    def __str__(self) -> str:
        return f"{self.config.__name__}.{self.name} = {self.value!r}"


def is_legal_count(name: str, value: int) -> bool:
    if name == "seed":
        return True
    if name == "warmup":
        return value >= 0
    return value >= 1


def is_legal_number(name: str, value: float) -> bool:
    if math.isnan(value) or value == -inf:
        return False
    if value == inf:
        return name in NO_LIMIT
    if value < 0:
        return name in SIGNED
    if value == 0:
        return name not in ABOVE_0
    if value == 1:
        return name not in BELOW_1
    return value < 1 or name not in SHARES


def cases(config: type, setting: Field) -> list[Case]:
    """Every value to try, with the error it must meet."""
    name, kind = setting.name, setting.type
    found = [Case(config, name, value, TypeError) for value in WRONG_TYPES[kind]]
    if None not in WRONG_TYPES[kind]:
        found.append(Case(config, name, None, None))
    if kind is bool:
        return [*found, Case(config, name, True, None), Case(config, name, False, None)]
    tried, is_legal = NUMBERS, is_legal_number
    if kind is int:
        tried, is_legal = COUNTS, is_legal_count
    for value in tried:
        error = None if is_legal(name, value) else ValueError
        found.append(Case(config, name, value, error))
    return found


SETTINGS = []
for each in CONFIGS:
    SETTINGS += [(each, setting) for setting in fields(each)]
CASES = []
for each, setting in SETTINGS:
    CASES += cases(each, setting)


def assert_judged(check: Check, case: Case) -> None:
    """Legal: accepted. Else refused in this way, by name, and with what came."""
    refusal = None
    try:
        check(replace(case.config(), **{case.name: case.value}))
    except (TypeError, ValueError) as error:
        refusal = error
    if case.error is None:
        assert refusal is None, f"{case}: {refusal!r}"
        return
    assert type(refusal) is case.error, f"{case}: {refusal!r}"
    assert re.search(rf"\b{case.name}\b", str(refusal)), f"{case}: {refusal}"
    assert f"got {case.value!r}" in str(refusal), f"{case}: {refusal}"


@pytest.mark.parametrize("config, setting", SETTINGS, ids=in_short)
def test_a_setting_is_judged_by_type_and_range(config, setting):
    for case in cases(config, setting):
        assert_judged(check_settings, case)


@pytest.mark.parametrize("config", CONFIGS, ids=in_short)
def test_defaults_are_legal(config):
    check_settings(config())


def test_every_config_is_that_of_a_train():
    written = []
    for module in MODULES:
        own = [x for x in vars(module).values() if inspect.isclass(x)]
        written += [x for x in own if x.__module__ == module.__name__]
    assert [x for x in written if x.__name__.endswith("Config")] == CONFIGS
    assert len(CONFIGS) >= 9


def test_every_name_with_a_range_of_its_own_is_a_setting():
    """A setting that got another name would else have lost its range unseen."""
    special = SHARES | NO_LIMIT | ABOVE_0 | SIGNED | {"seed", "warmup"}
    assert special <= {setting.name for _, setting in SETTINGS}


# Negative controls: what a check might forget


def forgets_types(config: object) -> None:
    try:
        check_settings(config)
    except TypeError:
        return


def forgets_switches(config: object) -> None:
    """Any value does for one, as Python itself has it."""
    switches = {x.name: False for x in fields(config) if x.type is bool}
    check_settings(replace(config, **switches))


def forgets_shares(config: object) -> None:
    """No share is too large: 80, meant as 80 %, would pass."""
    shares = {}
    for name in SHARES & vars(config).keys():
        value = getattr(config, name)
        if isinstance(value, int | float) and value > 1:
            shares[name] = 0.5
    check_settings(replace(config, **shares))


def forgets_names(config: object) -> None:
    try:
        check_settings(config)
    except (TypeError, ValueError) as error:
        _, _, rest = str(error).partition(":")
        raise type(error)(rest) from error


def is_type_error(case: Case) -> bool:
    return case.error is TypeError


def is_no_switch(case: Case) -> bool:
    return isinstance(getattr(case.config(), case.name), bool) and is_type_error(case)


def is_above_its_share(case: Case) -> bool:
    return case.name in SHARES and case.error is ValueError and case.value > 1


def is_refused(case: Case) -> bool:
    return case.error is not None


FORGETFUL = {
    forgets_types: is_type_error,
    forgets_switches: is_no_switch,
    forgets_shares: is_above_its_share,
    forgets_names: is_refused,
}


@pytest.mark.parametrize("check", FORGETFUL, ids=in_short)
def test_a_forgetful_check_would_be_found(check):
    """By those cases, and no others, that are about what it forgets."""
    found = []
    for case in CASES:
        try:
            assert_judged(check, case)
        except AssertionError:
            found.append(str(case))
    expected = [str(case) for case in CASES if FORGETFUL[check](case)]
    assert found == expected
    assert found


# Every `train` asks first

SIZES = {"prompts", "samples", "batch", "max_new_tokens"}


class Unread(list):
    """Examples that nobody may read."""

    def __getitem__(self, index):
        raise AssertionError("an example was read")


def unheard(problems, texts):
    """A reward that nobody may ask."""
    raise AssertionError("an answer was judged")


def assert_refused_at_once(
    train: Callable, name: str, value: object, error: type[Exception]
) -> None:
    """The run is refused before it draws, reads, or changes anything."""
    model, chance, state = new_gpt(0), generator(), {}
    before = copy.deepcopy(model.state_dict())
    given = {
        "policy": model,
        "model": model,
        "critic": ppo.Critic(model),
        "tokenizer": TOKENIZER,
        "problems": PROBLEMS,
        "examples": Unread([([97], [98])]),
        "rankings": Unread([reward_model.Ranking([97], [[98], [99]])]),
        "reward": unheard,
        "generator": chance,
        "state": state,
        "pad_id": TOKENIZER.pad_id,
    }
    parameters = inspect.signature(train).parameters
    call = {key: x for key, x in given.items() if key in parameters}
    config = config_of(train)()
    small = {key: 2 for key in SIZES & vars(config).keys()}
    config = replace(config, **small | {name: value})
    with pytest.raises(error, match=rf"\b{name}: got"):
        next(train(**call, config=config))
    assert torch.equal(chance.get_state(), generator().get_state()), "it drew"
    assert state == {}
    after = model.state_dict()
    assert all(torch.equal(after[key], x) for key, x in before.items())


# Each of these once trained, or was refused only after its first draw.
ONCE_ACCEPTED = [
    (dpo.train, "reset_reference", "0.1", TypeError),  # it was taken for True
    (reinforce.train, "memory_decay", 1.5, ValueError),
    (sft.train, "cooldown", 5.0, ValueError),
    (sft.train, "updates", 2.5, TypeError),
    (grpo.train, "eps_low", 1.1, ValueError),
    (ppo.train, "value_clip", 0.0, ValueError),
]
# Nobody but `check_settings` would mind a gradient norm of True.
ALL = [
    (train, "max_grad_norm", True, TypeError)
    for train in TRAINS
    if train is not trpo.train  # it has none
]
RUNS = [*ONCE_ACCEPTED, *ALL, (dpo.train, "beta", 0.0, ValueError)]
RUNS += [(trpo.train, "damping", True, TypeError), (trpo.train, "delta", 0, ValueError)]


@pytest.mark.parametrize("train, name, value, error", RUNS, ids=in_short)
def test_a_run_is_refused_before_it_begins(train, name, value, error):
    assert_refused_at_once(train, name, value, error)


def test_a_run_that_asks_too_late_or_never_would_be_found(monkeypatch):
    @functools.wraps(reinforce.train)
    def too_late(*, generator, **call):
        torch.rand(1, generator=generator)
        yield from reinforce.train(**call, generator=generator)

    case = "memory_decay", 1.5, ValueError
    with pytest.raises(AssertionError, match="it drew"):
        assert_refused_at_once(too_late, *case)
    monkeypatch.setattr(reinforce, "check_settings", lambda config: None)
    with pytest.raises(AssertionError, match="an answer was judged"):
        assert_refused_at_once(reinforce.train, *case)
