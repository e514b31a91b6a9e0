"""What every method is compared by: an exam, a report, and trials of its settings.

A lesson on a method takes the base and what became of it through the same exam, and
reports the way between them. Trials say how much of it is due to the method's settings.

    exam, show_answers                          a policy answers the test problems
    distance, report                            what its training brought, and the price
    finish                                      the end of such a lesson
    run_trials, print_trials, compare_trials    the same algorithm under other settings
    run_grid                                    comparisons that take hours
    base_on_validation                          what such trials start from
    choose                                      which of them a headline run takes
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from minialign import course, plotting
from minialign.course import (
    Settings,
    as_estimate,
    as_list,
    base_success,
    cost,
    load_problems,
    say,
)
from minialign.evaluation import (
    Answers,
    frontier_at,
    measured_kl,
    pass_at_k,
    sample_answers,
    style_shares,
)
from minialign.intervals import Estimate, bootstrap, difference, gap_closed
from minialign.model import GPT
from minialign.problems import Problem
from minialign.sampling import generate
from minialign.tokenizer import Tokenizer

TUNING_SEED = 100  # settings are chosen with it, on validation; 0, 1, 2 report on test

# --- how good a policy is -----------------------------------------------------------


@dataclass(frozen=True)
class Exam:
    """A policy's answers to the test problems, and to those of the second skill."""

    sampled: Answers  # 8 to each problem, at temperature 1
    greedy: Answers
    skill: Answers  # greedy, to problems that no reward of the course ever asks


def exam(settings: Settings, tokenizer: Tokenizer, policy: GPT, purpose: str) -> Exam:
    """Examine a policy; `purpose` ("before", "after") names the sampling generator."""
    test = load_problems("test", settings.pick(8, 256, 1000))
    skill = load_problems("second_skill", settings.pick(8, 100, 500))
    draw = settings.generator(purpose)
    return Exam(
        sampled=sample_answers(policy, tokenizer, test, 8, generator=draw),
        greedy=sample_answers(policy, tokenizer, test, 1, greedy=True),
        skill=sample_answers(policy, tokenizer, skill, 1, greedy=True),
    )


def show_answers(taken: Exam, count: int = 3) -> None:
    """Print the first sampled answer to each of the first problems."""
    answers = taken.sampled
    for i, problem in enumerate(answers.problems[:count]):
        verdict = "right" if answers.correct[i, 0] else "wrong"
        print(f"{problem.question}\n{answers.texts[i][0]}")
        print(f"({answers.styles[i][0]}, {verdict}; gold {problem.gold})\n")


def distance(
    tokenizer: Tokenizer,
    policy: GPT,
    reference: GPT,
    problems: Sequence[Problem],
    generator: torch.Generator,
) -> Estimate:
    """KL(policy ‖ reference) in nats per answer: mean over problems, 2 answers each."""
    rollout = generate(
        policy,
        [tokenizer.encode_prompt(problem.question) for problem in problems],
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        max_new_tokens=128,
        samples=2,
        generator=generator,
    )
    nats = measured_kl(policy, reference, rollout).view(-1, 2).mean(1)  # (N,)
    return bootstrap(nats.cpu().numpy())


def report(
    settings: Settings,
    tokenizer: Tokenizer,
    policy: GPT,
    reference: GPT,
    before: Exam,
    after: Exam,
    curve: tuple[Sequence[float], Sequence[float]],
) -> dict:
    """What every method is compared by: printed, and returned for the record.

    `curve` is (completions generated, sampled accuracy) over training. The *gap* leads
    from the base to the base forced to work. `area` is the mean height of the curve.
    The *frontier* is the most accuracy that the measured KL can buy (lesson 04).
    """
    test = before.sampled.problems
    working = sample_answers(
        reference, tokenizer, test, 1, greedy=True, first_token="<<"
    )
    forced = working.correct[:, 0]  # (N,)
    success = base_success()
    held = test[: len(success)]
    nats = distance(tokenizer, policy, reference, held, settings.generator("kl"))
    reached, area = _pace(curve)
    was = _per_problem(before)
    now = _per_problem(after)
    found: dict[str, Any] = {}
    print()
    for name in was:
        first = bootstrap(was[name])
        last = bootstrap(now[name])
        found[name] = [as_list(first), as_list(last)]
        change = difference(now[name], was[name])
        print(f"{name:<16}{first} -> {last}, change {change}")
    closed = gap_closed(was["sampled"], now["sampled"], forced)
    best = frontier_at(success[: len(held)], nats.value)
    bought = float(now["sampled"][: len(held)].mean())
    drawn = "never reached" if reached is None else reached
    print(f"gap to the base forced to work ({forced.mean():.3f}) closed: {closed}")
    print(f"KL(policy ‖ base) {nats} nats per answer; {bought:.3f} right there,")
    print(f"  where so many nats can buy {best:.3f} at most (the frontier)")
    print(f"answers drawn to reach 0.8: {drawn}; area {area:.3f}")
    return found | {
        "gap_closed": as_list(closed),
        "kl": as_list(nats),
        "accuracy_at_kl": bought,
        "frontier": best,
        "completions_to_0.8": reached,
        "area": area,
        "right_of_samples": after.sampled.correct.sum(1).tolist(),
    }


def finish(settings: Settings, run: dict, before: Exam, after: Exam) -> None:
    """Draw the standard strip, and save the run with the sampled accuracy of both
    exams as its two numbers."""
    figure = plotting.strip(
        course.runs_on_record(settings, run),
        run,
        not settings.record,
        base_success(),
        course.base_facts(),
        settings.lesson.partition("_")[2].replace("_", " "),
    )
    name = f"{settings.lesson}_strip.png"
    plotting.save_figure(figure, settings.figure_path.with_name(name))
    first = bootstrap(before.sampled.correct.mean(1))
    last = bootstrap(after.sampled.correct.mean(1))
    measure = "sampled accuracy on test problems, 95 % over problems"
    course.finish(settings, run, first, last, measure)


def _per_problem(taken: Exam) -> dict[str, np.ndarray]:
    """What an exam measured, a number per problem: each (N,)."""
    return {
        "sampled": taken.sampled.correct.mean(1),
        "greedy": taken.greedy.correct[:, 0],
        "pass_at_8": pass_at_k(taken.sampled.correct, 8),
        "second_skill": taken.skill.correct[:, 0],
        "length": taken.sampled.lengths.mean(1),
    }


def _pace(
    curve: tuple[Sequence[float], Sequence[float]],
) -> tuple[float | None, float]:
    """Completions at which the curve first reaches 0.8, or None; its mean height."""
    steps = np.asarray(curve[0], float)
    heights = np.asarray(curve[1], float)
    if len(heights) > 20:  # batches of a few hundred answers: noisy
        heights = plotting.smoothed(heights, 5)
    above = np.flatnonzero(heights >= 0.8)
    reached = float(steps[above[0]]) if len(above) else None
    if len(steps) < 2:
        return reached, float(heights[0])
    middles = (heights[1:] + heights[:-1]) / 2
    widths = np.diff(steps)
    return reached, float(np.average(middles, weights=widths))


# --- trials: the same algorithm under other settings --------------------------------


def run_trials(
    settings: Settings,
    tokenizer: Tokenizer,
    reference: GPT,
    trials: Mapping[str, tuple[Any, Mapping[str, Any]]],
    run: Callable[..., tuple[GPT, dict[str, list[float]]]],
    tuning: Collection[str] = (),
    *,
    name: str = "trials",
    judge: Callable[..., dict] | None = None,
) -> dict[str, dict]:
    """Try settings: {name: (config, options)} -> {name: what was measured}.

    `tuning` names the trials from which the headline run's settings were chosen, by
    `choose`; the others are variants that a lesson asks about. `name` is that of the
    record, after the lesson's. `judge` measures a trained policy; None: `judge_whole`.

    Calls run(config, settings, **options) -> (policy, series) with a seed that no
    reported run uses, and judges on validation. With --record, seed 0 runs what the
    record lacks and saves each as it ends: a trial whose config and options are on
    record is not run again. `smoke` runs one for each set of options and saves none.
    Else: the record.
    """
    judge = judge or judge_whole
    name = f"{settings.lesson}_{name}"
    record = plotting.load_record(name)
    records = settings.record and settings.seed == 0
    if settings.preset != "smoke" and not records:
        return record
    known: dict[str, dict] = {}
    if records:
        known = {_trial_key(entry): entry for entry in record.values()}
    else:
        trials = _one_of_each_kind(trials)
    practice = replace(settings, seed=TUNING_SEED)
    tried: dict[str, dict] = {}
    for title, (config, options) in trials.items():
        entry = {"config": asdict(config), "options": _names(options, title)}
        key = _trial_key(entry)
        if key in known:
            tried[title] = known[key] | {"tuning": title in tuning}
            continue
        say(f"trial: {title}")
        policy, series = run(config, practice, **options)
        entry |= judge(practice, tokenizer, policy, reference)
        entry["seconds"] = series["seconds"][-1]
        entry["series"] = series
        entry |= cost(series)
        entry["tuning"] = title in tuning
        tried[title] = entry
        if records:
            plotting.save_trials(name, record | tried)
    if not records:
        return tried
    plotting.save_trials(name, tried)
    return plotting.load_record(name)


def run_grid(
    settings: Settings,
    cells: Mapping[str, Any],
    run: Callable[[Any], dict],
    name: str,
) -> dict[str, dict]:
    """Comparisons that take hours: {name: config} -> {name: what run(config) found}.

    Only with --grid are they made. What the record lacks, or has of another config, is
    run, and saved as it ends: a second call goes on where the first was stopped. What
    `run` reads beside its config is not compared: whoever changes that removes the
    record. Cells that are not asked for any more leave it. `name` is that of the
    record, after the lesson's; it lies in figures/local/, or with --record in figures/.
    `smoke` runs the first cell and saves none. Else: the committed record.
    """
    name = f"{settings.lesson}_{name}"
    if settings.preset == "smoke":
        first = next(iter(cells))
        return {first: {"config": asdict(cells[first]), **run(cells[first])}}
    if not settings.grid:
        return plotting.load_record(name)
    record = plotting.load_record(name, settings.folder)
    made: dict[str, dict] = {}
    for title, config in cells.items():
        wanted = plotting.rounded(asdict(config))
        if title in record and record[title]["config"] == wanted:
            made[title] = record[title]
            continue
        say(f"cell: {title}")
        made[title] = {"config": wanted, **run(config)}
        plotting.save_trials(name, record | made, settings.folder)
    plotting.save_trials(name, made, settings.folder)
    return plotting.load_record(name, settings.folder)


def _one_of_each_kind(trials: Mapping[str, tuple]) -> dict[str, tuple]:
    """The last trial of each set of options."""
    kinds = {}
    for title, (_, options) in trials.items():
        kinds[str(_names(options, title))] = title
    return {title: trials[title] for title in kinds.values()}


def judge_accuracy(
    settings: Settings, tokenizer: Tokenizer, policy: GPT, reference: GPT
) -> dict:
    """The sampled accuracy alone, of 4 answers to each validation problem."""
    problems = load_problems("validation", settings.pick(4, 500, 500))
    draw = settings.generator("validation")
    sampled = sample_answers(policy, tokenizer, problems, 4, generator=draw)
    return {"accuracy": as_list(bootstrap(sampled.correct.mean(1)))}


def judge_whole(
    settings: Settings, tokenizer: Tokenizer, policy: GPT, reference: GPT
) -> dict:
    """All of a trial's numbers, on validation problems."""
    problems = load_problems("validation", settings.pick(4, 500, 500))
    draw = settings.generator("validation")
    sampled = sample_answers(policy, tokenizer, problems, 4, generator=draw)
    greedy = sample_answers(policy, tokenizer, problems, 1, greedy=True)
    nats = distance(tokenizer, policy, reference, problems, draw)
    asked = []
    for problem in problems:
        asked += [problem] * 4
    texts = np.where(sampled.truncated, "", np.array(sampled.texts, dtype=object))
    return {
        "accuracy": as_list(bootstrap(sampled.correct.mean(1))),
        "greedy": as_list(bootstrap(greedy.correct[:, 0])),
        "kl": as_list(nats),
        "length": float(sampled.lengths.mean()),
        "pass_at_4": float(pass_at_k(sampled.correct, 4).mean()),
        "styles": style_shares(asked, texts.flatten().tolist()),
    }


def _names(options: Mapping[str, Any], title: str) -> dict[str, str]:
    """Functions by name (one without a name by its trial's), all else as it prints."""
    names = {}
    for key, option in options.items():
        name = getattr(option, "__name__", repr(option))
        names[key] = title if "<" in name else name
    return names


def _trial_key(entry: Mapping[str, Any]) -> str:
    """What sets a trial apart; micro-batches bound memory and change rounding only."""
    config = dict(entry["config"])
    config.pop("micro_batch", None)
    what = [plotting.rounded(config), entry["options"]]
    return json.dumps(what, sort_keys=True)


def choose(trials: Mapping[str, Mapping]) -> str:
    """The trial whose settings a headline run takes: one rule for every method.

    Of the trials that belong to the tuning, the highest sampled accuracy wins. A trial
    is tied with it where the 95 % interval of their difference holds 0 (taken as of
    independent samples, which is wider than it need be): of those tied, the fewest
    optimiser steps win, then the smallest learning rate (of TRPO, which has none, the
    smallest bound), for a run of full length is four times as long as a trial; then
    again the highest accuracy.

    Raises: ValueError where no trial belongs to the tuning.
    """
    rivals = {name: trial for name, trial in trials.items() if trial.get("tuning")}
    if not rivals:
        raise ValueError("trials: none of them belongs to the tuning")
    best = max(rivals.values(), key=lambda trial: trial["accuracy"][0])["accuracy"]
    tied = []
    for name, trial in rivals.items():
        value, low, high = trial["accuracy"]
        reach = math.hypot(high - low, best[2] - best[1]) / 2
        if best[0] - value <= reach:
            config = trial["config"]
            size = config["lr"] if "lr" in config else config["delta"]  # of a step
            tied.append((trial["steps"], size, -value, name))
    return min(tied)[-1]


def print_trials(trials: Mapping[str, dict]) -> None:
    """One line a trial: accuracy with its interval over 500 validation problems."""
    head = f"{'sampled':>22}{'greedy':>8}{'KL':>7}{'tokens':>8}{'pass@4':>8}"
    print(f"\n{'on validation':<38}{head}")
    for name, trial in trials.items():
        accuracy = str(as_estimate(trial["accuracy"]))
        print(
            f"{name:<38}{accuracy:>22}{trial['greedy'][0]:>8.3f}{trial['kl'][0]:>7.2f}"
            f"{trial['length']:>8.1f}{trial['pass_at_4']:>8.3f}"
        )


def base_on_validation() -> float | None:
    """The base's sampled accuracy on the problems that trials are judged by.

    Lesson 10 measured it; None before its record is made.
    """
    runs = plotting.load_record("10_rejection_sampling")
    arms = runs.get("0", {}).get("arms", {})
    return arms["the base"][0] if "the base" in arms else None


def compare_trials(trials: Mapping[str, dict], one: str, two: str, what: str) -> None:
    """Two trials side by side, and whether their 95 % intervals part them."""
    if one not in trials or two not in trials:
        return
    first = as_estimate(trials[one]["accuracy"])
    second = as_estimate(trials[two]["accuracy"])
    if first.low > second.high:
        found = "above"
    elif first.high < second.low:
        found = "below"
    else:
        found = "not told apart from"
    print(
        f"- {what}:\n  {one}, {first.value:.3f}, is {found} {two}, {second.value:.3f}."
    )
