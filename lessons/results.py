"""All results on one page, figures/README.md, from the records alone.

    render()      the page: every method and seed, verdicts, and how each was tuned
    summary()     the table in the README of the repository: a row a method
    python -m lessons results    writes the page and prints the table

Nothing is measured here: a number that a record does not hold is a dash.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lessons import pages
from minialign import exam, plotting
from minialign.intervals import over_seeds, verdict

PAGE = plotting.FIGURES / "README.md"

# Lessons of a method, and what the method is called.
METHODS = {
    "10_rejection_sampling": "rejection sampling",
    "11_reinforce": "REINFORCE",
    "12_remax": "ReMax",
    "13_rloo": "RLOO",
    "14_trpo": "TRPO",
    "16_grpo": "GRPO",
    "15_ppo": "PPO",
    "30_dpo": "DPO",
    "33_rrhf": "RRHF",
}
DASH = "–"

# What a run has, and how the table shows it: heading, key, decimals.
COLUMNS = (
    ("sampled", "sampled", 3),
    ("greedy", "greedy", 3),
    ("pass@8", "pass_at_8", 3),
    ("second skill", "second_skill", 3),
    ("length", "length", 1),
    ("gap closed", "gap_closed", 3),
    ("answers to 0.8", "completions_to_0.8", 0),
    ("mean height", "area", 3),
    ("KL, nats", "kl", 2),
    ("at that KL", "accuracy_at_kl", 3),
    ("frontier there", "frontier", 3),
    ("steps", "steps", 0),
    ("tokens trained", "tokens_trained", 0),
)


def render() -> str:
    """The page as Markdown."""
    records = {name: plotting.load_record(name) for name in METHODS}
    records = {name: runs for name, runs in records.items() if runs}
    return "\n".join(
        [
            "# Results",
            "",
            "This page is made from the records in this folder by `python -m lessons",
            "results`. Each run starts at the same base and draws 16,384 answers; the",
            "lesson of a method says what its numbers mean.",
            "",
            "## The base",
            "",
            "On the 1,000 test problems (lesson 01). Seed 0 is `data/base.ckpt`, from",
            "which every run below starts.",
            "",
            *_base(),
            "",
            "## Every method, every seed",
            "",
            *_results(records),
            "",
            "## Which is better?",
            "",
            "Neighbours by the mean gap closed. The unit is the difference in sampled",
            "accuracy on one test problem, averaged within a seed; the interval is",
            "over seeds, and `intervals.verdict` says what the words mean.",
            "",
            *_verdicts(records),
            "",
            "## How each was tuned",
            "",
            "One rule for all. Four learning rates (of TRPO, which has none, four",
            "bounds on KL), each twice the one before; a fifth",
            "where the highest led; then two settings of the method's own, at the rate",
            "that led. Each trial draws 4,096 answers with a seed that reports nothing",
            "and is judged on validation. The highest accuracy wins, **bold**; of",
            "those tied with it, the fewest optimiser steps, then the smallest rate",
            "(`exam.choose`). *Variants* are trials that a lesson asks about: nothing",
            "was chosen from them.",
            "",
            *_tuning(records),
            "",
        ]
    )


def summary() -> str:
    """A row a method, the best mean gap first: what its accuracy brought and cost.

    A method has a row once three of its runs, with what they cost, are on record.
    """
    records = {name: plotting.load_record(name) for name in METHODS}
    records = {
        name: runs
        for name, runs in records.items()
        if len(runs) >= 3 and all("steps" in run for run in runs.values())
    }
    heads = ["method", "gap closed", "answers to 0.8", "KL, nats", "second skill"]
    rows = [heads, ["---"] * len(heads)]
    for lesson in sorted(records, key=lambda name: -_mean_gap(records[name])):
        runs = list(records[lesson].values())
        reached = [_cell(run["completions_to_0.8"], 0) for run in runs]
        cells = [
            f"[{METHODS[lesson]}](lessons/{lesson}.{_end(lesson)})",
            _gap(records[lesson]).removesuffix(", 3 seeds"),
            " / ".join(reached),
            f"{_mean(runs, 'kl'):.2f}",
            f"{_mean(runs, 'second_skill'):.2f}",
        ]
        rows.append(cells)
    return "\n".join(_row(cells) for cells in rows)


def _end(lesson: str) -> str:
    """A lesson's page is what a reader is sent to, where there is one."""
    return "md" if pages.page(lesson, local=False).exists() else "py"


def _mean(runs: Sequence[Mapping], key: str) -> float:
    """Over the seeds, after training."""
    found = [run[key] for run in runs]
    after = [each[1] if isinstance(each[0], list) else each for each in found]
    return float(np.mean([value for value, _, _ in after]))


def _base() -> list[str]:
    """What each training of the base came to."""
    columns = ("sampled", "greedy", "forced_worked", "forced_terse", "second_skill")
    heads = ["seed", *(name.replace("_", " ") for name in columns)]
    rows = [heads, ["---"] * len(heads)]
    for seed, run in plotting.load_record("01_sft").items():
        found = run.get("base", {})
        rows.append([seed, *(_cell(found.get(name), 3) for name in columns)])
    return [_row(cells) for cells in rows]


def _results(records: Mapping[str, Mapping[str, dict]]) -> list[str]:
    heads = ["method", "seed", *(head for head, _, _ in COLUMNS)]
    rows = [heads, ["---"] * len(heads)]
    for lesson, runs in records.items():
        for seed, run in runs.items():
            cells = [_cell(run.get(key), decimals) for _, key, decimals in COLUMNS]
            rows.append([METHODS[lesson], seed, *cells])
    return [_row(cells) for cells in rows]


def _cell(found: object, decimals: int) -> str:
    """A number; of an estimate its interval too; of before and after, what is after."""
    if found is None:
        return DASH
    if isinstance(found, list) and isinstance(found[0], list):
        found = found[1]
    if isinstance(found, list):
        texts = [f"{number:.{decimals}f}" for number in found]
        return f"{texts[0]} [{texts[1]}, {texts[2]}]"
    return f"{found:,.{decimals}f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _verdicts(records: Mapping[str, Mapping[str, dict]]) -> list[str]:
    ranked = sorted(records, key=lambda name: -_mean_gap(records[name]))
    rows = [["method", "gap closed", "against the next"], ["---"] * 3]
    for lesson, after in zip(ranked, [*ranked[1:], None], strict=True):
        said = "" if after is None else _verdict(records[lesson], records[after])
        rows.append([METHODS[lesson], _gap(records[lesson]), said])
    return [_row(cells) for cells in rows]


def _mean_gap(runs: Mapping[str, dict]) -> float:
    return float(np.mean([run["gap_closed"][0] for run in runs.values()]))


def _gap(runs: Mapping[str, dict]) -> str:
    values = [run["gap_closed"][0] for run in runs.values()]
    if len(values) == 1:
        return f"{values[0]:.3f}, one seed"
    return f"{over_seeds(values)}, {len(values)} seeds"


def _verdict(runs: Mapping[str, dict], others: Mapping[str, dict]) -> str:
    """Of the seeds that both have; a dash where a record has no number per problem."""
    seeds = [seed for seed in runs if seed in others]
    differences = []
    for seed in seeds:
        ours = runs[seed].get("right_of_samples")
        theirs = others[seed].get("right_of_samples")
        if ours is None or theirs is None:
            return DASH
        differences.append(np.array(ours) / 8 - np.array(theirs) / 8)
    return str(verdict(differences)) if differences else DASH


def _tuning(records: Mapping[str, Mapping[str, dict]]) -> list[str]:
    """A row a method: every trial that its settings were chosen from, and the rest."""
    rows = [["method", "tuning: sampled accuracy on validation", "trials", "variants"]]
    rows.append(["---"] * 4)
    for lesson in records:
        trials = plotting.load_record(f"{lesson}_trials")
        tuned = {name: trial for name, trial in trials.items() if trial.get("tuning")}
        chosen = exam.choose(tuned) if tuned else None
        cells = []
        for name, trial in tuned.items():
            said = f"{name} {trial['accuracy'][0]:.3f}"
            cells.append(f"**{said}**" if name == chosen else said)
        counts = [str(len(tuned)), str(len(trials) - len(tuned))]
        rows.append([METHODS[lesson], "; ".join(cells) or DASH, *counts])
    return [_row(cells) for cells in rows]


def write() -> Path:
    PAGE.write_text(render(), encoding="utf-8")
    return PAGE
