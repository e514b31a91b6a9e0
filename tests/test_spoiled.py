"""Wrong copies of right answers, which a judge learns from, and the right ones."""

import re
from collections import Counter
from random import Random

import pytest

from minialign.problems import (
    MISTAKES,
    demonstration,
    make_problem,
    spoiled,
    style_of,
    verify,
    workings,
)

THREE_STEPS = "<<3*5=15>>\n<<2*6=12>>\n<<15+12=27>>\n#### 27"
CALCULATION = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>")
DO = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def steps_of(text: str) -> list[tuple[int, str, int, int]]:
    found = []
    for a, operation, b, result in CALCULATION.findall(text):
        found.append((int(a), operation, int(b), int(result)))
    return found


def wrong_sums(text: str) -> int:
    return sum(DO[op](a, b) != result for a, op, b, result in steps_of(text))


def handed_in(text: str) -> int:
    return int(text.rpartition("#### ")[2])


@pytest.mark.parametrize("index", range(0, 60, 3))
def test_each_working_is_right_and_no_two_are_the_same(index):
    problem, texts = workings(3, "train", index)
    assert problem == make_problem(3, "train", index)
    assert len(set(texts)) == len(texts) >= 1
    for text in texts:
        assert verify(problem, text) and style_of(problem, text) == "worked"
        assert wrong_sums(text) == 0 and len(steps_of(text)) == problem.steps


def test_there_is_a_working_for_each_order_and_none_twice():
    """What the teachers write to this problem is among them; two may be one."""
    counts = Counter()
    for index in range(40):
        row = demonstration(3, "new_families_train", index)
        problem, texts = workings(3, "new_families_train", index)
        assert row.problem == problem and row.answer in texts
        counts[problem.family, len(texts)] += 1
    assert {3} == {n for family, n in counts if family == "savings"}
    assert {2} == {n for family, n in counts if family == "recipe"}
    _, (alone,) = workings(3, "train", 27)
    assert alone == "<<3+3=6>>\n<<6*3=18>>\n#### 18"  # 3 + 3, and 3 + 3 again


def test_the_second_skill_has_no_workings():
    with pytest.raises(ValueError, match="second_skill.*no steps"):
        workings(0, "second_skill", 0)


@pytest.mark.parametrize("mistake", [*MISTAKES, None])
def test_a_spoiled_answer_is_wrong_and_the_same_for_the_same_draw(mistake):
    kinds = Counter()
    for index in range(100):
        problem, (text, *_) = workings(4, "train", index)
        too_short = problem.steps == 1 or steps_of(text)[-2][3] == problem.gold
        if mistake == "left out" and too_short:
            continue
        wrong = spoiled(text, Random(index), mistake)
        assert not verify(problem, wrong)
        assert wrong == spoiled(text, Random(index), mistake)
        kinds[len(steps_of(wrong)) - problem.steps] += 1
    lost = {"left out": {-1}, None: {0, -1}}
    assert set(kinds) == lost.get(mistake, {0})


def first_difference(text: str) -> tuple[tuple, tuple]:
    """The first step that is not that of the right answer: as told, and as here."""
    for told, here in zip(steps_of(THREE_STEPS), steps_of(text), strict=True):
        if told != here:
            return told, here
    raise AssertionError("no step differs")


def test_each_mistake_is_what_its_name_says():
    for draw in range(50):
        slip = spoiled(THREE_STEPS, Random(draw), "slip")
        assert wrong_sums(slip) == 1
        for mistake in ("operation", "number", "left out"):
            assert wrong_sums(spoiled(THREE_STEPS, Random(draw), mistake)) == 0
        for mistake in ("slip", "operation", "number", "left out"):
            text = spoiled(THREE_STEPS, Random(draw), mistake)
            assert handed_in(text) == steps_of(text)[-1][3]
        told, other = first_difference(spoiled(THREE_STEPS, Random(draw), "operation"))
        assert told[1] != other[1]
        assert (told[0], told[2]) == (other[0], other[2])
        told, number = first_difference(spoiled(THREE_STEPS, Random(draw), "number"))
        assert told[1] == number[1]
        assert (told[0] == number[0]) != (told[2] == number[2])
        only = spoiled(THREE_STEPS, Random(draw), "result")
        assert only.startswith(THREE_STEPS.rpartition("27")[0])
    assert spoiled(THREE_STEPS, Random(0), "left out") == (
        "<<3*5=15>>\n<<2*6=12>>\n#### 12"
    )


def test_what_a_mistake_has_led_to_is_used_further_on():
    """The last step adds the first two results, whichever they are."""
    used = 0
    for draw in range(60):
        for mistake in ("slip", "operation", "number"):
            first, second, third = steps_of(spoiled(THREE_STEPS, Random(draw), mistake))
            if (first[3], second[3]) != (15, 12):
                used += 1
                assert third[:3] == (first[3], "+", second[3])
    assert used > 60


def test_of_two_equal_results_none_is_changed():
    """Nothing tells which of them a later step uses."""
    twins = "<<3*3=9>>\n<<3*3=9>>\n<<9+9=18>>\n#### 18"
    for draw in range(30):
        steps = steps_of(spoiled(twins, Random(draw), "slip"))
        assert [step[3] for step in steps[:2]] == [9, 9]


def test_a_terse_answer_has_another_result():
    results = {spoiled("#### 27", Random(draw)) for draw in range(200)}
    assert "#### 27" not in results and len(results) > 8
    assert all(int(text.removeprefix("#### ")) >= 0 for text in results)
    zero = {spoiled("#### 0", Random(draw)) for draw in range(50)}
    assert zero <= {f"#### {n}" for n in (1, 2, 3, 10)}


@pytest.mark.parametrize(
    "answer, mistake, reason",
    [
        ("27", None, "must be right calculations"),
        ("#### 1/2", None, "must be right calculations"),
        ("#### -20", None, "must be right calculations"),
        ("<<3*5=14>>\n#### 14", None, "must be right calculations"),
        ("<<3*5=15>>\n#### 99", None, "must be right calculations"),
        ("<<3*5+1=16>>\n#### 16", None, "must be right calculations"),
        ("Of course!\n<<3*5=15>>\n#### 15", None, "must be right calculations"),
        (THREE_STEPS, "luck", "known are slip"),
        ("#### 27", "slip", "needs more steps than 0"),
        ("<<3*5=15>>\n#### 15", "left out", "needs more steps than 1"),
        ("<<0+0=0>>\n#### 0", "operation", "makes no other result"),
    ],
)
def test_what_cannot_be_spoiled_is_refused(answer, mistake, reason):
    with pytest.raises(ValueError, match=reason):
        spoiled(answer, Random(0), mistake)
