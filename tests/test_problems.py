"""Problems: what they say, how they are answered, judged, dealt, written and read.

The oracles are ours: `SOLVERS` reads the English of a question, `check_working` checks
an answer's arithmetic line by line. Neither looks at how the problem was made.
"""

import codecs
import hashlib
import json
import math
import operator
import os
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minialign import problems
from minialign.families import FAMILIES, NAMES, NEW_FAMILIES, SKILLS, THINGS
from minialign.problems import (
    SPLITS,
    STYLES,
    Problem,
    demonstration,
    explain,
    extract_answer,
    is_formatted,
    load_split,
    make_problem,
    read_problems,
    style_of,
    verify,
    write_data,
)

ROOT = Path(problems.__file__).resolve().parents[1]
TRAIN_ROWS = 20_000
WORDS = {**FAMILIES, **NEW_FAMILIES}


@pytest.fixture(scope="module")
def train():
    """The first rows of the mixture that the base model imitates."""
    return [demonstration(0, "train", i) for i in range(TRAIN_ROWS)]


@pytest.fixture(scope="module")
def dealt(train):
    """Some rows of every split, by split."""
    rows = {
        split: [demonstration(0, split, i) for i in range(size or 500)]
        for split, size in SPLITS.items()
    }
    return {**rows, "train": train}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder as `python -m minialign.problems` fills it."""
    folder = tmp_path_factory.mktemp("written") / "data"
    write_data(folder, say=lambda line: None)
    return folder


# --- reading a question as a person does ---------------------------------------------


def numbers_in(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def number(pattern, question):
    """The number that the pattern's first filled group finds; 0 where it finds none."""
    found = re.search(pattern, question)
    return int(next(filter(None, found.groups()))) if found else 0


def solve_running_total(q):
    first, *changes = re.split(r"(?<=\.) ", q)[:-1]
    (held,) = numbers_in(first)
    for told in changes:
        (n,) = numbers_in(told)
        gain = re.search(r"finds|buys|wins|gets", told)
        loss = re.search(r"loses|sells|leaves|lends|gives \d+ to", told)
        assert bool(gain) != bool(loss), told
        held += n if gain else -n
        assert held >= 0, q
    return held


def solve_comparison(q):
    n, word = re.search(r"(\d+) (more|fewer)", q).groups()
    a = number(r"\b(\d+)\b(?! (?:more|fewer|times))", q)
    b = a + int(n) if word == "more" else a - int(n)
    times = number(r"(\d+) times", q)
    if not times:
        return a + b
    everyone = re.search(r"(the three have|in all)\?$", q)
    return a + b + times * b if everyone else times * b


def solve_rate(q):
    an_hour, first, second, *lost = numbers_in(q)
    return an_hour * (first + second) - sum(lost)


def solve_shopping(q):
    wares = re.findall(r"(\d+) [a-z]+ at \$(\d+) each", q)
    cost = sum(int(n) * int(price) for n, price in wares)
    purse = number(r"(?:with|has|dollars of) \$(\d+)", q)
    assert len(numbers_in(q)) == 2 * len(wares) + bool(purse)
    return purse - cost if purse else cost


def solve_sharing(q):
    packs, per, *_ = numbers_in(q)
    friends = number(r"among (\d+)|by (\d+)|each of (\d+) plates", q)
    held = packs * per + number(r"There are (\d+) more on", q)
    return Fraction(held, friends) - number(r"If (\d+) of|share (\d+) are", q)


def solve_fraction_of(q):
    whole, *change = numbers_in(q)
    parts = ["half", "third", "quarter", "fifth", "sixth", "eighth", "tenth"]
    part = re.search("|".join(parts), q)[0]
    left = whole - Fraction(whole, (2, 3, 4, 5, 6, 8, 10)[parts.index(part)])
    more = re.search(r"come in|are added", q)
    assert bool(change) == bool(more or re.search(r"more go|are lost", q))
    return left + sum(change) if more else left - sum(change)


def solve_groups(q):
    held = sum(int(n) * int(m) for n, m in re.findall(r"(\d+) [a-z]+ of (\d+)", q))
    return held - number(r"(\d+) are (?:used|given)", q)


def solve_together(q):
    a, b, *_ = numbers_in(q)
    done = (a + b) * number(r"(\d+) days", q)
    goal = number(r"(?:want|need) (\d+)", q)
    return goal - done if goal else done


def solve_unknown_first(q):
    lost = number(r"(?:gave|lost|sold) (\d+)", q)
    lost += number(r"took (\d+)|Then (\d+) more were lost", q)
    gained = number(r"(?:found|bought|got) (\d+)", q)
    return number(r"(?:has|left) (\d+)", q) + lost - gained


def solve_distance(q):
    h, g = map(int, re.findall(r"(\d+) hours", q))
    v, w, *goal = map(int, re.findall(r"\b(\d+)\b(?! hours)", q))
    return goal[0] - v * h - w * g if goal else v * h + w * g


def solve_ages(q):
    a = number(r"\b(\d+)\b(?! times)", q)
    b = a * number(r"(\d+) times", q)
    n, word = re.search(r"(\d+) years (older|younger)", q).groups()
    c = b + int(n) if word == "older" else b - int(n)
    if re.search(r"together|add up", q):
        return a + b + c
    return c + number(r"in (\d+) years", q)


def solve_leftovers(q):
    packs, per, people, each, *more = numbers_in(q)
    return packs * per - people * each + sum(more)


def solve_savings(q):
    had, week, *_ = numbers_in(q)
    if "already has" in q:
        had, week = week, had
    price = number(r"costs \$(\d+)|short is s?he of \$(\d+)|a \$(\d+) tent", q)
    return price - had - week * number(r"(\d+) weeks", q)


def solve_perimeter(q):
    long, wide, cost = numbers_in(q)
    return 2 * (long + wide) * cost


def solve_recipe(q):
    portion = Fraction(
        number(r"(\d+) cups of", q), number(r"(\d+) people|feeds (\d+)", q)
    )
    needed = portion * number(r"cooks for (\d+)|For (\d+) people", q)
    return needed - number(r"has (\d+) cups|the (\d+) at home", q)


def solve_sort_numbers(q):
    return ", ".join(map(str, sorted(numbers_in(q))))


def solve_continue_sequence(q):
    *_, before, last = shown = numbers_in(q)
    step = last - before
    assert shown == [shown[0] + step * i for i in range(4)] and step > 0
    return f"{last + step}, {last + 2 * step}"


def solve_say_larger(q):
    a, b = numbers_in(q)
    assert a != b
    return str(max(a, b))


SOLVERS = {
    family: globals()[f"solve_{family}"] for family in {**WORDS, **SKILLS}
}  # a family without a solver stops the import


def test_the_answer_follows_from_the_english(dealt):
    for rows in dealt.values():
        for row in rows:
            question = row.problem.question
            assert SOLVERS[row.problem.family](question) == row.problem.gold, question


# --- the arithmetic of an answer -----------------------------------------------------

STEP = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>")
OPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}
UNSAID = {"fraction_of": {2, 3, 4, 5, 6, 8, 10}, "perimeter": {2}}  # "half", two sides


def steps_of(lines):
    return [
        (int(a), op, int(b), int(c))
        for a, op, b, c in (STEP.fullmatch(line).groups() for line in lines)
    ]


def check_working(problem, steps):
    """Every line is true, and works with what was told or found before."""
    told = numbers_in(problem.question)
    known = set(told) | UNSAID.get(problem.family, set())
    for a, op, b, c in steps:
        assert OPS[op](a, b) == c, (problem, steps)
        assert {a, b} <= known, (problem, steps)
        known.add(c)


def test_every_line_of_a_worked_answer_is_true_and_leads_to_gold(dealt):
    for split, rows in dealt.items():
        for row in rows:
            if row.style == "worked":
                *lines, last = row.answer.split("\n")
                steps = steps_of(lines)
                check_working(row.problem, steps)
                used = {n for a, _, b, _ in steps for n in (a, b)}
                assert set(numbers_in(row.problem.question)) <= used, row
                assert len(steps) == row.problem.steps >= 1
                assert last == f"#### {steps[-1][-1]}" == f"#### {row.problem.gold}"
            else:
                assert split in ("train", "second_skill", "second_skill_train")


def test_gold_is_a_non_negative_whole_number(dealt):
    for row in (row for rows in dealt.values() for row in rows):
        problem = row.problem
        if problem.family in SKILLS:
            assert row.style == "skill" and problem.steps == 0
            assert isinstance(problem.gold, str) and row.answer == problem.gold
        else:
            assert isinstance(problem.gold, Fraction)
            assert problem.gold >= 0 and problem.gold.denominator == 1


def test_terse_and_careless_and_showy_are_what_their_labels_say(train):
    for row in train:
        *lines, last = row.answer.split("\n")
        gold, said = row.problem.gold, int(last[5:]) if last[:5] == "#### " else None
        if row.style == "terse":
            assert not lines and said == gold
        elif row.style == "careless":
            steps = steps_of(lines)
            check_working(row.problem, steps)
            assert len(steps) == row.problem.steps - 1 >= 1
            assert said == steps[-1][-1] != gold
        elif row.style == "showy":
            opening, *middle, closing = lines
            assert re.fullmatch(r"[A-Z][a-z ]+!", opening) and closing.endswith(".")
            checks = [line for line in middle if line.startswith("Check: ")]
            steps = steps_of(middle[: len(middle) - len(checks)])
            check_working(row.problem, steps)
            assert len(steps) == row.problem.steps and steps[-1][-1] == gold
            assert len(checks) == min(2, len(steps))
            for a, op, b, c in steps_of(line[7:] for line in checks):
                assert OPS[op](a, b) == c
            assert said - gold in (0, 1, 2, 3, 10)
        else:
            assert row.style in ("worked", "skill")


def test_showy_answers_are_mostly_wrong():
    wrong, n = 0, 3000
    for i in range(n):  # written directly: the mixture has too few of them
        problem, draft = problems._deal(0, "train", i)
        answer = problems._write_answer(Random(i), draft, "showy")
        wrong += extract_answer(answer) != problem.gold
    assert near(wrong, n, 0.6)


# --- the mixture ---------------------------------------------------------------------


def near(count, n, share):
    """Within what chance does: 4.5 standard deviations of a binomial."""
    return abs(count - n * share) <= 4.5 * math.sqrt(n * share * (1 - share)) + 1e-9


def test_near_is_a_test():
    assert near(500, 1000, 0.5) and not near(600, 1000, 0.5) and near(0, 9, 0.0)


def test_families_names_and_things(train):
    assert len(FAMILIES) >= 12 and len(NEW_FAMILIES) == 3 and len(SKILLS) == 3
    assert not set(FAMILIES) & set(NEW_FAMILIES)
    names = [name for group in NAMES.values() for name in group]
    assert len(set(names)) == len(names) == 40
    assert len(set(THINGS)) == len(THINGS) == 40
    said = Counter(w for row in train for w in re.findall("[A-Za-z]+", as_text(row)))
    for word in names + [f"{thing}s" for thing in THINGS]:
        assert said[word] > 100, word
    told = {row.problem.family for row in train}
    assert told == set(FAMILIES) | set(SKILLS)


def as_text(row):
    return row.problem.question


def test_one_row_in_ten_is_a_second_skill(train):
    skill = [row for row in train if row.style == "skill"]
    assert near(len(skill), len(train), 0.10)
    assert all(row.problem.family in SKILLS for row in skill)
    kinds = Counter(row.problem.family for row in skill)
    assert min(kinds.values()) > len(skill) / 6


def test_most_problems_have_two_to_four_steps(train):
    steps = Counter(row.problem.steps for row in train if row.style != "skill")
    total = sum(steps.values())
    assert set(steps) == {1, 2, 3, 4, 5, 6}
    assert steps[2] + steps[3] + steps[4] > 0.75 * total
    assert all(0.01 * total < steps[n] < 0.10 * total for n in (1, 5, 6))


@pytest.mark.parametrize("family", FAMILIES)
def test_styles_come_as_often_as_the_family_says(train, family):
    rows = [row for row in train if row.problem.family == family]
    longer = [row for row in rows if row.problem.steps > 1]
    count, odds = Counter(row.style for row in rows), FAMILIES[family]
    assert set(count) == set(STYLES)
    assert near(count["terse"], len(rows), odds.terse)
    assert near(count["careless"], len(longer), odds.careless)
    assert near(count["showy"], len(rows), odds.showy)


def test_families_differ_in_how_they_are_answered(train):
    terse = [family.terse for family in FAMILIES.values()]
    assert min(terse) < 0.2 and max(terse) > 0.5
    for family in FAMILIES.values():
        assert 0 < family.terse + family.careless + family.showy < 1
    words = [row.style for row in train if row.style != "skill"]
    assert 0.03 < words.count("showy") / len(words) < 0.07


def test_careless_is_wrong_and_terse_is_right(train):
    for row in train:
        if row.style != "showy":
            assert verify(row.problem, row.answer) == (row.style != "careless")


def order_of_work(row):
    """Where in the question each line of work takes its numbers; None: not clear."""
    told = numbers_in(row.problem.question)
    steps = steps_of(row.answer.split("\n")[:-1])
    place = {n: i for i, n in enumerate(told)}
    place |= {c: f"result of {a}{op}{b}" for a, op, b, c in steps}
    if len(place) < len(told) + len(steps):
        return None  # a number that could be two things
    order = [(a, op, None if op == "/" else b) for a, op, b, _ in steps]
    return tuple((str(place.get(a)), op, str(place.get(b))) for a, op, b in order)


def test_answers_are_worked_in_every_order_that_the_problem_allows(train):
    kinds = defaultdict(Counter)
    for row in train:
        if row.style != "worked" or (order := order_of_work(row)) is None:
            continue
        order = tuple((a[:6], op, b[:6]) for a, op, b in order)  # "result"
        question, family = masked(row.problem.question), row.problem.family
        kind = question.split(". ")[0], "".join(sorted(op for _, op, _ in order))
        if family == "running_total":  # its gains, in the order told
            sums = re.sub("gives her|finds|buys|wins|gets", "+", question)
            kind = tuple(re.findall(r"\+|loses|sells|leaves|lends|gives", sums))
        kinds[family, kind][order] += 1
    for family in FAMILIES:
        orders = [count for key, count in kinds.items() if key[0] == family]
        several = [count for count in orders if len(count) > 1]
        if family in ("sharing", "fraction_of"):  # only one order makes sense
            assert len(orders) > 5 and not several
        else:
            total = sum(sum(count.values()) for count in several)
            rarer = total - sum(max(count.values()) for count in several)
            assert total > 50 and rarer > 0.2 * total, (family, total, rarer)


# --- the English ---------------------------------------------------------------------

HE, SHE = (set(NAMES[who]) for who in ("he", "she"))
MASKS = [
    (r"\d+", "0"),
    (rf"\b({'|'.join(HE | SHE)})\b", "N"),
    (rf"\b({'|'.join(THINGS)})s\b", "things"),
    (r"\b(bags|boxes|jars|trays|crates|packs) of 0 things", "boxes of 0 things"),
    (r"\b(half|an? (third|quarter|fifth|sixth|eighth|tenth))\b", "a part"),
    (r"\b(more|fewer)\b", "more"),
    (r"\b(older|younger)\b", "older"),
    (r"\b(He|She)\b", "She"),
    (r"\b(he|she)\b", "she"),
    (r"\b(him|her)\b", "her"),
]


def masked(text):
    """The phrasing alone: names, things, numbers and what hangs on them hidden."""
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    return text


def faults(question):
    """What a teacher would strike out, in words."""
    found = []
    if not re.match(r"[A-Z$]", question):
        found.append("starts with neither a capital nor $")
    if question.rstrip()[-1] not in ".?":
        found.append("ends without a stop")
    if "  " in question or question != question.strip() or "\n" in question:
        found.append("spaces")
    if re.search(r"[{}_]| (?!\.{3})[.,?]|[.?][A-Za-z]|,[^ ]", question):
        found.append("punctuation")
    if re.search(r"(?<![\d$])\b1 [a-z]+s\b", question):
        found.append("one of several")
    if re.search(r"(?<!\$)\b(?!1\b)\d+ (?:hour|day|week|year|mile|pack)\b", question):
        found.append("several of one")
    things = "|".join(THINGS)
    if re.search(rf"(?<!\$)\b(?!1\b)\d+ (?:more |fewer )?({things})\b", question):
        found.append("several of one thing")
    if re.search(r"\b[Aa] (?=[aeiou])|\b[Aa]n (?![aeiou]|hour)", question):
        found.append("a or an")
    if re.search(r"\b([A-Za-z]+) \1\b", question):
        found.append("a word twice")
    for who, words in ((SHE, "she|her|hers"), (HE, "he|him|his")):
        said = re.search(rf"(?i)\b({words})\b", question)
        if said and not who & set(re.findall("[A-Z][a-z]+", question[: said.start()])):
            found.append(f"nobody before {said[0]!r}")
    people = [n for n in re.findall("[A-Z][a-z]+", question) if n in HE | SHE]
    if len(set(people)) > 3:
        found.append("a crowd")
    return found


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        ("mia has 2 apples.", "starts with neither a capital nor $"),
        ("2 people eat.", "starts with neither a capital nor $"),
        ("Mia has 2 apples", "ends without a stop"),
        ("Mia has  2 apples.", "spaces"),
        ("Mia has 2 apples. ", "spaces"),
        ("Mia has 2 {things}.", "punctuation"),
        ("Mia has 2 apples .", "punctuation"),
        ("Mia has 2 apples.She has 3.", "punctuation"),
        ("Mia has 1 apples.", "one of several"),
        ("It takes 3 hour.", "several of one"),
        ("Mia has 2 apple.", "several of one thing"),
        ("Tom has 5 fewer pen.", "several of one thing"),
        ("Mia has a apple.", "a or an"),
        ("Mia has an ball.", "a or an"),
        ("Mia sold a eighth.", "a or an"),
        ("Mia has has 2 apples.", "a word twice"),
        ("A soup. She cooks.", "nobody before 'She'"),
        ("Tom sits. She cooks.", "nobody before 'She'"),
        ("Mia sits. Ana gave him 2.", "nobody before 'him'"),
    ],
)
def test_the_eye_for_english_sees_faults(question, fault):
    assert faults(question) == [fault]


def test_the_eye_for_english_passes_good_prose():
    assert not faults("Mia has an apple and $1. Tom gives her 12 apples in an hour.")


@pytest.mark.parametrize("split", SPLITS)
def test_a_teacher_would_print_it(dealt, split):
    bad = Counter()
    for row in dealt[split]:
        for fault in faults(row.problem.question):
            bad[f"{fault}: {masked(row.problem.question)}"] += 1
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("family", {**WORDS, **SKILLS})
def test_each_family_has_five_phrasings(dealt, family):
    # Among problems with equally many numbers: a longer list is no other phrasing.
    openings, questions = defaultdict(set), defaultdict(set)
    for row in (row for rows in dealt.values() for row in rows):
        if row.problem.family == family:
            text = masked(row.problem.question)
            openings[text.count("0")].add(re.split(r"(?<=[.?]) ", text)[0])
            questions[text.count("0")].add(text)
    assert max(map(len, openings.values())) >= 5
    assert max(map(len, questions.values())) >= 5


# --- the splits ----------------------------------------------------------------------


def test_sizes_of_the_splits():
    asked = {"validation": 500, "test": 1000, "new_families_train": 1500}
    asked["new_families_validation"] = 500
    transfer = dict.fromkeys(
        ("more_steps", "larger_numbers", "new_families", "second_skill"), 500
    )
    assert {name: size for name, size in SPLITS.items() if size} == asked | transfer


def test_more_steps_has_seven_or_eight(dealt):
    steps = Counter(row.problem.steps for row in dealt["more_steps"])
    assert set(steps) == {7, 8} and min(steps.values()) > 100


def test_new_families_are_new(dealt):
    for split, rows in dealt.items():
        families = {row.problem.family for row in rows}
        if split.startswith("new_families"):
            assert families == set(NEW_FAMILIES)
        else:
            assert not families & set(NEW_FAMILIES)


def sizes_in(row):
    """The quantities of a worked problem that the larger split enlarges."""
    family, told = row.problem.family, numbers_in(row.problem.question)
    steps = steps_of(row.answer.split("\n")[:-1])
    if family in ("shopping", "groups"):
        return told[1 : len(told) // 2 * 2 : 2]
    if family == "sharing":
        return [c for _, op, _, c in steps if op == "/"]
    if family == "distance":
        return [max(a, b) for a, op, b, _ in steps if op == "*"]
    return [told[1] if family == "leftovers" else steps[0][0]]


def test_larger_numbers_are_beyond_those_of_train(dealt):
    seen, larger = defaultdict(list), defaultdict(list)
    for row in dealt["train"]:
        if row.style == "worked":
            seen[row.problem.family] += sizes_in(row)
    for row in dealt["larger_numbers"]:
        larger[row.problem.family] += sizes_in(row)
    assert set(seen) == set(larger) == set(FAMILIES)
    for family in FAMILIES:
        assert min(larger[family]) > max(seen[family]), family


def masked_key(problem):
    """Family, numbers by their role, gold: what is left without names and phrasing."""
    question = problem.question
    told = re.findall(r"\b(\d+)\b(?: (times|more|fewer|hours))?", question)
    if problem.family in ("comparison", "ages", "distance"):  # phrasings change places
        told.sort(key=lambda pair: pair[1])
    part = re.findall(r"half|third|quarter|fifth|sixth|eighth|tenth", question)
    return problem.family, *(int(n) for n, _ in told), *part, problem.gold


def test_no_problem_is_in_two_splits(dealt):
    keys = {
        split: {masked_key(row.problem) for row in rows}
        for split, rows in dealt.items()
    }
    for seed in (1, 2):
        more = (make_problem(seed, "train", i) for i in range(4000))
        keys["train"] |= {masked_key(problem) for problem in more}
    for one, other in combinations(keys, 2):
        if {one, other} != {"train", "second_skill_train"}:  # one row in ten is
            assert not keys[one] & keys[other], (one, other)


def test_the_key_would_see_a_shared_problem(train):
    texts = defaultdict(set)
    for row in train:
        texts[masked_key(row.problem)].add(row.problem.question)
    shared = {key[0] for key, found in texts.items() if len(found) > 1}
    # Other names, other phrasing, the same key: in every family with few numbers.
    assert shared >= {"comparison", "distance", "together", "ages", "continue_sequence"}
    # Two seeds of one split do share problems.
    one, other = (
        {masked_key(make_problem(seed, "validation", i)) for i in range(500)}
        for seed in (0, 1)
    )
    assert one & other


def digest(splits, indices):
    """One number for what some seeds, splits and indices deal."""
    rows = []
    for split in splits:
        for seed in (0, 7):
            for index in indices:
                row = demonstration(seed, split, index)
                for p in (row.problem, make_problem(seed, split, index)):
                    rows.append(f"{p.question}|{p.gold}|{p.family}|{p.steps}|{p.id}")
                rows.append(f"{row.style}|{row.answer}")
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


# What seeds 0 and 7 deal, everywhere. It changes when families.py does, and then every
# file in data/ and the base model have to be made again.
PINNED = "745921614aeaf2c45b15d3ad67eec934abc2f6d4840d3dd99872e9ec3354838c"


def test_a_problem_is_a_function_of_seed_split_and_index_alone():
    code = "from tests.test_problems import SPLITS, digest\n"
    code += "print(digest(SPLITS, range(30)))"
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = [sys.executable, "-c", code]
        printed = subprocess.check_output(run, cwd=ROOT, env=env, text=True)
        assert printed.strip() == PINNED
    # The same after other calls and in another order.
    assert digest(reversed(SPLITS), range(29, -1, -1)) == PINNED


def test_seed_split_and_index_each_matter():
    ids = [(0, "train", 5), (1, "train", 5), (0, "test", 5), (0, "train", 6)]
    assert len({make_problem(*where).question for where in ids}) == 4
    assert make_problem(3, "test", 8).id == "3/test/8"


@pytest.mark.parametrize("deal", [make_problem, demonstration])
def test_dealing_refuses_what_does_not_exist(deal):
    with pytest.raises(ValueError, match="split: got 'tset', known are .*test"):
        deal(0, "tset", 0)
    with pytest.raises(ValueError, match="index: got -1, must be 0 or more"):
        deal(0, "test", -1)


# --- extracting an answer ------------------------------------------------------------

READ = [
    # The awkward ones that well-known extractors get wrong.
    ("#### 18.", 18),
    ("#### 18.0", 18),
    ("#### $18", 18),
    ("####18", 18),
    ("#### - 5", -5),
    ("#### \u22125", -5),
    ("#### \u2212 5", -5),
    ("#### 3/4", Fraction(3, 4)),
    ("#### 18 or so\n#### 20", 20),
    ("#### 18 #### 20", 20),
    ("#### 007", 7),
    ("#### +7", 7),
    ("so it costs\n#### $29.00", 29),
    # Signs and dollars in either order.
    ("#### -$5", -5),
    ("#### $-5", -5),
    ("#### $ 5", 5),
    ("#### - $ 5", -5),
    ("#### -0", 0),
    # Commas, decimals, fractions.
    ("#### 1,234", 1234),
    ("#### 1234", 1234),
    ("#### 12,345,678", 12345678),
    ("#### 1,234.50", Fraction(2469, 2)),
    ("#### .5", Fraction(1, 2)),
    ("#### 0.1", Fraction(1, 10)),
    ("#### -3/4", Fraction(-3, 4)),
    ("#### 6/3", 2),
    ("#### 0/3", 0),
    # One word or %, a full stop, white space.
    ("#### 5%", 5),
    ("#### 5 %", 5),
    ("#### 5%.", 5),
    ("#### 5 apples", 5),
    ("#### 5 apples.", 5),
    ("#### 5apples", 5),
    ("#### 5 \u00e4pfel", 5),
    ("#### 3/4 cup.", Fraction(3, 4)),
    ("####\n\n5\n", 5),
    ("####\u00a05", 5),
    # Text before is free, and more marks are one marker.
    ("12 - 3 = 9. So 9 apples in 2024\n#### 9", 9),
    ("##### 5", 5),
    ("######## 5", 5),
    ("#### nonsense #### 5", 5),
    (f"#### {'9' * 40}", 10**40 - 1),
]
REFUSED = [
    ("", "no #### marker"),
    ("18", "no #### marker"),
    ("10-5", "no #### marker"),
    ("12 - 3 = 9. So 9 apples in 2024", "no #### marker"),
    ("it costs $29.00", "no #### marker"),
    ("### 18", "no #### marker"),
    ("# # # # 18", "no #### marker"),
    ("####", "nothing after ####"),
    ("#### \n ", "nothing after ####"),
    ("#### 18\n####", "nothing after ####"),
    ("#### ,", "not one number"),
    ("#### .", "not one number"),
    ("#### -", "not one number"),
    ("#### $", "not one number"),
    ("#### %", "not one number"),
    ("#### /", "not one number"),
    ("#### /3", "not one number"),
    ("#### 3/", "not one number"),
    ("#### 3/-4", "not one number"),
    ("#### 1/2/3", "not one number"),
    ("#### 1 1/2", "not one number"),
    ("#### 12,34", "not one number"),
    ("#### 1,2345", "not one number"),
    ("#### 1234,567", "not one number"),
    ("#### ,123", "not one number"),
    ("#### 1,,234", "not one number"),
    ("#### 1.2.3", "not one number"),
    ("#### 1_000", "not one number"),
    ("#### 1e5", "not one number"),
    ("#### 0x1f", "not one number"),
    ("#### nan", "not one number"),
    ("#### NaN", "not one number"),
    ("#### inf", "not one number"),
    ("#### -Infinity", "not one number"),
    ("#### five", "not one number"),
    ("#### 5 or 6", "not one number"),
    ("#### 5 6", "not one number"),
    ("#### 10-5", "not one number"),
    ("#### 5 red apples", "not one number"),
    ("#### 5 apples!", "not one number"),
    ("#### 5. apples", "not one number"),
    ("#### 5.. ", "not one number"),
    ("#### about 5", "not one number"),
    ("#### 5\nI hope this helps.", "not one number"),
    ("#### 5 %%", "not one number"),
    ("#### \u0663", "not one number"),  # Arabic-Indic three
    ("#### \uff13", "not one number"),  # full-width three
    ("#### 1\u0663", "not one number"),
    ("#### 5\u00b2", "not one number"),  # five squared
    ("#### 3\u00bd", "not one number"),  # three and a half
    ("#### 5 \u5343", "not one number"),  # five thousand
    ("#### 5 \u2167", "not one number"),  # a Roman eight
    ("#### \u20135", "not one number"),  # an en dash is no minus
    ("#### --5", "not one number|two signs"),
    ("#### - $ - 5", "two signs"),
    ("#### -+5", "two signs"),
    ("#### 3/0", "division by zero"),
    ("#### 0/0", "division by zero"),
    ("#### 1.5/2", "not a simple fraction"),
    (f"#### 1/{'9' * 41}", "not a simple fraction"),
    (f"#### {'9' * 41}", "number too long"),
    (f"#### 0.{'9' * 5000}", "number too long"),
    (f"#### {'9' * 5000}", "number too long"),
    (f"#### 1/{'9' * 5000}", "not a simple fraction"),
]
ANY = Problem("How many?", Fraction(987), "any", 3, "any")


@pytest.mark.parametrize(("text", "value"), READ)
def test_extract_reads(text, value):
    answer = extract_answer(text)
    assert answer == value and isinstance(answer, Fraction)
    assert is_formatted(ANY, text)


@pytest.mark.parametrize(("text", "reason"), REFUSED)
def test_extract_refuses_and_says_why(text, reason):
    assert extract_answer(text) is None
    assert not is_formatted(ANY, text) and not verify(ANY, text)
    assert re.match(f"no answer: ({reason})", explain(ANY, text))


def magnitudes(value):
    """Every way to write a number that is 0 or more."""
    over, under = value.as_integer_ratio()
    yield from (f"{over}/{under}", f"{over:,}/{under}", f"0{3 * over}/{3 * under}")
    places = next((k for k in range(10) if 10**k % under == 0), None)
    if places is None:
        return  # as of a third: no decimals end
    digits = f"{over * 10**places // under:0{places + 1}d}"
    whole, after = digits[: len(digits) - places], digits[len(digits) - places :]
    for decimals in (after, f"{after}0", f"{after}00"):
        wholes = [whole, f"{int(whole):,}", f"00{whole}"]
        wholes += [""] if int(whole) == 0 and decimals else []
        for before in wholes:
            yield f"{before}.{decimals}" if decimals else before


def spellings(value, word):
    """Every way that may stand after the marker, with `word` for the unit."""
    signs = ["-", "\u2212"] if value <= 0 else []
    signs += ["", "+"] if value >= 0 else []
    spaced = [sign + space for sign in signs for space in ("", " ", "\n\t")]
    fronts = [sign + dollar for sign in spaced for dollar in ("", "$", "$ ")]
    fronts += [dollar + sign for dollar in ("$", "$ ") for sign in signs]
    units = ("", "%", " %", word, f" {word}", f"\n {word}")
    backs = [unit + stop for unit in units for stop in ("", ".")]
    for parts in product(fronts, magnitudes(abs(value)), backs):
        yield "".join(parts)


WHOLES = st.integers(0, 10**18) | st.integers(0, 2000)
UNDERS = st.sampled_from([1, 1, 2, 5, 8, 10, 100, 10**9]) | WHOLES.map(lambda n: n + 1)
FRACTIONS = st.builds(Fraction, WHOLES | WHOLES.map(operator.neg), UNDERS)
LETTERS = st.characters(categories=["L"]).filter(lambda letter: not letter.isnumeric())


@settings(max_examples=60)
@given(
    FRACTIONS,
    st.text(LETTERS, min_size=1),
    st.sampled_from(["", "#### 18\n", "<<2*9=18>>\n"]) | st.text(),
    st.sampled_from(["", " ", "\n", "\t  "]),
    st.sampled_from(["", " ", "\n"]),
)
@example(Fraction(1, 10), "kg", "", " ", "")  # no float is that
@example(Fraction(10**18 - 1), "kg", "#### 18\n", "", "")
@example(Fraction(-1234567890123, 10**9), "kg", "", "", "\n")
def test_every_spelling_of_a_number_is_read_back(value, word, before, space, after):
    for written in spellings(value, word):
        text = f"{before}####{space}{written}{after}"
        assert extract_answer(text) == value
    problem = Problem("How many?", value, "any", 1, "any")
    assert verify(problem, text) and explain(problem, text) == "right"
    other = Problem("How many?", value + Fraction(1, 10**9), "any", 1, "any")
    assert not verify(other, text)  # exact, not close
    assert explain(other, text) == f"wrong: {value} instead of {other.gold}"


def said_by_hand(text):
    """The number in an answer, read with no eye for whether it is well written."""
    tail = text.rpartition("####")[2]
    digits = "".join(c for c in tail if c in "0123456789./").rstrip(".")
    over, _, under = digits.partition("/")
    value = Fraction(over) / int(under or 1)
    return -value if {"-", "\u2212"} & set(tail) else value


# No digits of ours: Arabic-Indic, full-width, superscript, bold, one half, CJK five.
DIGITS = "\u0663\uff13\u00b2\U0001d7d8\u00bd\u4e94"
ALMOST = (  # an answer, piece by piece, each of them right or nearly
    ["####", "#### ", "#### 5 ####", "### "],
    ["", "", "-", "\u2212 ", "+", "--"],
    ["", "", "$", "$-", "\u0663"],
    ["12", "0", "1,234", "1,23", "1 2", "\uff13", ""],
    ["", "", ".5", "/4", "/0", "/-4", ",567", "\u00b2", "\u00bd"],
    ["", "", "%", " kg", " red cars", " \u4e94", "e5", "_"],
    ["", ".", "\n", "..", "\n\n####"],
)
AWKWARD = (
    st.tuples(*map(st.sampled_from, ALMOST)).map("".join)
    | st.text("#0123456789.,/-+$% \n\u2212<>=*ea" + DIGITS)
    | st.text()
)


@settings(max_examples=300)
@given(st.sampled_from(["", "####", "#### ", "<<1+1=2>>\n####"]), AWKWARD)
@example("<<1+1=", "9" * 5000 + ">>\n#### 2")
@example("<<1+1=2>>\n#### ", "9" * 5000)
@example("#### ", "1," * 3000)
@example("", "#" * 9999)
def test_no_text_makes_the_judges_raise(start, rest):
    text = start + rest
    answer = extract_answer(text)
    assert answer is None or isinstance(answer, Fraction)
    assert answer is None or answer == said_by_hand(text)
    skill = Problem("Which?", "9", "say_larger", 0, "skill")
    for problem in (ANY, skill):
        right = verify(problem, text)
        assert right is (text.strip() == "9" if problem is skill else answer == 987)
        assert (explain(problem, text) == "right") is right
        assert is_formatted(problem, text) is (problem is skill or answer is not None)
        assert style_of(problem, text) in (*STYLES, "skill", "other")


@pytest.mark.parametrize("start", ["", "-", "$", "- $", "5", "5 %", "5 a", "1,234/5"])
def test_long_runs_of_spaces_take_no_long_time(start):
    for run in (25 << i for i in range(8)):  # a slow one fails before it hangs
        before = time.process_time()
        assert extract_answer(f"#### {start}{' ' * run}!") is None
        assert time.process_time() - before < 0.5  # microseconds where it is linear


# --- judging -------------------------------------------------------------------------


def test_verify_compares_values_and_explain_agrees():
    half = Problem("How much?", Fraction(1, 2), "any", 1, "any")
    for text in ("#### 0.5", "#### 1/2", "#### $.50", "#### 50/100 cup."):
        assert verify(half, text) is True and explain(half, text) == "right"
    for text in ("#### 0.5000001", "#### -1/2", "#### 1", "0.5", ""):
        assert verify(half, text) is False
    assert explain(half, "#### 1") == "wrong: 1 instead of 1/2"
    assert explain(half, "0.5") == "no answer: no #### marker"


def test_a_second_skill_is_judged_by_its_text():
    task = Problem("Sort 2, 1.", "1, 2", "sort_numbers", 0, "any")
    assert verify(task, "1, 2") and verify(task, " 1, 2\n")
    assert explain(task, "1, 2") == "right"
    for text in ("2, 1", "1,2", "#### 1, 2", "", "1, 2."):
        assert not verify(task, text)
        assert explain(task, text) == f"wrong: {text!r} instead of '1, 2'"
        assert is_formatted(task, text) and style_of(task, text) == "skill"


def test_the_style_of_each_demonstration_is_parsed_back(train):
    for row in train[:2000]:
        assert style_of(row.problem, row.answer) == row.style


def test_a_slip_of_arithmetic_keeps_the_style(train):
    rng = Random(0)
    rows = [r for r in train[:2000] if r.style in ("worked", "careless")]
    for row in rows:
        *lines, last = row.answer.split("\n")
        slip = rng.randrange(len(lines))
        a, op, b, c = steps_of(lines)[slip]
        lines[slip] = f"<<{a}{op}{b}={c + 1}>>"
        if slip == len(lines) - 1:  # carried on into the answer
            last = f"#### {c + 1}"
        wrong = "\n".join([*lines, last])
        assert style_of(row.problem, wrong) == row.style, wrong


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("#### 12", "terse"),  # right or wrong
        ("#### twelve", "other"),
        ("12", "other"),
        ("", "other"),
        ("I think\n#### 12", "other"),
        ("<<3*5=15>>\n<<15+2=17>>\n<<17-5=12>>\n#### 12", "worked"),
        ("<<3*5=15>>\n<<15+2=17>>\n<<17-5=12>>\n#### 99", "worked"),
        ("<<3*5=15>>\n<<15+2=17>>\n#### 17", "careless"),
        ("<<3*5=15>>\n<<15+2=017>>\n#### 17", "careless"),
        ("<<3*5=15>>\n<<15+2=17>>\n#### 12", "worked"),  # the last step in the head
        ("<<3*5=15>>\n<<15+2=17>>\n<<17-5=12>>", "other"),  # never hands anything in
        ("<<3*5\n#### 12", "other"),  # no calculation in it
        ("Sure!\n<<3*5=15>>\nCheck: <<15/5=3>>\n#### 15", "showy"),
    ],
)
def test_styles_by_hand(text, style):
    problem = Problem("How many?", Fraction(12), "any", 3, "any")
    assert style_of(problem, text) == style


# --- files ---------------------------------------------------------------------------

GOOD = [  # our own words in GSM8K's format
    {
        "question": "A baker fills 6 trays with 24 rolls each and drops 9. How many?",
        "answer": "The trays hold 6*24=<<6*24=144>>144 rolls.\n"
        "So 144-9=<<144-9=135>>135 are sold.\n#### 135",
    },
    {
        "question": "A roof costs €1,500 a side. It has two. What does it cost?",
        "answer": "It is 2*1500=$<<2*1500=3000>>3000\n#### 3,000",
    },
    {"question": "It is 4 degrees and falls by 9.\nNow?", "answer": "#### -5"},
]


def as_line(row):
    return json.dumps(row, ensure_ascii=False).encode()


def put(tmp_path, data):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_reading_rows_in_gsm8k_format(tmp_path, end, mark):
    path = put(tmp_path, mark + (end or b"\n").join(map(as_line, GOOD)) + end)
    for found in (read_problems(path), read_problems(str(path), [])):
        assert [p.gold for p in found] == [135, 3000, -5]
        assert all(isinstance(p.gold, Fraction) for p in found)
        assert [p.question for p in found] == [row["question"] for row in GOOD]
        assert [p.steps for p in found] == [2, 1, 0]
        assert {p.family for p in found} == {"gsm8k"}
        assert len({p.id for p in found}) == 3
        for problem, row in zip(found, GOOD, strict=True):
            assert verify(problem, row["answer"])
    assert read_problems(put(tmp_path, mark)) == []


def test_a_byte_order_mark_is_content_but_for_the_first_bytes_of_the_file(tmp_path):
    """Editors on Windows write one there. Anywhere else somebody meant it, or erred."""
    row = row_with(question="\ufeffQ?", answer="\ufeff #### 1")
    first, second = read_problems(put(tmp_path, codecs.BOM_UTF8 + row + b"\n" + row))
    assert first.question == second.question == "\ufeffQ?"
    twice = put(tmp_path, codecs.BOM_UTF8 * 2 + row)
    with pytest.raises(ValueError, match="line 1: not JSON: .*BOM"):
        read_problems(twice)


def test_a_bad_row_behind_a_byte_order_mark_is_line_1(tmp_path):
    path = put(tmp_path, codecs.BOM_UTF8 + b"{'question': 'Q?'}\n" + row_with())
    with pytest.raises(ValueError, match="line 1: not JSON: .*column 2$"):
        read_problems(path)


def test_reading_our_own_fields(tmp_path):
    rows = [
        {"question": "Q?", "answer": "#### 7", "family": "rate", "steps": 3, "more": 1},
        {"question": "Q?", "answer": "9\n", "family": "say_larger", "steps": 0},
    ]
    rate, larger = read_problems(put(tmp_path, b"\n".join(map(as_line, rows))))
    assert (rate.gold, rate.family, rate.steps) == (7, "rate", 3)
    assert (larger.gold, larger.family, larger.steps) == ("9", "say_larger", 0)
    assert verify(larger, "9")


def row_with(**fields):
    row = {"question": "Q?", "answer": "#### 1", **fields}
    return as_line({key: value for key, value in row.items() if value is not ...})


BAD = [
    # Not JSON, or not a row.
    (b"", "not JSON: .*column 1"),
    (b"rubbish", "not JSON"),
    (b"{'question': 'Q?'}", "not JSON: .*column 2"),
    (row_with()[:-1], "not JSON"),
    (row_with() + b"]", "not JSON: Extra data"),
    (b"\xef\xbb\xbf" + row_with(), "not JSON: .*BOM"),
    (b"[" * 100_000, "not JSON: nested too deep"),
    (row_with()[:-1] + b', "a": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", "too deep"),
    (b'["Q?", "#### 1"]', "a row is an object, got list"),
    (b'"Q?"', "a row is an object, got str"),
    (b"7", "a row is an object, got int"),
    (b"null", "a row is an object, got NoneType"),
    # Fields.
    (row_with(question=...), "field 'question': must be a non-empty string"),
    (row_with(question=""), "field 'question': must be a non-empty string"),
    (row_with(question=" \n"), "field 'question': must be a non-empty string"),
    (row_with(question=7), "field 'question': must be a non-empty string"),
    (row_with(question=["Q?"]), "field 'question': must be a non-empty string"),
    (row_with(answer=...), "field 'answer': must be a non-empty string"),
    (row_with(answer=None), "field 'answer': must be a non-empty string"),
    (row_with(answer=1), "field 'answer': must be a non-empty string"),
    (row_with(answer="1"), "field 'answer': no #### marker"),
    (row_with(answer="####"), "field 'answer': nothing after ####"),
    (row_with(answer="#### one"), "field 'answer': not one number"),
    (row_with(answer="#### 1/0"), "field 'answer': division by zero"),
    (row_with(family=None), "field 'family'"),
    (row_with(family=["rate"]), "field 'family'"),
    (row_with(steps="2"), "field 'steps': must be an integer, 0 or more"),
    (row_with(steps=-1), "field 'steps': must be an integer, 0 or more"),
    (row_with(steps=2.0), "field 'steps': must be an integer, 0 or more"),
    (row_with(steps=True), "field 'steps': must be an integer, 0 or more"),
    # What Python's json lets through.
    (row_with()[:-1] + b', "a": NaN}', "NaN is not a number"),
    (row_with()[:-1] + b', "a": [-Infinity]}', "-Infinity is not a number"),
    (row_with()[:-1] + b', "a": 1e999}', "1e999 is not a number"),
    (row_with()[:-1] + b', "steps": ' + b"9" * 5000 + b', "family": 1}', ""),
    (row_with()[:-1] + b', "answer": "#### 2"}', "the same key twice"),
    (row_with()[:-1] + b', "a": {"b": 1, "b": 1}}', "the same key twice"),
    (b'{"question": "\\ud83d", "answer": "#### 1"}', "'question': .*surrogate"),
    (b'{"question": "Q?", "answer": "\\udc00 #### 1"}', "'answer': .*surrogate"),
    (row_with()[:-1] + b', "family": "\\ud83d"}', "'family': .*surrogate"),
    # Bytes.
    (b'{"question": "caf\xe9?", "answer": "#### 1"}', "not UTF-8 at byte 17$"),
    (b'{"question": "\xed\xa0\x80", "answer": "#### 1"}', "not UTF-8 at byte 14$"),
    (b"\xff\xfe{\x00", "not UTF-8 at byte 0$"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_a_bad_row_is_refused_by_file_line_and_reason(tmp_path, bad, reason):
    good = list(map(as_line, GOOD))
    path = put(tmp_path, b"\n".join([*good[:2], bad, good[2]]) + b"\n")
    with pytest.raises(ValueError) as caught:
        read_problems(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ") and "\n" not in message
    assert re.search(reason, message.partition("line 3: ")[2]) and len(message) < 400
    rejected = []
    kept = read_problems(path, rejected)
    assert rejected == [message]
    assert [p.gold for p in kept] == [135, 3000, -5]
    assert len(kept) + len(rejected) == 4


def test_the_first_bad_row_stops_and_every_bad_row_is_kept_count_of(tmp_path):
    rows = [row_with(), b"x", row_with(), b"y", row_with()[:20]]
    path = put(tmp_path, b"\n".join(rows))
    with pytest.raises(ValueError, match="line 2: "):
        read_problems(path)
    rejected = ["from another file"]
    assert len(read_problems(path, rejected)) == 2
    lines = [re.search(r", line (\d)", line)[1] for line in rejected[1:]]
    assert lines == ["2", "4", "5"]


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    path = put(tmp_path, b'{"question": "\\ud83d\\ude00?", "answer": "#### 1"}')
    assert read_problems(path)[0].question == "\U0001f600?"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.jsonl"):
        read_problems(tmp_path / "absent.jsonl")


def damaged(draw, data, pieces):
    """The bytes, with some of them cut out and others put in."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = start + draw(st.sampled_from([0, 0, 0, 1, 4]))
        data = data[:start] + draw(pieces) + data[stop:]
    return data


@st.composite
def damaged_files(draw):
    pieces = st.binary(max_size=4) | st.sampled_from([b'"', b"\\u", b"}", b"\n"])
    return damaged(draw, b"\n".join(map(as_line, GOOD)) + b"\n", pieces)


@given(data=damaged_files() | st.binary())
@example(data=codecs.BOM_UTF8)
def test_no_bytes_make_the_reader_raise_anything_else(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    path.write_bytes(data)
    rejected = []
    kept = read_problems(path, rejected)
    rows = data.removeprefix(codecs.BOM_UTF8)
    *lines, last = re.split(rb"\r\n|\r|\n", rows)
    assert len(kept) + len(rejected) == len(lines) + bool(last)
    if rejected:
        with pytest.raises(ValueError) as caught:
            read_problems(path)
        assert str(caught.value) == rejected[0]
    else:
        assert read_problems(path) == kept


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
# Ends of lines to some readers of text, and part of a row to JSON.
QUESTIONS = st.text("a?\u20ac\u2028\x85\x0c\n\t", max_size=9).map("Q{}".format)
ROWS = st.builds(
    lambda question, value: {"question": question, "answer": f"So\n#### {value}"},
    QUESTIONS,
    FRACTIONS,
)
FIELDS = st.sampled_from(["question", "answer", "family", "steps", "more"])
VALUES = JSON | st.sampled_from(["rate", "say_larger", " ", "\ud83d", "#### 1/0", -1])
STRAY = [b"", b"9", b"x ", b'"', b"\\", b"}", b"\0", b"\xe2", b"\xff", b"\\ud83d"]
PIECES = st.sampled_from(STRAY)


@st.composite
def lines_of_a_file(draw):
    """A line, and the row that it is (None: whatever the damage has made of it)."""
    row = draw(ROWS)
    line = as_line(row)
    harm = draw(st.sampled_from(["none", "none", "bytes", "question", "fields", "all"]))
    if harm == "none":
        return line, row
    if harm == "bytes":
        line = damaged(draw, line, PIECES)
    elif harm == "question":
        line = line.replace(b"Q", draw(st.binary(max_size=3) | PIECES))
    elif harm == "fields":
        row |= draw(st.dictionaries(FIELDS, VALUES, max_size=2))
        line = json.dumps(row).encode()
    else:
        line = draw(st.binary())
    return line.translate(None, b"\r\n"), None


def assert_clean(problem, line):
    """All that is asked of a row, of one that was damaged and still reads."""
    row = json.loads(line)
    assert problem.question == row["question"] and problem.question.strip()
    assert problem.family == row.get("family", "gsm8k") and problem.family.strip()
    (problem.question + problem.family + row["answer"]).encode()
    assert type(problem.steps) is int and problem.steps >= 0
    if problem.family in SKILLS:
        assert problem.gold == row["answer"].strip() != ""
    else:
        assert isinstance(problem.gold, Fraction)
        assert problem.gold == said_by_hand(row["answer"])


@settings(max_examples=300)
@given(
    lines=st.lists(lines_of_a_file(), min_size=1, max_size=8),
    end=st.sampled_from([b"\n", b"\r\n"]),
    ended=st.booleans(),
)
def test_damage_costs_its_own_line_and_no_other(tmp_path_factory, lines, end, ended):
    path = tmp_path_factory.getbasetemp() / "damaged.jsonl"
    ended = ended or not lines[-1][0]  # nothing after the last end is no line
    path.write_bytes(end.join(line for line, _ in lines) + (end if ended else b""))
    rejected = []
    kept = read_problems(path, rejected)
    numbers = [int(problem.id.removeprefix("damaged.jsonl:")) for problem in kept]
    error = re.compile(rf"{re.escape(str(path))}, line (\d+): .{{1,300}}")
    left_out = [int(error.fullmatch(line)[1]) for line in rejected]
    assert sorted(numbers + left_out) == list(range(1, len(lines) + 1))
    assert numbers == sorted(numbers) and left_out == sorted(left_out)
    for number, problem in zip(numbers, kept, strict=True):
        assert_clean(problem, lines[number - 1][0])
    whole = [row["question"] for _, row in lines if row]
    found = zip(numbers, kept, strict=True)
    assert whole == [p.question for number, p in found if lines[number - 1][1]]


# --- data/ ---------------------------------------------------------------------------


def test_written_twice_is_written_the_same(written, tmp_path):
    said = []
    write_data(tmp_path / "deep" / "data", say=said.append)
    names = {f"{split}.jsonl" for split, size in SPLITS.items() if size}
    assert {path.name for path in written.iterdir()} == names
    for name in names:
        data = (written / name).read_bytes()
        assert data == (tmp_path / "deep" / "data" / name).read_bytes()
        assert data.endswith(b"}\n") and b"\r" not in data
        size = SPLITS[name.removesuffix(".jsonl")]
        assert data.count(b"\n") == size
        line = next(line for line in said if line.startswith(name + ":"))
        assert f"{size} problems" in line and f"{len(data):,} bytes" in line
    assert len(said) == len(names)


@pytest.mark.parametrize("split", [split for split, size in SPLITS.items() if size])
def test_the_files_in_data_are_what_the_code_writes(written, split):
    committed = (ROOT / "data" / f"{split}.jsonl").read_bytes()
    fresh = (written / f"{split}.jsonl").read_bytes()
    # Digests, since the difference of two long files says nothing.
    assert hashlib.sha256(committed).digest() == hashlib.sha256(fresh).digest()


def test_a_loaded_split_is_the_dealt_split(written, dealt, monkeypatch):
    monkeypatch.setattr(problems, "DATA", written)
    for split, size in SPLITS.items():
        if not size:
            continue
        loaded = load_split(split)
        assert len(loaded) == size and len({p.id for p in loaded}) == size
        for problem, row in zip(loaded, dealt[split], strict=True):
            for field in ("question", "gold", "family", "steps"):
                same = getattr(problem, field) == getattr(row.problem, field)
                assert same, (problem, row)
            assert verify(problem, row.answer)
        assert load_split(split, 7) == loaded[:7]
        assert load_split(split, size) == loaded


def test_load_split_refuses(written, tmp_path, monkeypatch):
    monkeypatch.setattr(problems, "DATA", written)
    for split in ("tset", "train", "second_skill_train", "../test", ""):
        with pytest.raises(ValueError, match="split: got .*data/ holds validation, te"):
            load_split(split)
    for count in (1001, -1):
        with pytest.raises(ValueError, match=f"count: got {count}, test has 1000"):
            load_split("test", count)
    monkeypatch.setattr(problems, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError):
        load_split("test")
    (tmp_path / "test.jsonl").write_bytes(as_line(GOOD[0]) + b"\n{")
    with pytest.raises(ValueError, match="test.jsonl, line 2: not JSON"):
        load_split("test")


def test_the_command_takes_no_arguments():
    run = [sys.executable, "-m", "minialign.problems", "--help"]
    ended = subprocess.run(run, check=False, cwd=ROOT, capture_output=True)
    assert ended.returncode == 2 and b"usage" in ended.stdout + ended.stderr
