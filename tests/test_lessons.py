"""Every lesson runs; bad input is one clear line, exit code 2, and writes nothing.

Most commands here run in forks of one process that has imported torch (forks.py):
alike, but for two seconds each. A few run as the real commands that they stand for;
and all lessons do among the slow tests.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted(path.stem for path in (ROOT / "lessons").glob("[0-9]*.py"))
SMOKE = ["--preset", "smoke", "--device", "cpu"]
Run = Callable[..., subprocess.CompletedProcess]

# A child process that opens a socket dies with this line.
NO_SOCKETS = """
import socket
def refuse(self, *args, **kwargs):
    raise SystemExit("a socket was opened")
socket.socket.__init__ = refuse
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the tree, so that tests never touch the reader's own figures."""
    copy = tmp_path_factory.mktemp("clone")
    for name in ("minialign", "lessons", "data", "figures"):
        ignore = shutil.ignore_patterns("__pycache__", "local")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """One thread, no window, no socket; and no path by which to find minialign."""
    guard = tmp_path_factory.mktemp("guard")
    (guard / "sitecustomize.py").write_text(NO_SOCKETS)
    ours = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(guard)}
    return os.environ | ours


@pytest.fixture(scope="module")
def run_command(clone, environment) -> Run:
    """run_command(*command, cwd=clone): `python *command`, a process of its own."""

    def run(*command: str, cwd: Path = clone) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


@pytest.fixture(scope="module")
def run_fork(clone, environment, run_command, tmp_path_factory) -> Iterator[Run]:
    """The same in a fork, on Linux. Elsewhere a fork of torch is not safe, or none."""
    if sys.platform != "linux":
        yield run_command
        return
    outputs = tmp_path_factory.mktemp("outputs")
    out, err = outputs / "out", outputs / "err"
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "forks.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(*command: str, cwd: Path = clone) -> subprocess.CompletedProcess:
        asked = {"command": command, "folder": str(cwd)}
        asked |= {"out": str(out), "err": str(err)}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code, "the process that forks has died"
        return subprocess.CompletedProcess(
            command, int(code), out.read_text(), err.read_text()
        )

    yield run
    server.kill()
    server.communicate()


def snapshot(clone: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns
        for path in clone.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def check_smoke(run: Run, clone: Path, elsewhere: Path, lesson: str) -> None:
    """It runs from another directory, ends with its table, draws and records."""
    local = clone / "figures" / "local"
    shutil.rmtree(local, ignore_errors=True)
    out = run(str(clone / "lessons" / f"{lesson}.py"), *SMOKE, cwd=elsewhere)
    assert out.returncode == 0, out.stderr[-2000:]
    assert re.search(rf"^{lesson} +\d+ ", out.stderr, re.MULTILINE), out.stderr[-800:]
    assert str(clone) not in out.stdout  # what is printed may stand on a page
    assert (local / f"{lesson}.png").stat().st_size > 5_000
    assert (local / f"{lesson}.json").exists()
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("lesson", LESSONS)
def test_smoke_from_any_directory_without_sockets(run_fork, clone, tmp_path, lesson):
    check_smoke(run_fork, clone, tmp_path, lesson)


def test_the_tour_runs_as_a_script(run_command, clone, tmp_path):
    check_smoke(run_command, clone, tmp_path, "00_tour")


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_every_lesson_runs_as_a_script(run_command, clone, tmp_path, lesson):
    check_smoke(run_command, clone, tmp_path, lesson)


def test_the_guard_against_sockets_works(run_command, run_fork):
    for run in (run_command, run_fork):
        out = run("-c", "import socket; socket.socket()")
        assert out.returncode == 1 and "a socket was opened" in out.stderr


# Says what it finds, and then changes all of it.
CHANGE = """
import os
import signal
import sys
import matplotlib.pyplot as plt
import torch

print(sys.argv, sys.path[0], os.getcwd(), sys.stdin.read())
print(torch.initial_seed(), torch.arange(2), signal.getsignal(signal.SIGINT))
print(plt.rcParams["figure.dpi"], plt.get_fignums())
print("to stderr", file=sys.stderr)

sys.path.insert(0, "elsewhere")
os.chdir("..")
torch.manual_seed(7)
torch.arange = None
signal.signal(signal.SIGINT, signal.SIG_IGN)
plt.rcParams["figure.dpi"] = 50
plt.figure()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="commands are not forked here")
def test_a_fork_is_like_a_process_and_keeps_nothing(run_fork, tmp_path):
    (tmp_path / "change.py").write_text(CHANGE)
    first = run_fork("change.py", "--an", "option", cwd=tmp_path)
    second = run_fork("change.py", "--an", "option", cwd=tmp_path)
    assert first.returncode == 0 and first.stderr == "to stderr\n"
    begin = f"['change.py', '--an', 'option'] {tmp_path} {tmp_path} \n"
    assert first.stdout.startswith(begin)
    assert first.stdout == second.stdout
    assert run_fork("-c", "raise ValueError('a reason')").returncode == 1
    assert run_fork("-c", "import os; os.abort()").returncode == -6
    assert run_fork("-c", "print(1)").stdout == "1\n"


def test_lessons_by_name_end_with_one_table(run_fork):
    out = run_fork("-m", "lessons", "exact_world", "02", "--preset", "smoke")
    assert out.returncode == 0, out.stderr[-2000:]
    table = out.stdout[out.stdout.index("\n2 lessons") :]
    assert table.index("80_exact_world") < table.index("02_verifier")


def test_ask_answers_with_the_base(run_fork):
    question = "Mia has 3 bags of 5 apples and 2 boxes of 6 apples. How many is that?"
    out = run_fork("-m", "lessons", "ask", question)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "--- the base" in out.stdout and "####" in out.stdout


def check_refused(out: subprocess.CompletedProcess, says: str) -> None:
    """One line on standard error that says why, and exit code 2."""
    assert out.returncode == 2, (out.stdout, out.stderr)
    assert says in out.stderr and "Traceback" not in out.stderr
    said = [x for x in out.stderr.splitlines() if ": preset " not in x]  # the greeting
    assert len(said) == 1, out.stderr


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
def test_bad_input_is_one_line_and_exit_2(run_fork, clone, command, says):
    import torch

    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    before = snapshot(clone)
    check_refused(run_fork(*command), says)
    assert snapshot(clone) == before


def test_bad_input_to_the_real_command(run_command, clone):
    before = snapshot(clone)
    check_refused(run_command("-m", "lessons", "nosuch"), "unknown lesson 'nosuch'")
    assert snapshot(clone) == before


@pytest.mark.parametrize("preset", ["fast", ""])
def test_an_unknown_preset_is_refused(run_fork, preset):
    out = run_fork("lessons/00_tour.py", "--preset", preset)
    assert out.returncode == 2 and "--preset" in out.stderr


@pytest.mark.parametrize("name", ["base.ckpt", "vocabulary.txt", "test.jsonl"])
def test_a_damaged_file_is_one_line_and_exit_2(run_fork, clone, name):
    path = clone / "data" / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    broken = whole[:middle] + bytes([whole[middle] ^ 1, 0xFF]) + whole[middle + 2 :]
    try:
        path.write_bytes(broken)
        before = snapshot(clone)
        check_refused(run_fork("lessons/00_tour.py", *SMOKE), name)
        assert snapshot(clone) == before
    finally:
        path.write_bytes(whole)


def test_the_ten_lines_of_the_readme_run(run_fork):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    out = run_fork("-c", code)
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
