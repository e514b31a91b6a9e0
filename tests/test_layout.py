"""The house rules that a machine can check: who imports whom, and what stands where."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room imports only rooms to its left.
ORDER = """families problems tokenizer model logprobs sampling rewards evaluation
checkpoint plotting algorithms course"""
ROOMS = ORDER.split()
PACKAGES = {"torch", "numpy", "tiktoken", "matplotlib", "tqdm"}
ALGORITHMS = sorted(
    path for path in (ROOT / "minialign/algorithms").glob("[a-z]*.py")
)
LESSONS = sorted((ROOT / "lessons").glob("[0-9]*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, at module level) of everything a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found += [
                (f"{node.module}.{alias.name}", id(node) in top)
                for alias in node.names
            ]
    return found


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if parts[0] == "minialign" and len(parts) > 1 else None


@pytest.mark.parametrize(
    "path", sorted((ROOT / "minialign").glob("**/*.py")), ids=lambda p: p.stem
)
def test_a_room_imports_only_rooms_before_it(path):
    own = path.relative_to(ROOT / "minialign").parts[0].removesuffix(".py")
    known = [r for r in ROOMS if r in ROOMS[: ROOMS.index(own)]] if own in ROOMS else []
    for name, at_top in imports(path):
        first = name.split(".")[0]
        assert first not in ("lessons", "tests"), f"{path.name} imports {name}"
        if first == "minialign":
            # A script's main() may reach across for its input; the module may not.
            assert room_of(name) in known or not at_top, f"{path.name} imports {name}"
        else:
            assert first in PACKAGES or first in STANDARD, f"{path.name}: {name}"


STANDARD = set(__import__("sys").stdlib_module_names)


def test_every_room_is_on_the_list():
    there = {p.stem for p in (ROOT / "minialign").glob("[a-z]*.py")} | {"algorithms"}
    assert there == set(ROOMS)


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_imports_no_lesson(path):
    for name, _ in imports(path):
        first = name.split(".")[0]
        assert first in {"minialign", *PACKAGES, *STANDARD}, f"{path.name}: {name}"


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda p: p.stem)
def test_an_algorithm_file_is_whole_and_alike(path):
    text = path.read_text(encoding="utf-8")
    steps = re.findall(r"^ +# ([1-5])\. (\w+)", text, re.MULTILINE)
    order = ["draw", "score", "compare", "update", "report"]
    assert steps == [(str(i + 1), word) for i, word in enumerate(order)]
    assert len(text.splitlines()) <= (350 if path.stem == "ppo" else 250)
    assert "Lesson: lessons/" in text and "Source: " in text
    assert list((ROOT / "lessons").glob(f"[0-9][0-9]_{path.stem}.py"))
    assert (ROOT / "tests" / f"test_{path.stem}.py").exists()


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_has_its_parts_and_short_cells(path):
    text = path.read_text(encoding="utf-8")
    cells = re.split(r"^# %%.*$", text, flags=re.MULTILINE)[1:]
    for cell in cells:
        assert len(cell.strip().splitlines()) <= 25, f"long cell:\n{cell[:400]}"
    assert "my_guess = " in text and "**Question.**" in text
    assert 100 <= len(text.splitlines()) <= 430
    assert (ROOT / "figures" / f"{path.stem}.png").exists()
    assert (ROOT / "figures" / f"{path.stem}.json").exists()


def test_lines_are_short():
    for path in ROOT.glob("**/*.py"):
        if ".venv" in path.parts:
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            assert len(line) <= 88, f"{path}:{number} has {len(line)} columns"


def test_the_top_level_is_fixed():
    allowed = {"README.md", "requirements.txt", "minialign", "lessons", "tests"}
    allowed |= {"data", "figures"}
    there = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert there <= allowed


def test_no_named_encoding_is_ever_asked_for():
    for folder in ("minialign", "lessons"):
        for path in (ROOT / folder).glob("**/*.py"):
            assert "get_encoding(" not in path.read_text("utf-8"), path.name


def test_requirements_are_the_fixed_list():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {re.split("[=<>]", line)[0] for line in lines}
    assert names == PACKAGES | {"pytest", "hypothesis"}
    assert "torch==2.13.0" in lines
