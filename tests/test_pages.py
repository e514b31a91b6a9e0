"""Pages: made from a script and what its cells printed; and found out when they lie."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from lessons import pages
from minialign import course, plotting

SCRIPT = """\
# %% [markdown]
# # Lesson 97: A title
#
# **Question.** Is it so?
#
#     an = equation

# %% tags=["setup"]
from types import SimpleNamespace

from minialign import plotting

settings = SimpleNamespace(record=__import__("sys").argv[-1] == "--record")

# %%
print("three is", 1 + 2)

# %% tags=["plot"]
figure, (axes,) = plotting.new_figure(1, "It rises")
axes.plot([1, 2], [3, 4])
plotting.save_figure(figure, plotting.FIGURES / "97_test.png")

# %% [markdown]
# **Figure 1.** A *line* that
# rises.
#
# **Exercise 1 (explain).** Why?
#
# **Exercise 2.** And why not?

# %% [markdown] tags=["answers"]
# **Answer 1.** Because.
#
# It does.
#
# **Answer 2.** It is not.
"""


ANSWER = "<details>\n<summary>Answer</summary>\n\n"


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """The lesson above, in a folder of its own."""
    lessons = tmp_path / "lessons"
    figures = tmp_path / "figures"
    lessons.mkdir()
    (figures / "local").mkdir(parents=True)
    monkeypatch.setattr(pages, "HERE", lessons)
    monkeypatch.setattr(plotting, "FIGURES", figures)
    monkeypatch.setattr(plotting, "LOCAL", figures / "local")
    monkeypatch.setattr(sys, "argv", [])
    path = lessons / "97_test.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


def write_page() -> str:
    text = pages.render("97_test")
    pages.page("97_test", local=False).write_text(text, encoding="utf-8")
    return text


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_cells_are_read_as_they_stand(script):
    cells = pages.read_cells(script)
    assert [cell.is_prose for cell in cells] == [1, 0, 0, 0, 1, 1]
    assert [cell.tags for cell in cells[1:4]] == [("setup",), (), ("plot",)]
    assert cells[0].source.endswith("Is it so?\n\n    an = equation")
    lines = script.read_text(encoding="utf-8").splitlines()
    for cell in cells:
        assert lines[cell.line - 1].endswith(cell.source.partition("\n")[0])


@pytest.mark.parametrize(
    "before, after, said",
    [
        (
            "# %% [markdown]\n# # Lesson",
            "import os\n# %% [markdown]\n# # Lesson",
            "text",
        ),
        ("# **Question.**", "**Question.**", "line 4"),
    ],
)
def test_what_is_no_percent_script_is_refused(script, before, after, said):
    change(script, before, after)
    with pytest.raises(ValueError, match=rf"97_test.py.*{said}"):
        pages.read_cells(script)


def test_a_page_holds_prose_code_output_and_figure_in_their_order(script, capsys):
    pages.run("97_test", ["--record"])
    assert "three is 3" in capsys.readouterr().out  # shown while it runs, too
    text = pages.render("97_test")
    parts = [
        "# Lesson 97: A title\n\n*This page is made from [97_test.py](97_test.py)",
        "    an = equation",
        "<details>\n<summary>Set-up</summary>\n\n```python\nfrom types",
        '```python\nprint("three is", 1 + 2)\n```\n\n```text\nthree is 3\n```',
        "<summary>How the figure is drawn</summary>",
        "![A line that rises.](../figures/97_test.png)",
        "**Figure 1.** A *line* that\nrises.",
        f"**Exercise 1 (explain).** Why?\n\n{ANSWER}Because.\n\nIt does.\n\n</details>",
        f"**Exercise 2.** And why not?\n\n{ANSWER}It is not.\n\n</details>",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "**Answer" not in text and "Stale" not in text


def test_prose_and_trials_are_folded_where_their_cell_says_so(script):
    change(script, "# %%\nprint", '# %% tags=["trials"]\nprint')
    folded = """# %% [markdown] tags=["folded"]
# Before any fold.
#
# **Why not
# twice?** Because.
#
# It is enough.
#
# **And this?** No.

# %% [markdown]
# **Exercise 1"""
    change(script, "# **Exercise 1", folded)
    pages.run("97_test", ["--record"])
    text = pages.render("97_test")
    trials = '```python\nprint("three is", 1 + 2)\n```\n\n```text\nthree is 3\n```'
    assert f"<summary>Settings tried</summary>\n\n{trials}\n\n</details>" in text
    first = (
        "<summary>Why not twice?</summary>\n\nBecause.\n\nIt is enough.\n\n</details>"
    )
    second = "<summary>And this?</summary>\n\nNo.\n\n</details>"
    assert "Before any fold.\n\n<details>\n" + first in text
    assert f"<details>\n{second}\n\n**Exercise 1" in text


def test_cells_of_set_up_share_a_fold_until_one_prints(script):
    more = """# %% tags=["setup"]
one = 1

# %% tags=["setup"]
print("two")

# %% tags=["setup"]
three = 3

# %%
print("three is"""
    change(script, '# %%\nprint("three is', more)
    pages.run("97_test", ["--record"])
    text = write_page()
    assert text.count("<summary>Set-up</summary>") == 2
    first, _, rest = text.partition('one = 1\n\nprint("two")\n```')
    assert "from types import" in first and "```text\ntwo\n```" in rest
    assert "<summary>Set-up</summary>\n\n```python\nthree = 3\n```" in rest
    assert pages.complaints("97_test") == []  # every cell has an output of its own


def test_a_reader_s_own_page_lies_beside_his_figures(script):
    change(script, 'plotting.FIGURES / "97', 'plotting.LOCAL / "97')
    pages.run("97_test", [])
    text = pages.render("97_test", local=True)
    assert "](97_test.png)" in text
    assert "](../../lessons/97_test.py)" in text
    assert not pages.stored("97_test", local=False).exists()


def test_a_change_of_prose_needs_no_run(script):
    pages.run("97_test", ["--record"])
    write_page()
    assert pages.complaints("97_test") == []
    change(script, "Is it so?", "Is it really so?")
    assert pages.is_stale("97_test")
    assert "Is it really so?" in write_page()
    assert pages.complaints("97_test") == []


def test_a_check_of_numbers_belongs_to_the_prose(script, monkeypatch):
    """It runs with the others, and may change without a run."""
    asked = []
    monkeypatch.setattr(course, "check", lambda *given: asked.append(given))
    check = '# %%\ncourse.check("97_test", {"x": 3})\n\n# %%\nprint("three is"'
    change(script, '# %%\nprint("three is"', check)
    change(
        script,
        "from minialign import plotting",
        "from minialign import course, plotting",
    )
    pages.run("97_test", ["--record"])
    assert asked == [("97_test", {"x": 3})]
    write_page()
    change(script, '"x": 3', '"x": 4')
    assert pages.is_stale("97_test")
    assert '"x": 4' in write_page()
    assert pages.complaints("97_test") == []


def test_a_changed_cell_is_named_until_it_runs_again(script):
    pages.run("97_test", ["--record"])
    write_page()
    change(script, "1 + 2", "2 + 2")
    text = write_page()
    assert text.index("2 + 2") < text.index("> **Stale:**") < text.index("three is 3")
    assert text.count("Stale") == 1
    (said,) = pages.complaints("97_test")
    line = SCRIPT.splitlines().index('print("three is", 1 + 2)') + 1
    assert f"lines [{line}]" in said
    pages.run("97_test", ["--record"])
    write_page()
    assert pages.complaints("97_test") == []


def test_a_figure_of_other_data_is_found(script):
    pages.run("97_test", ["--record"])
    write_page()
    figure, (axes,) = plotting.new_figure(1, "It rises")
    axes.plot([1, 2], [3, 5])
    plotting.save_figure(figure, plotting.FIGURES / "97_test.png")
    assert pages.complaints("97_test") == [
        "97_test: 97_test.png is not the figure of these outputs"
    ]


def test_outputs_that_were_edited_are_found(script):
    file = pages.run("97_test", ["--record"])
    write_page()
    held = json.loads(file.read_text(encoding="utf-8"))
    held["cells"][1]["output"] = "three is 4"
    file.write_text(json.dumps(held), encoding="utf-8")
    assert pages.complaints("97_test") == [
        "97_test: the page is not what its script makes now"
    ]


def test_a_place_on_this_machine_stands_on_no_page(script):
    change(script, 'print("three is", 1 + 2)', "print(__file__)")
    with pytest.raises(ValueError, match="its output names"):
        pages.run("97_test", ["--record"])


def test_a_page_leads_to_the_next_lesson(script):
    text = write_page()
    assert "**Next:**" not in text  # it is the last
    after = script.with_name("98_more.py")
    after.write_text("# %% [markdown]\n# # Lesson 98: More\n", encoding="utf-8")
    assert pages.render("97_test").endswith("**Next:** [Lesson 98: More](98_more.py)\n")
    after.with_suffix(".md").write_text("", encoding="utf-8")
    assert pages.render("97_test").endswith("(98_more.md)\n")


def test_a_strip_has_words_of_its_own(script):
    change(script, "97_test.png", "97_test_strip.png")
    pages.run("97_test", ["--record"])
    assert f"![{pages.STRIP}](../figures/97_test_strip.png)" in write_page()


def test_a_lesson_that_never_ran_has_a_page_without_outputs(script):
    text = write_page()
    assert "has not been run" in text and "```text" not in text
    assert pages.complaints("97_test") == ["97_test: no outputs are stored"]


# The digest of a figure


def digest(draw, title="It rises") -> str:
    figure, (axes,) = plotting.new_figure(1, title)
    draw(axes)
    return plotting.data_digest(figure)


DRAWINGS = {
    "a line": lambda axes: axes.plot([1, 2], [3, 4]),
    "another": lambda axes: axes.plot([1, 2], [3, 4.001]),
    "dots": lambda axes: axes.scatter([1, 2], [3, 4]),
    "bars": lambda axes: axes.barh(["a", "b"], [3, 4]),
    "other bars": lambda axes: axes.barh(["a", "b"], [3, 5]),
    "bars of others": lambda axes: axes.barh(["a", "c"], [3, 4]),
    "an area": lambda axes: axes.fill_between([1, 2], [3, 4], [1, 1]),
    "another area": lambda axes: axes.fill_between([1, 2], [3, 4], [1, 2]),
    "a word": lambda axes: axes.annotate("here", (1, 2)),
    "a label": lambda axes: axes.set(xlabel="nats"),
    "a title": lambda axes: axes.set_title("one", loc="left"),
}


def test_a_digest_tells_data_apart_and_not_looks():
    found = {name: digest(draw) for name, draw in DRAWINGS.items()}
    assert len(set(found.values())) == len(found)
    assert found["a line"] == digest(
        lambda axes: axes.plot([1, 2], [3, 4], "r--", lw=5)
    )
    assert found["a line"] != digest(DRAWINGS["a line"], "It falls")
    near = digest(lambda axes: axes.plot([1, 2], [3, 4 + 1e-9]))
    assert found["a line"] == near  # records hold six digits


def test_a_figure_carries_its_digest(tmp_path):
    figure, (axes,) = plotting.new_figure(1, "It rises")
    axes.plot(np.arange(9), np.arange(9) ** 2)
    path = plotting.save_figure(figure, tmp_path / "a.png")
    assert plotting.digest_of(path) == plotting.data_digest(figure)
    figure.savefig(path)
    assert plotting.digest_of(path) is None


# The pages that are committed

LESSONS = Path(pages.__file__).parent
PAGES = sorted(path.stem for path in LESSONS.glob("[0-9][0-9]_*.md"))


def test_every_page_is_what_its_script_makes():
    found = []
    for lesson in PAGES:
        found += pages.complaints(lesson)
    assert not found, "\n".join(found)
