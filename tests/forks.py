"""Run Python commands in forks of one process, which has imported torch once.

To import torch and matplotlib takes two seconds, and most commands that the tests run
take less. `python tests/forks.py` imports them, and then reads commands from standard
input, one a line in JSON:

    {"command": ["lessons/00_tour.py", "--seed", "1"],
     "folder": "/where/to/run", "out": "a/file", "err": "another/file"}

It runs each in a fork of itself, as `python lessons/00_tour.py --seed 1` would run in
that folder, writes its output into the two files, and prints its exit code. A command
meets what the imports left and nothing else: whatever it changes (generators, figures,
signal handlers, patched functions, the working directory) ends with its fork. Nothing
of this repository is imported here, so a command has to find it by itself.
"""

import json
import multiprocessing
import os
import runpy
import sys

TIMEOUT = 120  # seconds that a command may take


def serve() -> None:
    """Run every command that comes; end with standard input."""
    for line in sys.stdin:
        fork = multiprocessing.get_context("fork").Process(
            target=settle_and_run, kwargs=json.loads(line)
        )
        fork.start()
        fork.join(TIMEOUT)
        if fork.is_alive():
            fork.kill()
            fork.join()
        print(fork.exitcode, flush=True)


def settle_and_run(command: list[str], folder: str, out: str, err: str) -> None:
    """In a fork: output into files, a folder of its own, and then the command."""
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(folder)
    run(*command)


def run(first: str, *rest: str) -> None:
    """What the interpreter does with `python first *rest`."""
    if first == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})  # noqa: S102  (that is what -c does)
    elif first == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    import matplotlib.pyplot  # noqa: F401
    import tiktoken  # noqa: F401
    import torch._dynamo  # noqa: F401  (torch imports it when it makes an optimizer)
    import tqdm  # noqa: F401

    serve()
