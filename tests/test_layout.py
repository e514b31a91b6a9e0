"""The house rules that a machine can check: who imports whom, and what stands where."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STANDARD = set(sys.stdlib_module_names)
PACKAGES = {"torch", "numpy", "tiktoken", "matplotlib", "tqdm"}
ALGORITHMS = sorted(path for path in (ROOT / "minialign/algorithms").glob("[a-z]*.py"))
FOLDERS = [ROOT / name for name in ("minialign", "lessons", "tests")]
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
                (f"{node.module}.{alias.name}", id(node) in top) for alias in node.names
            ]
    return found


def room_of(path: Path) -> str:
    """The file or folder of minialign/ that this file belongs to."""
    return path.relative_to(ROOT / "minialign").parts[0].removesuffix(".py")


SOURCES = sorted((ROOT / "minialign").glob("**/*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_the_library_stands_on_the_fixed_packages_alone(path):
    """It never imports lessons or tests, and an algorithm never imports another."""
    for name, _ in imports(path):
        first, *rest = name.split(".")
        assert first in {"minialign", *PACKAGES, *STANDARD}, f"{path.name}: {name}"
        if path in ALGORITHMS:
            assert rest[:1] != ["algorithms"], f"{path.name} imports {name}"


def test_no_room_imports_a_room_that_imports_it():
    """By way of others neither. A script's main() may reach across for its input."""
    needs = {room_of(path): set() for path in SOURCES}
    for path in SOURCES:
        for name, at_top in imports(path):
            parts = name.split(".")
            if at_top and parts[0] == "minialign" and parts[1] != room_of(path):
                needs[room_of(path)].add(parts[1])
    order = list(TopologicalSorter(needs).static_order())  # raises where there is none
    assert order[-1] == "exam" and set(order) == needs.keys()


def test_properties_import_no_test():
    """Or no file of tests could be changed without them."""
    for path in (ROOT / "tests" / "properties").glob("*.py"):
        for name, _ in imports(path):
            assert "test_" not in name, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_imports_no_lesson(path):
    for name, _ in imports(path):
        first = name.split(".")[0]
        assert first in {"minialign", *PACKAGES, *STANDARD}, f"{path.name}: {name}"


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda p: p.stem)
def test_an_algorithm_file_is_whole_and_alike(path):
    text = path.read_text(encoding="utf-8")
    steps = re.findall(r"^ +# [1-5]\. (\w+)", text, re.MULTILINE)
    assert steps == ["draw", "score", "compare", "update", "report"]
    assert "Lesson: lessons/" in text and "Source: " in text
    assert list((ROOT / "lessons").glob(f"[0-9][0-9]_{path.stem}.py"))
    assert (ROOT / "tests" / f"test_{path.stem}.py").exists()


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_has_its_parts(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^# %%", text, re.MULTILINE)
    assert "my_guess = " in text and "**Question.**" in text
    assert (ROOT / "figures" / f"{path.stem}.png").exists()
    assert (ROOT / "figures" / f"{path.stem}.json").exists()


def test_lines_are_short():
    for path in (path for folder in FOLDERS for path in folder.glob("**/*.py")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            assert len(line) <= 88, f"{path}:{number} has {len(line)} columns"


def test_the_top_level_is_fixed():
    """What is in the repository; a reader's own files, such as a venv, are not."""
    command = ["git", "ls-tree", "--name-only", "HEAD"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if out.returncode:
        pytest.skip("this is no git repository")
    allowed = {"README.md", "requirements.txt", "minialign", "lessons", "tests"}
    allowed |= {"data", "figures"}
    assert {name for name in out.stdout.split() if name[0] != "."} == allowed


def test_no_named_encoding_is_ever_asked_for():
    for folder in ("minialign", "lessons"):
        for path in (ROOT / folder).glob("**/*.py"):
            assert "get_encoding(" not in path.read_text("utf-8"), path.name


def test_requirements_are_the_fixed_list():
    lines = (ROOT / "requirements.txt").read_text().split()
    names = {re.split("[=<>]", line)[0] for line in lines}
    assert names == PACKAGES | {"pytest", "hypothesis"}
    assert "torch==2.13.0" in lines
