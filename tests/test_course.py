"""What stands around every lesson: settings, the four answers, records, stopping."""

import ast
import json
import os
import signal

import numpy as np
import pytest
import torch

from minialign import course, plotting
from minialign.intervals import Estimate


@pytest.fixture
def tokenizer():
    return course.load_tokenizer()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(plotting, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(plotting, "LOCAL", tmp_path / "figures" / "local")
    return tmp_path / "figures"


@pytest.mark.parametrize("lesson", ["11_reinforce", "/somewhere/11_reinforce.py"])
def test_setup_reads_the_three_options(lesson):
    arguments = ["--preset", "smoke", "--device", "cpu", "--seed", "3"]
    settings = course.setup(lesson, arguments)
    assert (settings.lesson, settings.preset, settings.seed) == (
        "11_reinforce",
        "smoke",
        3,
    )
    assert settings.pick("a", "b", "c") == "a"
    assert settings.figure_path == plotting.LOCAL / "11_reinforce.png"


def test_each_purpose_has_a_generator_of_its_own():
    settings = course.setup("00_tour.py", ["--device", "cpu"])
    other = course.setup("00_tour.py", ["--device", "cpu", "--seed", "1"])

    def first(s, purpose):
        return torch.rand(4, generator=s.generator(purpose)).tolist()

    assert first(settings, "before") == first(settings, "before")
    assert first(settings, "before") != first(settings, "after")
    assert first(settings, "before") != first(other, "before")


def test_fail_is_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        course.fail("the reason")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: the reason\n"


def test_the_four_answers_are_what_their_names_say(tokenizer):
    tokens, mask, rewards = course.by_hand(tokenizer)
    assert rewards.tolist() == [1, 1, 0, 0]
    assert mask.shape == (4, tokens.shape[1] - 1)
    for row, text in enumerate(course.HAND_ANSWERS.values()):
        chosen = tokens[row, 1:][mask[row]].tolist()
        assert chosen[-1] == tokenizer.eos_id
        assert tokenizer.decode(chosen[:-1]) == text


def test_the_stream_is_the_same_for_all_and_another_for_each_seed():
    assert course.stream(0, 5) == course.stream(0, 9)[:5]
    assert course.stream(0, 5) != course.stream(1, 5)


def test_the_hand_table_shows_its_own_rows_below_those_of_one_relative(folders, capsys):
    plotting.save_run("01_a", {"hand": {"first": [0.5, 0.25, 0, 0]}}, 0, local=False)
    plotting.save_run("10_b", {"hand": {"another": [9, 9, 9, 9]}}, 0, local=False)
    rows = {"second": torch.tensor([4.0, 0.0, 0.0, -2.0]), "nothing": [0, 0, 0, 0]}
    own = course.hand_table("11_c", rows, beside="01_a")
    assert own == {"second": [4.0, 0.0, 0.0, -2.0], "nothing": [0.0] * 4}
    first, second, nothing = capsys.readouterr().out.splitlines()[-3:]
    assert first.split() == ["first", "+1.00", "+0.50", "+0.00", "+0.00"]
    assert second.split() == [">", "second", "+1.00", "+0.00", "+0.00", "-0.50"]
    assert nothing.split() == [">", "nothing", *["+0.00"] * 4]
    course.hand_table("11_c", rows)
    assert "first" not in capsys.readouterr().out


def test_a_record_keeps_one_run_a_seed(folders):
    plotting.save_run("01_a", {"x": 1}, 2, local=False)
    plotting.save_run("01_a", {"x": 2}, 0, local=False)
    plotting.save_run("01_a", {"x": 3}, 2, local=False)
    plotting.save_run("01_a", {"x": 4}, 0, local=True)
    assert plotting.load_record("01_a") == {"0": {"x": 2}, "2": {"x": 3}}
    assert list(plotting.load_record("01_a")) == ["0", "2"]
    assert plotting.load_record("02_b") == {}
    assert course.last_run("01_a", 0, local=True) == {"x": 4}


def test_a_record_holds_plain_finite_numbers_to_six_digits(folders):
    run = {"a": np.float32(1 / 3), "b": [np.int64(3), 2.00000001], "c": {4: True}}
    path = plotting.save_run("01_a", run, 0, local=False)
    held = json.loads(path.read_text())["0"]
    assert held == {"a": 0.333333, "b": [3, 2.0], "c": {"4": True}}
    with pytest.raises(ValueError, match="JSON"):
        plotting.save_run("01_a", {"loss": float("nan")}, 0, local=False)
    assert json.loads(path.read_text())["0"] == held  # and the old one is still whole


def test_finish_saves_and_prints_the_closing_table(folders, capsys):
    settings = course.setup("11_b.py", ["--preset", "quick", "--device", "cpu"])
    before, after = Estimate(0.4, 0.3, 0.5), Estimate(0.9, 0.8, 1.0)
    series = {"loss": [0.5, 0.25], "steps": [2, 1], "tokens_trained": [30, 12]}
    course.finish(settings, {"series": series}, before, after, "accuracy")
    out = capsys.readouterr()
    assert "0.400 [0.300, 0.500]" in out.err and "0.900 [0.800, 1.000]" in out.err
    assert out.out == ""  # a page would show when and where it was made
    held = course.last_run("11_b", 0, local=True)
    assert course.as_estimate(held["after"]) == after
    assert held["before"] == [0.4, 0.3, 0.5] and held["torch"] == torch.__version__
    assert (held["steps"], held["tokens_trained"]) == (3, 42)


def test_ctrl_c_asks_once_and_then_stops():
    before = signal.getsignal(signal.SIGINT)
    with course.interruptible() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert signal.getsignal(signal.SIGINT) is before


def test_follow_keeps_every_metric_of_every_update():
    training = ({"update": i, "loss": i / 2} for i in range(3))
    series = course.follow(training, 3)
    seconds = series.pop("seconds")
    assert series == {"update": [0, 1, 2], "loss": [0.0, 0.5, 1.0]}
    assert seconds == sorted(seconds) and seconds[0] >= 0
    assert course.follow([], 0) == {}


@pytest.mark.parametrize(
    "preset, seed, once",
    [("full", 0, True), ("full", 1, False), ("quick", 0, False), ("smoke", 1, True)],
)
def test_what_is_measured_once_is_measured_by_seed_0_at_full(preset, seed, once):
    device = torch.device("cpu")
    settings = course.Settings("11_b", preset, device, seed, started=0.0)
    assert settings.measures_once is once


def test_every_lesson_has_a_title_and_a_question():
    found = course.titles(course.DATA.parent / "lessons")
    assert list(found) == sorted(found) and "00_tour" in found
    for title, question in found.values():
        assert title.startswith("Lesson") and question.endswith("?")
        assert "#" not in question


def test_smoothing_keeps_length_and_constants():
    assert plotting.smoothed([2.0] * 7, 5) == pytest.approx([2.0] * 7)
    assert plotting.smoothed([0, 3, 0], 3).tolist() == pytest.approx([1.5, 1, 1.5])
    assert plotting.smoothed([1, 2, 3], 1).tolist() == [1, 2, 3]


def test_figures_stand_without_any_record():
    figure, axes = plotting.new_figure(3, "message")
    base = course.base_facts()
    run = {"curve": ([0, 4096], [0.4, 0.6]), "kl": [1.0], "accuracy_at_kl": 0.8}
    plotting.draw_rise(axes[0], [], run, True, base, "method")
    plotting.draw_rise(axes[0], [run, run], run, False, base, "method")
    plotting.draw_price(axes[1], [], course.base_success(), base)
    plotting.draw_price(axes[1], [run], course.base_success(), base)
    plotting.draw_trials(axes[2], {})
    trial = {"accuracy": [0.5, 0.4, 0.6], "kl": [1.0]}
    plotting.draw_trials(axes[2], {"a": trial}, ["a", "not there"])
    plotting.draw_trial_prices(axes[1], {"a": trial, "b": trial}, ["b", "a", "no"])
    low, high = [text.xyann[1] for text in axes[1].texts[-2:]]
    assert high > low
    assert [t.get_text() for t in axes[2].get_yticklabels()] == ["a"]
    figure.canvas.draw()


def test_every_band_carries_its_name_and_a_thin_one_beside_it():
    _, (axes,) = plotting.new_figure(1, "bands")
    x = range(1, 21)
    bands = {
        "thick": ([0.7] * 20, "#111111"),
        "thin": ([0.05] * 20, "#222222"),
        "other": ([0.25] * 20, "#333333"),
        "nothing": ([0.0] * 20, "#444444"),
    }
    plotting.draw_bands(axes, x, bands)
    names = {text.get_text(): text for text in axes.texts}
    assert list(names) == ["thick", "thin", "other"]
    assert names["thick"].xy[1] == pytest.approx(0.35)
    assert names["other"].xy[1] == pytest.approx(0.875)
    assert names["thin"].xy == (1.0, pytest.approx(0.725))  # at the right edge


def test_a_figure_of_settings_marks_the_default_and_the_base():
    trial = {"accuracy": [0.5, 0.4, 0.6], "kl": [1.0]}
    _, (axes,) = plotting.new_figure(1, "message")
    plotting.draw_trials(axes, {"a": trial, "b": trial}, default="b", base=0.44)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b (default)"]
    markers = [line.get_marker() for line in axes.lines]
    assert markers.count("*") == markers.count("o") == 1
    assert [text.get_text() for text in axes.texts] == ["base 0.44"]


def test_only_the_authors_flag_writes_the_record(folders, capsys):
    """`full` by itself is a reader's run like any other."""
    where = {}
    for flags in ((), ("--record",)):
        arguments = ["--preset", "full", "--device", "cpu", *flags]
        settings = course.setup("11_b.py", arguments)
        where[flags] = settings.figure_path.parent
        run = {"series": {}}
        joined = course.runs_on_record(settings, run)
        assert (run in joined) == bool(flags)
        before, after = Estimate(0.4, 0.3, 0.5), Estimate(0.9, 0.8, 1.0)
        course.finish(settings, run, before, after, "accuracy")
        held = course.last_run("11_b", 0, local=not flags)
        assert held["preset"] == "full"
    assert where == {(): plotting.LOCAL, ("--record",): plotting.FIGURES}


def test_a_record_is_of_the_full_preset(folders, capsys):
    with pytest.raises(SystemExit):
        course.setup("11_b.py", ["--preset", "quick", "--record"])
    assert "--record" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        course.setup("11_b.py", ["--preset", "quick", "--grid"])
    assert "--grid" in capsys.readouterr().err


# Numbers in prose

RUNS = {
    "0": {"kl": [1.0, 0.9, 1.1], "sampled": [[0.4, 0, 1], [0.85, 0, 1]], "steps": 64},
    "1": {"kl": [1.204, 1.1, 1.3], "sampled": [[0.5, 0, 1], [0.9, 0, 1]], "steps": 64},
}


@pytest.fixture
def on_record(folders):
    for seed, run in RUNS.items():
        plotting.save_run("11_b", run, int(seed), local=False)


@pytest.mark.parametrize(
    "key, expected",
    [
        ("kl", 1.102),
        ("kl, seed 0", 1.0),
        ("sampled after", 0.875),
        ("sampled before, seed 1", 0.5),
        ("steps", 64.0),
    ],
)
def test_a_key_names_a_number_of_the_record(key, expected):
    assert course.number(RUNS, key) == pytest.approx(expected)


def test_a_key_may_lead_into_what_is_inside():
    runs = {"0": {"tried": {"lr 4e-4": {"accuracy": [0.6, 0.5, 0.7]}}}}
    assert course.number(runs, "tried > lr 4e-4 > accuracy") == 0.6


@pytest.mark.parametrize("key", ["kll", "kl, seed 2", "kl > value", "before"])
def test_a_key_that_is_not_there_is_refused(key):
    with pytest.raises((ValueError, TypeError)):
        course.number(RUNS, key)


def test_numbers_that_agree_are_passed_over_in_silence(on_record, capsys):
    right = {"kl": 1.1, "kl, seed 1": "1.20", "sampled after": 0.88, "steps": 64}
    assert course.check("11_b", right) == []
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    "key, text", [("kl", 1.2), ("kl", "1.11"), ("steps", 63), ("kl, seed 1", 1.21)]
)
def test_a_number_that_does_not_agree_is_said(on_record, capsys, key, text):
    (said,) = course.check("11_b", {key: text, "sampled after": 0.88})
    assert key in said and str(text) in said
    assert capsys.readouterr().err.strip() == said


def test_a_key_that_the_record_lacks_does_not_agree(on_record, capsys):
    (said,) = course.check("11_b", {"kll": 1.1}, RUNS["0"])
    assert said == "11_b: kll: there is no 'kll' in the record"
    err = capsys.readouterr().err
    assert said in err and "your run: it has no kll" in err
    assert len(course.check("12_none", {"kl": 1.1})) == 1


def test_a_readers_own_run_may_differ(on_record, capsys):
    own = {"kl": [1.4, 1.3, 1.5]}
    assert course.check("11_b", {"kl": 1.1}, own) == []
    assert "your run: kl is 1.4" in capsys.readouterr().err


LESSON_FILES = sorted((course.DATA.parent / "lessons").glob("[0-9]*.py"))


def calls_of(name: str, path) -> list[ast.Call]:
    """The calls of course.<name> in a script, as they are written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [each for each in calls if ast.unparse(each.func) == f"course.{name}"]


def test_every_number_in_a_lesson_is_that_of_its_record():
    wrong = []
    for path in LESSON_FILES:
        for call in calls_of("check", path):
            record, numbers = (ast.literal_eval(each) for each in call.args[:2])
            wrong += course.check(record, numbers)
    assert not wrong


def spoilers(paths) -> list[str]:
    """Predictions that an earlier lesson's check, or an earlier one's in it, tells."""
    told = set()
    found = []
    for path in paths:
        written = []
        for kind in ("check", "predict"):
            written += [(each.lineno, kind, each) for each in calls_of(kind, path)]
        for _, kind, call in sorted(written, key=lambda each: each[0]):
            if kind == "check":
                record, numbers = (ast.literal_eval(each) for each in call.args[:2])
                told |= {(record, key) for key in numbers}
                continue
            keys = [each.value for each in call.keywords if each.arg == "key"]
            for key in map(ast.literal_eval, keys):
                if (path.stem, key) in told:
                    found.append(f"{path.stem}: {key}")
    return found


def test_no_prediction_is_given_away():
    assert spoilers(LESSON_FILES) == []


def test_a_spoiler_would_be_found(tmp_path):
    early, late = tmp_path / "10_a.py", tmp_path / "11_b.py"
    early.write_text('course.check("11_b", {"kl": 1.1})\n')
    late.write_text('course.predict("how far?", 1, 2, key="kl")\n')
    assert spoilers([early, late]) == ["11_b: kl"]
    early.write_text('course.check("10_a", {"kl": 1.1})\n')
    assert spoilers([early, late]) == []
    late.write_text(
        'course.check("11_b", {"kl": 1})\ncourse.predict("", 1, 2, key="kl")\n'
    )
    assert spoilers([early, late]) == ["11_b: kl"]
