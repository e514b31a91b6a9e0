"""All results on one page, from the records and from nothing else."""

import itertools
import json

import pytest

from lessons import results
from minialign import exam, plotting


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Writes records of two methods, three seeds each, into a folder of the test."""
    monkeypatch.setattr(plotting, "FIGURES", tmp_path)

    def run(right, gap):
        before = [0.4, 0.3, 0.5]
        right_of_samples = [right, right, 8, 0]
        return {
            "sampled": [before, [right / 8, 0.1, 0.9]],
            "gap_closed": [gap, gap - 0.1, gap + 0.1],
            "completions_to_0.8": None,
            "area": 0.5,
            "steps": 64,
            "tokens_trained": 123456,
            "right_of_samples": right_of_samples,
        }

    def write(rloo, remax):
        for name, (right, gap) in {"13_rloo": rloo, "12_remax": remax}.items():
            runs = {str(seed): run(right, gap) for seed in range(3)}
            (tmp_path / f"{name}.json").write_text(json.dumps(runs))
        return tmp_path

    return write


def row(page, method, part):
    """The cells of a method's first row in a part of the page."""
    text = page.split("\n## ")[part + 1]  # after the head, and the base
    line = next(each for each in text.splitlines() if each.startswith(f"| {method} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_run_has_its_row_and_what_is_not_on_record_a_dash(records):
    records(rloo=(4, 0.5), remax=(2, 0.1))
    cells = row(results.render(), "RLOO", 1)
    assert cells[:3] == ["RLOO", "0", "0.500 [0.100, 0.900]"]  # after, not before
    assert cells[-2:] == ["64", "123,456"]
    heads = [head for head, _, _ in results.COLUMNS]
    assert cells[2 + heads.index("answers to 0.8")] == results.DASH
    assert cells[2 + heads.index("mean height")] == "0.500"
    assert cells[2 + heads.index("greedy")] == results.DASH


def test_the_base_has_a_row_a_seed(records):
    folder = records(rloo=(4, 0.5), remax=(2, 0.1))
    base = {"sampled": [0.46, 0.44, 0.48], "forced_worked": [0.95, 0.93, 0.96]}
    (folder / "01_sft.json").write_text(json.dumps({"2": {"base": base}}))
    cells = row(results.render(), "2", 0)
    assert cells[:2] == ["2", "0.460 [0.440, 0.480]"]
    assert cells[3] == "0.950 [0.930, 0.960]" and cells[2] == results.DASH


@pytest.mark.parametrize(
    "remax, verdict",
    [  # RLOO is right in 4 of 8 answers to each of two problems, of four
        (2, "+0.125 [+0.125, +0.125] over 3 seeds: apart"),
        (4, "+0.000 [+0.000, +0.000] over 3 seeds: equal"),
    ],
)
def test_neighbours_are_compared_problem_by_problem(records, remax, verdict):
    records(rloo=(4, 0.5), remax=(remax, 0.1))
    page = results.render()
    gap = "0.500 [0.500, 0.500], 3 seeds"
    assert row(page, "RLOO", 2)[1:] == [gap, verdict]
    assert row(page, "ReMax", 2)[2] == ""  # the last has no neighbour


def test_without_numbers_per_problem_there_is_no_verdict(records):
    folder = records(rloo=(4, 0.5), remax=(2, 0.1))
    runs = json.loads((folder / "12_remax.json").read_text())
    del runs["1"]["right_of_samples"]
    (folder / "12_remax.json").write_text(json.dumps(runs))
    assert row(results.render(), "RLOO", 2)[2] == results.DASH


def test_the_tuning_of_a_method_is_one_row_and_its_choice_is_bold(records):
    folder = records(rloo=(4, 0.5), remax=(2, 0.1))
    trial = {"accuracy": [0.5, 0.45, 0.55], "steps": 16, "tuning": True}
    trial["config"] = {"lr": 1.0}
    trials = {
        "lr 1": trial,
        "lr 2": trial | {"accuracy": [0.6, 0.55, 0.65]},
        "64 steps": trial | {"accuracy": [0.62, 0.56, 0.66], "steps": 64},
        "broken": trial | {"accuracy": [0.9, 0.8, 1.0], "tuning": False},
    }
    (folder / "13_rloo_trials.json").write_text(json.dumps(trials))
    page = results.render()
    assert row(page, "RLOO", 3)[1:] == [
        "lr 1 0.500; **lr 2 0.600**; 64 steps 0.620",
        "3",
        "1",
    ]
    assert row(page, "ReMax", 3)[1:] == [results.DASH, "0", "0"]


def test_the_summary_has_the_methods_whose_cost_is_on_record(records):
    folder = records(rloo=(4, 0.5), remax=(2, 0.1))
    extra = {"kl": [1.0, 0.9, 1.1], "second_skill": [[0.7, 0, 1], [0.6, 0, 1]]}
    for name in ("13_rloo", "12_remax"):
        path = folder / f"{name}.json"
        runs = json.loads(path.read_text())
        path.write_text(json.dumps({seed: run | extra for seed, run in runs.items()}))
    *_, first, second = results.summary().splitlines()
    assert first.startswith("| [RLOO](lessons/13_rloo.")
    assert "| 0.500 [0.500, 0.500] |" in first
    assert first.endswith("| – / – / – | 1.00 | 0.60 |")
    assert second.startswith("| [ReMax]")
    runs = json.loads((folder / "13_rloo.json").read_text())
    del runs["1"]["steps"]
    (folder / "13_rloo.json").write_text(json.dumps(runs))
    assert "RLOO" not in results.summary()


# What is committed

TRIALS = {name: plotting.load_record(f"{name}_trials") for name in results.METHODS}
TUNED = {  # the methods whose trials say which of them the settings were chosen from
    name: trials
    for name, trials in TRIALS.items()
    if any("tuning" in trial for trial in trials.values())
}


def settings_of(entry: dict) -> dict:
    """A config without what bounds memory alone."""
    return {key: x for key, x in entry["config"].items() if key != "micro_batch"}


def test_the_page_of_all_results_is_what_the_records_make():
    assert results.PAGE.read_text(encoding="utf-8") == results.render()


@pytest.mark.parametrize("lesson", TUNED)
def test_every_method_was_tuned_alike(lesson):
    """Four learning rates or five, each twice the last, and two settings of its own."""
    trials = TUNED[lesson]
    tuned = [trial for trial in trials.values() if trial["tuning"]]
    *by_rate, one, two = map(settings_of, tuned)
    assert len(by_rate) in (4, 5)
    size = "lr" if "lr" in one else "delta"  # what says how long a step is
    rates = [config.pop(size) for config in by_rate]
    for rate, following in itertools.pairwise(rates):
        assert following == pytest.approx(2 * rate)
    assert all(config == by_rate[0] for config in by_rate)
    options = [trial["options"] for trial in tuned]
    assert not any(options[: len(by_rate)])
    leading = max(tuned[: len(by_rate)], key=lambda trial: trial["accuracy"][0])
    for own, given in ((one, options[-2]), (two, options[-1])):
        assert own[size] == leading["config"][size]
        assert given or own != settings_of(leading)
    for trial in tuned:
        assert trial["series"]["completions"][-1] == 4_096
    assert len(trials) - len(tuned) <= 6


@pytest.mark.parametrize("lesson", TUNED)
def test_every_headline_run_has_the_settings_that_the_rule_chose(lesson):
    trials = TUNED[lesson]
    chosen = settings_of(trials[exam.choose(trials)])
    for run in plotting.load_record(lesson).values():
        headline = settings_of(run)
        apart = {key for key in chosen if chosen[key] != headline[key]}
        grows = "rounds" if "rounds" in chosen else "updates"
        assert apart == {grows} and headline[grows] == 4 * chosen[grows]


def test_the_readme_has_the_summary():
    readme = results.PAGE.parents[1] / "README.md"
    assert results.summary() in readme.read_text(encoding="utf-8")
