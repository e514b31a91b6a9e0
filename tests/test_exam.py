"""What every method is compared by: the exam, the report, and trials of settings."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minialign import course, exam, plotting


@pytest.fixture
def tokenizer():
    return course.load_tokenizer()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(plotting, "LOCAL", tmp_path / "figures" / "local")
    return tmp_path / "figures"


def smoke_settings(seed=0, preset="smoke", record=False, grid=False):
    arguments = ["--preset", preset, "--device", "cpu", "--seed", str(seed)]
    arguments += ["--record"] * record + ["--grid"] * grid
    return course.setup("98_test.py", arguments)


def test_a_policy_that_did_not_move_closed_no_gap(tokenizer, capsys):
    settings = smoke_settings()
    base = course.load_policy(tokenizer, settings.device)
    taken = exam.exam(settings, tokenizer, base, "before")
    assert taken.sampled.correct.shape == (8, 8)
    curve = [0, 100, 200, 400], [0.2, 0.9, 0.8, 0.4]
    run = exam.report(settings, tokenizer, base, base, taken, taken, curve)
    assert run["gap_closed"] == [0.0, 0.0, 0.0] and run["kl"] == [0.0, 0.0, 0.0]
    assert run["sampled"][0] == run["sampled"][1]
    accuracy = taken.sampled.correct.mean()
    assert run["sampled"][0][0] == run["accuracy_at_kl"] == pytest.approx(accuracy)
    assert run["completions_to_0.8"] == 100
    assert run["area"] == pytest.approx((0.55 * 100 + 0.85 * 100 + 0.6 * 200) / 400)
    low = [0, 100], [0.2, 0.79]
    run = exam.report(settings, tokenizer, base, base, taken, taken, low)
    assert run["completions_to_0.8"] is None
    assert "never reached" in capsys.readouterr().out
    run = exam.report(settings, tokenizer, base, base, taken, taken, ([0], [0.9]))
    assert run["completions_to_0.8"] == 0 and run["area"] == 0.9
    assert "to reach 0.8: 0.0;" in capsys.readouterr().out


@dataclass(frozen=True)
class Knob:
    lr: float = 0.1
    micro_batch: int = 4


@pytest.fixture
def tried(folders, tokenizer, monkeypatch):
    """run_trials with a run that only notes what it was asked; every trial "judged"."""
    asked = []
    judged = {"accuracy": [0.5, 0.4, 0.6], "greedy": [0.5], "kl": [0.1]}
    judged |= {"length": 20.0, "pass_at_4": 0.7}
    monkeypatch.setattr(exam, "judge_whole", lambda *args: judged)

    def run(config, settings, **options):
        if config.lr < 0:
            raise KeyboardInterrupt
        asked.append((config.lr, settings.seed, sorted(options)))
        return None, {"seconds": [1.0, 2.0]}

    def try_them(trials, seed=0, preset="full", tuning=()):
        asked.clear()
        settings = smoke_settings(seed, preset, record=preset == "full")
        found = exam.run_trials(settings, tokenizer, None, trials, run, tuning)
        return asked, found

    (folders / "local").mkdir(parents=True)
    return try_them


def test_a_trial_on_record_is_not_run_again(tried, capsys):
    trials = {"a": (Knob(), {}), "b": (Knob(0.2), {"f": max})}
    asked, found = tried(trials)
    assert asked == [(0.1, exam.TUNING_SEED, []), (0.2, exam.TUNING_SEED, ["f"])]
    assert found["b"]["options"] == {"f": "max"} and found["b"]["seconds"] == 2
    assert tried(trials) == ([], found)
    assert tried({"a": (Knob(micro_batch=2), {})})[0] == []  # it bounds memory alone
    # Another name for the same settings is a new name; another setting is a new run.
    asked, found = tried({"c": trials["a"], "b": (Knob(0.2), {"f": min})})
    assert asked == [(0.2, exam.TUNING_SEED, ["f"])] and list(found) == ["c", "b"]
    exam.print_trials(found)
    assert "0.500 [0.400, 0.600]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "two, verdict",
    [
        ([0.3, 0.2, 0.39], "above"),
        ([0.3, 0.2, 0.4], "not told apart from"),
        ([0.7, 0.6, 0.8], "not told apart from"),
        ([0.7, 0.61, 0.8], "below"),
    ],
)
def test_trials_are_told_apart_by_their_intervals(two, verdict, capsys):
    found = {"one": {"accuracy": [0.5, 0.4, 0.6]}, "two": {"accuracy": two}}
    exam.compare_trials(found, "one", "two", "Does it matter")
    expected = f"- Does it matter:\n  one, 0.500, is {verdict} two, {two[0]:.3f}.\n"
    assert capsys.readouterr().out == expected
    exam.compare_trials(found, "one", "three", "Not on record")
    assert not capsys.readouterr().out


def test_two_functions_without_a_name_are_two_trials(tried):
    trials = {"a": (Knob(), {"f": lambda: 1}), "b": (Knob(), {"f": lambda: 2})}
    asked, found = tried(trials)
    assert len(asked) == 2 and found["a"]["options"] != found["b"]["options"]


def test_an_interrupt_keeps_the_trials_so_far(tried):
    with pytest.raises(KeyboardInterrupt):
        tried({"a": (Knob(), {}), "b": (Knob(-1.0), {})})
    assert tried({"a": (Knob(), {})})[0] == []


def test_other_seeds_and_quick_show_the_record_and_smoke_leaves_it(tried):
    trials = {"a": (Knob(), {})}
    assert tried(trials, preset="quick") == ([], {})
    asked, found = tried(trials, preset="smoke")
    assert len(asked) == 1 and list(found) == ["a"]
    assert tried(trials, preset="quick") == ([], {})
    _, found = tried(trials)
    for seed, preset in ((0, "quick"), (1, "full")):
        assert tried({"z": (Knob(9.0), {})}, seed, preset) == ([], found)


def trial(accuracy, steps, tuning=True, lr=1.0):
    """With an interval of ± 0.03."""
    interval = [accuracy, accuracy - 0.03, accuracy + 0.03]
    config = {"lr": lr}
    return {"accuracy": interval, "steps": steps, "config": config, "tuning": tuning}


def test_the_rule_takes_the_highest_accuracy_and_of_ties_the_fewest_steps():
    trials = {"low": trial(0.557, 16), "high": trial(0.6, 64), "near": trial(0.59, 64)}
    assert exam.choose(trials) == "high"  # 0.043 apart: further than 0.03 times √2
    assert exam.choose(trials | {"tie": trial(0.558, 32)}) == "tie"
    assert exam.choose(trials | {"variant": trial(0.9, 1, tuning=False)}) == "high"
    at_equal_steps = {"b": trial(0.56, 32), "a": trial(0.57, 32)}
    assert exam.choose(trials | at_equal_steps) == "a"
    assert exam.choose(trials | at_equal_steps | {"c": trial(0.56, 32, lr=0.5)}) == "c"


def test_the_record_says_which_trials_the_settings_were_chosen_from(tried):
    trials = {"a": (Knob(), {}), "b": (Knob(0.2), {})}
    _, found = tried(trials, tuning=["b"])
    assert [found[name]["tuning"] for name in "ab"] == [False, True]
    asked, found = tried(trials, tuning=["a"])  # another look at what is on record
    assert not asked and [found[name]["tuning"] for name in "ab"] == [True, False]


def test_a_lesson_ends_with_its_strip(folders, monkeypatch):
    """Curve and price of the committed seeds, and the reader's own run over them."""
    base = {"forced_worked": [0.95], "best_temperature": {"accuracy": [0.5]}}
    monkeypatch.setattr(course, "base_facts", lambda: base)
    monkeypatch.setattr(exam, "base_success", lambda: np.linspace(0.1, 0.9, 9))
    run = {"curve": [[256, 512], [0.5, 0.6]], "kl": [0.4, 0.3, 0.5]}
    run["accuracy_at_kl"] = 0.6
    for seed in (0, 1):
        plotting.save_run("11_b", run, seed, local=False)
    taken = SimpleNamespace(sampled=SimpleNamespace(correct=np.eye(4)))
    digests = []
    for record in (False, True):
        settings = course.Settings(
            "11_b", "full", torch.device("cpu"), 0, time.perf_counter(), record
        )
        own = run | {"curve": [[256, 512], [0.5, 0.7]]}
        exam.finish(settings, own, taken, taken)
        digests.append(plotting.digest_of(settings.folder / "11_b_strip.png"))
    assert digests[0] != digests[1]  # the live run lies over the others
    held = plotting.load_record("11_b")["0"]
    assert held["curve"][1] == [0.5, 0.7] and held["before"][0] == 0.25


def test_the_base_of_the_trials_is_what_lesson_10_measured(folders):
    assert exam.base_on_validation() is None  # nothing is on record
    run = {
        "arms": {"the base": [0.4, 0.3, 0.5], "imitating at random": [0.2, 0.1, 0.3]}
    }
    plotting.save_run("10_rejection_sampling", run, seed=0, local=False)
    assert exam.base_on_validation() == 0.4


# Comparisons that take hours


@pytest.fixture
def cells(folders):
    """run_grid with a run that notes what it was asked, and may be interrupted."""
    asked = []

    def make(named, until=None, **flags):
        """Run the cells of these rates; those that were run, and what came back."""
        asked.clear()

        def run(knob):
            if knob.lr == until:
                raise KeyboardInterrupt
            asked.append(knob.lr)
            return {"found": 2 * knob.lr}

        settings = smoke_settings(**{"preset": "full", **flags})
        knobs = {name: Knob(lr) for name, lr in named.items()}
        return exam.run_grid(settings, knobs, run, "grid")

    return SimpleNamespace(make=make, asked=asked)


THREE = {"one": 0.1, "two": 0.2, "three": 0.3}


def test_a_grid_is_made_only_when_it_is_asked_for(cells):
    assert cells.make(THREE) == {} and cells.asked == []
    found = cells.make(THREE, grid=True)
    assert cells.asked == [0.1, 0.2, 0.3] and list(found) == list(THREE)
    assert found["two"]["found"] == 0.4 and found["two"]["config"]["lr"] == 0.2
    assert cells.make(THREE) == {}  # what is committed, and nothing is
    assert cells.make(THREE, grid=True, record=True) == found
    assert cells.asked == [0.1, 0.2, 0.3]
    assert cells.make(THREE) == found and cells.asked == []
    assert cells.make({}, preset="quick") == found


def test_a_grid_goes_on_where_it_was_stopped(cells):
    with pytest.raises(KeyboardInterrupt):
        cells.make(THREE, until=0.3, grid=True)
    assert cells.asked == [0.1, 0.2]
    found = cells.make(THREE, grid=True)
    assert cells.asked == [0.3] and list(found) == list(THREE)
    changed = {"two": 0.25, "one": 0.1}
    found = cells.make(changed, grid=True)
    assert cells.asked == [0.25] and list(found) == ["two", "one"]
    assert found["two"]["found"] == 0.5


def test_smoke_makes_the_first_cell_and_saves_none(cells, folders):
    found = cells.make(THREE, preset="smoke")
    assert cells.asked == [0.1] and list(found) == ["one"]
    assert not list(folders.rglob("*.json"))
