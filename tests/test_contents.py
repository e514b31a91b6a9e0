"""The pages that are made from lessons: the table of contents and the cheatsheet."""

import re
from pathlib import Path

import pytest

from lessons import contents, pages

LESSONS = Path(contents.__file__).parent
NUMBERS = [path.stem[:2] for path in sorted(LESSONS.glob("[0-9][0-9]_*.py"))]

CARD = """Something first.

    Card: RLOO (2402.14740)
        data: K own answers
        policy: on
        comparison: the others
        credit: answer
        reference: none
        loss: −A s

    More.
"""


@pytest.mark.parametrize("name", ["README.md", "cheatsheet.md"])
def test_the_committed_pages_are_what_the_lessons_make(name):
    made = {"README.md": contents.contents, "cheatsheet.md": contents.cheatsheet}
    assert (LESSONS / name).read_text(encoding="utf-8") == made[name]()


def test_every_lesson_is_in_the_table_once():
    found = re.findall(r"`python -m lessons (\d\d)`", contents.contents())
    assert found == NUMBERS


def test_a_label_is_read_up_to_the_next_paragraph():
    header = "# Title\n\n**Look at:** the *end*\nof it.\n\n**Time:** long"
    assert contents.labelled(header, "Look at") == "the *end* of it"
    assert contents.labelled(header, "Time") == "long"
    with pytest.raises(ValueError, match="Turn first"):
        contents.labelled(header, "Turn first")


def test_a_card_is_read_with_its_fields_in_order():
    (card,) = contents._read_cards(CARD, "x.py")
    assert card.name == "RLOO" and card.home == "x.py"
    assert list(card.fields) == list(contents.FIELDS)
    assert card.fields["loss"] == "−A s"


def test_a_card_that_lacks_a_field_is_refused():
    with pytest.raises(ValueError, match=r"x\.py: the card of RLOO"):
        list(contents._read_cards(CARD.replace("        credit: answer\n", ""), "x.py"))


def test_every_algorithm_has_a_card():
    homes = {Path(card.home).stem for card in contents.cards()}
    assert homes >= {path.stem for path in contents.ALGORITHMS.glob("[a-z]*.py")}


@pytest.mark.parametrize("number", NUMBERS)
def test_what_to_read_before_has_been_read(number):
    """A lesson's prerequisites are lessons that there are, with smaller numbers."""
    (path,) = LESSONS.glob(f"{number}_*.py")
    header = pages.read_cells(path)[0].source
    before = re.search(r"\*\*Read before:\*\* (.+?)\n\n", header, re.DOTALL)
    assert before, "it does not say what to read before"
    named = re.findall(r"\((\d\d)_\w+\.py\)", before[1])
    assert named or number == "00"
    assert all(other in NUMBERS and other < number for other in named)
    for file in re.findall(r"\((\d\d_\w+\.py)\)", before[1]):
        assert (LESSONS / file).exists()


def test_the_readme_leads_to_every_lesson_and_to_its_page_where_there_is_one():
    readme = (LESSONS.parent / "README.md").read_text(encoding="utf-8")
    for path in LESSONS.glob("[0-9][0-9]_*.py"):
        page = path.with_suffix(".md")
        shown = page if page.exists() else path
        assert f"](lessons/{shown.name})" in readme
        assert not page.exists() or f"](lessons/{path.name})" not in readme
