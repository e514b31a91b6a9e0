"""All results on one page, from the records and from nothing else."""

import json

import pytest

from lessons import results
from minialign import plotting


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


def row(page, method, part=0):
    """The cells of a method's first row in a part of the page."""
    text = page.split("\n## ")[part]
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
    (folder / "13_rloo_dials.json").write_text(json.dumps(trials))
    page = results.render()
    assert row(page, "RLOO", 3)[1:] == [
        "lr 1 0.500; **lr 2 0.600**; 64 steps 0.620",
        "3",
        "1",
    ]
    assert row(page, "ReMax", 3)[1:] == [results.DASH, "0", "0"]
