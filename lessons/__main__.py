"""Run lessons by name; answer a question of the reader's own.

    python -m lessons                     the tour, then the table of contents
    python -m lessons reinforce 01        these lessons, in this order
    python -m lessons all                 every lesson
    python -m lessons ask "Mia has ..."   the base and a trained policy answer
    python -m lessons results             all results, figures/README.md
    python -m lessons contents            table of contents, cheatsheet
    python -m lessons page reinforce      make its page, from what is stored
    python -m lessons page all --run      run the lessons for their pages, cell by cell

Options: --preset smoke|quick|full, --device auto|cpu|cuda, --seed N; --grid for what
takes hours; --record for the authors, who write figures/ with it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from lessons import contents, pages, results
from minialign import course, plotting
from minialign.sampling import generate

HERE = Path(__file__).resolve().parent
RUN_CELLS = (
    "import sys; from lessons import pages; pages.run(sys.argv[1], sys.argv[2:])"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lessons",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", help="names or numbers; all; ask QUESTION")
    course.add_options(parser)
    parser.add_argument("--run", action="store_true", help="page: run it first")
    options = parser.parse_args()
    course.pick_device(options.device)
    if options.what[:1] == ["ask"]:
        ask(" ".join(options.what[1:]), options)
        return
    lessons = list(course.titles(HERE))
    if options.what == ["results"]:
        print(results.write().relative_to(HERE.parent))
        print(results.summary())
        return
    if options.what == ["contents"]:
        for path in contents.write():
            print(path.relative_to(HERE.parent))
        return
    if options.what[:1] == ["page"]:
        make_pages(options.what[1:], lessons, options)
        return
    names = options.what or ["tour"]
    chosen = lessons if names == ["all"] else [find(name, lessons) for name in names]
    runs = [run(lesson, options) for lesson in chosen]
    if len(runs) > 1:
        print(f"\n{len(runs)} lessons")
        course.print_table(runs)
    if not options.what:
        print_contents()


def find(name: str, lessons: list[str]) -> str:
    """The one lesson meant by `11`, `reinforce` or `11_reinforce`."""
    wanted = Path(name).stem
    found = [x for x in lessons if wanted in (x, x[:2], x[3:])]
    if not found:
        course.fail(f"unknown lesson {name!r}; there are {', '.join(lessons)}")
    return found[0]


def flags(options: argparse.Namespace) -> list[str]:
    """The options of one lesson."""
    found = ["--device", options.device, "--seed", str(options.seed)]
    if options.preset:
        found += ["--preset", options.preset]
    if options.record:
        found += ["--record"]
    if options.grid:
        found += ["--grid"]
    return found


def run(lesson: str, options: argparse.Namespace) -> dict:
    """Run a lesson in a process of its own; return what it recorded."""
    command = [sys.executable, str(HERE / f"{lesson}.py"), *flags(options)]
    print(f"\n=== {lesson} ===", flush=True)
    child = subprocess.Popen(command)
    code = None
    while code is None:  # Ctrl-C reached the lesson too: it saves, says where, and ends
        code = wait(child)
    if code:
        sys.exit(code)
    runs = [course.last_run(lesson, options.seed, local) for local in (True, False)]
    return max((r for r in runs if r), key=lambda r: r["finished"])


def make_pages(
    names: list[str], lessons: list[str], options: argparse.Namespace
) -> None:
    """Make the pages of these lessons; of none by name: of those that are stale.

    At `quick`, or without --record, a page is the reader's own, in figures/local/.
    """
    chosen = lessons if names == ["all"] else [find(name, lessons) for name in names]
    if not names:
        chosen = [lesson for lesson in lessons if pages.is_stale(lesson)]
    for lesson in chosen:
        local = not options.record
        if options.run:
            command = [sys.executable, "-c", RUN_CELLS, lesson, *flags(options)]
            code = wait(subprocess.Popen(command, cwd=HERE.parent))
            if code:
                sys.exit(code)
        elif not names or pages.stored(lesson, local=False).exists():
            local = False
        path = pages.page(lesson, local)
        path.write_text(pages.render(lesson, local), encoding="utf-8")
        print(path.relative_to(HERE.parent))


def wait(child: subprocess.Popen) -> int | None:
    """Its exit code, or None when Ctrl-C came first."""
    try:
        return child.wait()
    except KeyboardInterrupt:
        return None


def print_contents() -> None:
    """Lesson, seconds of its last run on this device ("-": none yet), question."""
    print("\nThe course. Run one with: python -m lessons NAME")
    print(f"{'lesson':<16}{'seconds':>8}  question")
    here = plotting.provenance(course.pick_device("auto"))["device"]
    for lesson, (_, question) in course.titles(HERE).items():
        own = [course.last_run(lesson, 0, local) for local in (True, False)]
        own = [r for r in own if r and r["device"] == here and r["preset"] != "smoke"]
        newest = max(own, key=lambda run: run["finished"], default=None)
        seconds = f"{newest['seconds']:.0f}" if newest else "-"
        print(f"{lesson:<16}{seconds:>8}  {question}")


def ask(question: str, options: argparse.Namespace) -> None:
    """Let the base and the policy that a lesson trained last answer, greedily."""
    if not question.strip():
        course.fail('ask what? python -m lessons ask "Mia has 12 apples. ..."')
    device = course.pick_device(options.device)
    tokenizer = course.load_tokenizer()
    policies = {"the base": course.BASE}
    trained = [plotting.LOCAL / f"{lesson}.ckpt" for lesson in course.titles(HERE)]
    trained = [p for p in trained if p.exists() and p.stem != "01_sft"]
    if trained:
        newest = max(trained, key=lambda path: path.stat().st_mtime)
        policies[f"trained in {newest.stem}"] = newest
    for name, path in policies.items():
        policy = course.load_policy(tokenizer, device, path)
        try:
            rollout = generate(
                policy,
                [tokenizer.encode_prompt(question)],
                eos_id=tokenizer.eos_id,
                pad_id=tokenizer.pad_id,
                max_new_tokens=128,
                greedy=True,
            )
        except ValueError as error:
            course.fail(error)
        print(f"\n--- {name}\n{tokenizer.decode_response(rollout.responses()[0])}")
    if not trained:
        print("\nNo trained policy yet: python -m lessons tour makes one.")


if __name__ == "__main__":
    main()
