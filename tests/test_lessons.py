"""Every lesson runs; bad input is one clear line, exit code 2, and writes nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted(path.stem for path in (ROOT / "lessons").glob("[0-9]*.py"))

# A child process that opens a socket dies with this line.
NO_SOCKETS = """
import socket
def refuse(self, *args, **kwargs):
    raise SystemExit("a socket was opened")
socket.socket.__init__ = refuse
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the tree, so that tests never touch the reader's own figures."""
    copy = tmp_path_factory.mktemp("clone")
    for name in ("minialign", "lessons", "data", "figures"):
        ignore = shutil.ignore_patterns("__pycache__", "local")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    (copy / "sitecustomize.py").write_text(NO_SOCKETS)
    return copy


def run(clone: Path, *command: str, cwd: Path | None = None):
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", MPLBACKEND="Agg", PYTHONPATH=str(clone)
    )
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd or clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def snapshot(clone: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns
        for path in clone.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_guard_against_sockets_works(clone):
    out = run(clone, "-c", "import socket; socket.socket()")
    assert out.returncode != 0 and "a socket was opened" in out.stderr


@pytest.mark.parametrize("lesson", LESSONS)
def test_smoke_from_any_directory_without_sockets(clone, tmp_path, lesson):
    script = str(clone / "lessons" / f"{lesson}.py")
    out = run(clone, script, "--preset", "smoke", "--device", "cpu", cwd=tmp_path)
    assert out.returncode == 0, out.stderr[-2000:]
    assert re.search(rf"^{lesson} +\d+ ", out.stdout, re.MULTILINE), out.stdout[-800:]
    assert (clone / "figures" / "local" / f"{lesson}.png").stat().st_size > 5_000
    assert (clone / "figures" / "local" / f"{lesson}.json").exists()
    assert not list(tmp_path.iterdir())


def test_lessons_by_name_end_with_one_table(clone):
    out = run(clone, "-m", "lessons", "verifier", "00", "--preset", "smoke")
    assert out.returncode == 0, out.stderr[-2000:]
    table = out.stdout[out.stdout.index("\n2 lessons") :]
    assert table.index("02_verifier") < table.index("00_tour")


def test_ask_answers_with_the_base(clone):
    question = "Mia has 3 bags of 5 apples and 2 boxes of 6 apples. How many is that?"
    out = run(clone, "-m", "lessons", "ask", question)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "--- the base" in out.stdout and "####" in out.stdout


LONG = "Mia has 12 apples. " * 60


@pytest.mark.parametrize(
    "command, says",
    [
        (["-m", "lessons", "nosuch"], "unknown lesson 'nosuch'"),
        (["-m", "lessons", "tour", "--device", "cuda"], "--device cuda"),
        (["-m", "lessons", "tour", "--device", "toaster"], "--device toaster"),
        (["lessons/00_tour.py", "--device", "cuda"], "--device cuda"),
        (["-m", "lessons", "ask", LONG], "context"),
        (["-m", "lessons", "ask"], "ask what?"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(clone, command, says):
    import torch

    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    before = snapshot(clone)
    out = run(clone, *command)
    assert out.returncode == 2, (out.stdout, out.stderr)
    assert says in out.stderr and "Traceback" not in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1, out.stderr
    assert snapshot(clone) == before


@pytest.mark.parametrize("preset", ["fast", ""])
def test_an_unknown_preset_is_refused(clone, preset):
    out = run(clone, "lessons/00_tour.py", "--preset", preset)
    assert out.returncode == 2 and "--preset" in out.stderr


@pytest.mark.parametrize("name", ["base.ckpt", "vocabulary.txt", "test.jsonl"])
def test_a_damaged_file_is_one_line_and_exit_2(clone, name):
    path = clone / "data" / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    broken = whole[:middle] + bytes([whole[middle] ^ 1, 0xFF]) + whole[middle + 2 :]
    try:
        path.write_bytes(broken)
        before = snapshot(clone)
        out = run(clone, "lessons/00_tour.py", "--preset", "smoke", "--device", "cpu")
        assert out.returncode == 2, (out.stdout, out.stderr)
        assert name in out.stderr and "Traceback" not in out.stderr
        assert len(out.stderr.strip().splitlines()) == 1, out.stderr
        assert snapshot(clone) == before
    finally:
        path.write_bytes(whole)


def test_the_ten_lines_of_the_readme_run(clone):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    out = run(clone, "-c", code)
    assert out.returncode == 0, out.stderr[-2000:]
    rewards = [float(line.split()[0]) for line in out.stdout.splitlines()]
    assert len(rewards) == 2 and all(-1 < reward < 1 for reward in rewards)


# A notebook has no __file__ and no command line of the lesson's own: its first cells
# find the repository from the working directory.


def code_cells(lesson: str) -> list[str]:
    text = (ROOT / "lessons" / f"{lesson}.py").read_text(encoding="utf-8")
    return re.split(r"^# %%.*$", re.sub(MARKDOWN, "", text), flags=re.MULTILINE)[1:]


MARKDOWN = re.compile(r"^# %% \[markdown\]\n(#.*\n)*", re.MULTILINE)


@pytest.fixture
def in_a_notebook(monkeypatch):
    """Run cells of a lesson as a notebook in `folder` would; return their namespace."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run_cells(cells: list[str], folder: Path) -> dict:
        monkeypatch.chdir(folder)
        namespace = {"__name__": "__main__"}
        for cell in cells:
            exec(cell, namespace)  # noqa: S102  (that is what a notebook does)
        return namespace

    return run_cells


@pytest.mark.parametrize("folder", [".", "lessons"])
@pytest.mark.parametrize("lesson", LESSONS)
def test_the_first_cells_run_in_a_notebook(in_a_notebook, lesson, folder):
    cells = code_cells(lesson)
    last = next(i for i, cell in enumerate(cells) if "course.setup(" in cell)
    namespace = in_a_notebook(cells[: last + 1], ROOT / folder)
    assert sys.path[0] == str(ROOT)
    assert namespace["settings"].lesson == lesson
    assert namespace["settings"].preset != "smoke"


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_notebook_elsewhere_is_told_where_to_run(in_a_notebook, lesson, tmp_path):
    (tmp_path / "minialign").mkdir()  # a folder of that name is not the repository
    with pytest.raises(FileNotFoundError, match="run this in its repository"):
        in_a_notebook(code_cells(lesson)[:1], tmp_path)
    assert str(tmp_path) not in sys.path


def test_all_lessons_begin_with_the_same_cell():
    assert len({code_cells(lesson)[0] for lesson in LESSONS}) == 1
    for lesson in LESSONS:
        assert "__file__" not in "".join(code_cells(lesson)[1:]), lesson
