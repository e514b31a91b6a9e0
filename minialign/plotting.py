"""Records to figures: every number in a picture stands in a JSON file beside it.

A *run* is what one invocation of a lesson measured: config, seed, versions, device,
wall time and every series. `full` runs of all seeds of a lesson form its *record*,
`figures/<lesson>.json`; what a reader's own `quick` runs write lies in figures/local/.
"""

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from minialign.evaluation import frontier

SAVED: list[Path] = []  # every figure that this process has written, in order
FIGURES = Path(__file__).resolve().parents[1] / "figures"
LOCAL = FIGURES / "local"

STYLE_COLORS = {
    "worked": "#2a9d8f",
    "terse": "#e76f51",
    "careless": "#e9c46a",
    "showy": "#9b72cf",
    "other": "#8d99ae",
}
COLORS = ("#1d3557", "#d1495b", "#2a9d8f", "#e9a03b", "#7b5ea7", "#5c677d")

plt.rcParams |= {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}

# --- records ------------------------------------------------------------------------


def provenance(device: torch.device) -> dict[str, object]:
    """What a number depends on beside config and seed."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": f"{device.type}: {name}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def load_record(lesson: str, folder: Path | None = None) -> dict[str, dict]:
    """The `full` runs of a lesson by seed: {} when it has none yet. None: those that
    are committed."""
    return _read((folder or FIGURES) / f"{lesson}.json")


def save_run(lesson: str, run: dict, seed: int, local: bool) -> Path:
    """Put a run into its record, replacing the run of the same seed; return the path.

    Raises: ValueError for a number that is not finite: JSON has none.
    """
    folder = LOCAL if local else FIGURES
    path = folder / f"{lesson}.json"
    record = _read(path) | {str(seed): run}
    by_seed = {key: record[key] for key in sorted(record, key=int)}
    try:
        return _write(path, by_seed)
    except ValueError as error:
        raise ValueError(f"run: its numbers must be finite: {error}") from None


def save_trials(name: str, trials: dict[str, dict], folder: Path | None = None) -> Path:
    """Write the record of a lesson's trials: {trial: what was measured}, in order.
    None: the committed one."""
    return _write((folder or FIGURES) / f"{name}.json", trials)


def _write(path: Path, record: dict[str, dict]) -> Path:
    """Write one JSON object, an entry a line, so that at every instant it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for key, entry in record.items():
        value = json.dumps(rounded(entry), allow_nan=False)
        lines.append(f"{json.dumps(key)}: {value}")
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
    return path


def _read(path: Path) -> dict[str, dict]:
    """The JSON object in a file: {} when there is no file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not a record: {error}") from None


def rounded(value: object) -> object:
    """Six significant digits: what a float32 measurement holds."""
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [rounded(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


# --- figures ------------------------------------------------------------------------


def new_figure(
    columns: int, message: str, rows: int = 1, width: float = 4.6, height: float = 3.7
) -> tuple[Figure, list[Axes]]:
    """A row (or grid) of axes under a headline that states the message."""
    size = (width * columns, height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    plt.close(figure)  # shown when it is finished, not at the end of a cell
    for one in axes.flat:
        one.locator_params(axis="x", nbins=6)
    headline(figure, message)
    return figure, list(axes.flat)


def headline(figure: Figure, message: str) -> None:
    """What the figure says, above it, in lines that it is wide enough for."""
    letters = int(figure.get_figwidth() / 0.118)  # of 13 points, bold
    message = textwrap.fill(message, letters)
    figure.suptitle(message, fontsize=13, fontweight="bold", x=0.01, ha="left")


def label(
    axes: Axes,
    text: str,
    point: tuple[float, float],
    shift: tuple[float, float],
    **style: object,
) -> None:
    """Write beside a point of the data, shifted right and up by so many points."""
    axes.annotate(text, point, xytext=shift, textcoords="offset points", **style)


def in_percent(axis: Axis) -> None:
    """An axis of shares, with ticks such as 20 % in the place of 0.2."""
    axis.set_major_formatter(PercentFormatter(1.0))


def save_figure(figure: Figure, path: Path) -> Path:
    """Write the figure; in a notebook or an editor's cells it also shows inline.

    The file carries a digest of the data that it draws, so that one that was not drawn
    again is found out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"digest": data_digest(figure)})
    SAVED.append(path)
    with contextlib.suppress(NameError):
        display(figure)  # noqa: F821  (a builtin under IPython)
    return path


def data_digest(figure: Figure) -> str:
    """A hash of the numbers and words that a figure shows, and not of how it looks."""
    shown: list[object] = [figure.get_suptitle()]
    for axes in figure.axes:
        shown += [axes.get_title(), axes.get_title("left")]
        shown += [axes.get_xlabel(), axes.get_ylabel()]
        shown += [[label.get_text() for label in axes.get_yticklabels()]]
        for line in axes.lines:
            shown += [line.get_label(), line.get_xdata(), line.get_ydata()]
        for patch in axes.patches:
            outline = patch.get_path().transformed(patch.get_patch_transform())
            shown.append(outline.vertices)
        for collection in axes.collections:
            shown.append(collection.get_offsets())
            shown += [path.vertices for path in collection.get_paths()]
        shown += [text.get_text() for text in axes.texts]
    content = json.dumps([_plain(part) for part in shown])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _plain(part: object) -> object:
    """Numbers with six digits, as records hold them; words as they are."""
    if isinstance(part, str):
        return part
    if isinstance(part, list) and all(isinstance(word, str) for word in part):
        return part
    return [f"{number:.6g}" for number in np.ravel(np.asarray(part, dtype=float))]


def digest_of(path: Path) -> str | None:
    """The digest that `save_figure` left in a PNG file; None if there is none."""
    data = path.read_bytes()
    position = 8  # after the signature come chunks: length, kind, content, checksum
    while position < len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        content = data[position + 8 : position + 8 + length]
        if kind == b"tEXt" and content.startswith(b"digest\0"):
            return content.removeprefix(b"digest\0").decode("latin-1")
        position += 12 + length
    return None


def draw_runs(
    axes: Axes,
    runs: Sequence[dict],
    x: str,
    y: str,
    label: str,
    color: str,
    smooth: int = 5,
) -> None:
    """One thin line a run and their mean, thick; `smooth` points averaged.

    Each run holds its series under "series": {name: [numbers]}.
    """
    xs = [run["series"][x] for run in runs]
    ys = [smoothed(run["series"][y], smooth) for run in runs]
    if len(runs) > 1:
        for one_x, one_y in zip(xs, ys, strict=True):
            axes.plot(one_x, one_y, color=color, alpha=0.3, lw=1)
        label = f"{label} (mean of {len(runs)} seeds)"
    shortest = min(len(one_x) for one_x in xs)
    mean = np.mean([one_y[:shortest] for one_y in ys], axis=0)
    axes.plot(xs[0][:shortest], mean, color=color, lw=2.2, label=label)


def draw_live(
    axes: Axes, run: dict, x: str, y: str, smooth: int = 5, label: str = "this run"
) -> None:
    """The reader's own run, over the committed ones."""
    series = run["series"]
    ys = smoothed(series[y], smooth)
    axes.plot(series[x], ys, color="black", lw=1.6, ls=(0, (4, 2)), label=label)


def draw_rise(
    axes: Axes,
    runs: Sequence[dict],
    run: dict,
    live: bool,
    base: dict,
    label: str,
    color: str = COLORS[0],
) -> None:
    """Sampled accuracy against answers generated: committed runs, and if it is `live`
    the reader's own over them.

    Each run holds "curve": (completions, accuracy); long ones are smoothed over 5.
    """

    def as_series(each: dict) -> dict:
        completions, accuracy = each["curve"]
        return {"series": {"x": completions, "y": accuracy}}

    smooth = 5 if len(run["curve"][0]) > 20 else 1
    if runs:
        series = [as_series(each) for each in runs]
        draw_runs(axes, series, "x", "y", label, color, smooth)
    if live:
        draw_live(axes, as_series(run), "x", "y", smooth)
    draw_base(axes, base)
    axes.set(xlabel="answers generated", ylabel="sampled accuracy", ylim=(0, 1))
    axes.legend(loc="lower right")
    axes.set_title("how fast it learns")


def draw_price(
    axes: Axes,
    runs: Sequence[dict],
    success: np.ndarray,
    base: dict,
    label: str = "after training",
) -> None:
    """Accuracy against KL to the base: one star a run, under the frontier's curve.

    Each run holds "kl": [value, low, high] in nats and "accuracy_at_kl"; `success` are
    the base's rates on the problems where both were measured.
    """
    kl, accuracy = frontier(success)
    axes.plot(kl, accuracy, color="#888", lw=2, label="frontier (the limit)")
    for run in runs:
        axes.plot(run["kl"][0], run["accuracy_at_kl"], "k*", ms=12, label=label)
        label = None  # the legend names the first star for all
    draw_base(axes, base)
    furthest = max([run["kl"][0] for run in runs], default=1.0)
    axes.set(xlabel="KL to the base, nats per answer", ylabel="sampled accuracy")
    axes.set(xlim=(0, 1.25 * furthest + 0.1), ylim=(0, 1))
    axes.legend(loc="lower right")
    axes.set_title("what its accuracy costs")


def strip(
    runs: Sequence[dict],
    run: dict,
    live: bool,
    success: np.ndarray,
    base: dict,
    label: str,
) -> Figure:
    """The standard strip of a method: its learning curve over the committed seeds, and
    its price in KL under the frontier. If it is `live`, the reader's own run lies over
    the curves.

    Runs, success and base as in `draw_rise` and `draw_price`.
    """
    count = max(len(runs), 1)
    seeds = "one seed" if count == 1 else f"{count} seeds"
    figure, (rise, price) = new_figure(2, f"{label}: its curve and its price, {seeds}")
    draw_rise(rise, runs, run, live, base, label)
    draw_price(price, runs or [run], success, base)
    return figure


def draw_trials(
    axes: Axes,
    trials: dict[str, dict],
    names: Sequence[str] | None = None,
    default: str | None = None,
    base: float | None = None,
) -> None:
    """A dot a trial, from the top down: sampled accuracy with its interval.

    `default` is the trial with the settings of the headline run, whose dot is a star;
    `base` the accuracy of the base on the same problems, a line.
    """
    names = _on_record(trials, names)
    if not names:
        axes.set_title("(no trials on record)")
        return
    if base is not None:
        axes.axvline(base, color="#444", lw=1.2, ls=":")
        axes.annotate(
            f"base {base:.2f}",
            (base, 0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color="#444",
        )
    for row, name in enumerate(names):
        value, low, high = trials[name]["accuracy"]
        axes.plot([low, high], [row, row], color=COLORS[0], alpha=0.4, lw=3)
        marker = "*" if name == default else "o"
        size = 14 if name == default else 6
        axes.plot(value, row, marker, color=COLORS[0], ms=size)
    labels = [f"{name} (default)" if name == default else name for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=9)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="sampled accuracy, validation")


def draw_trial_prices(
    axes: Axes, trials: dict[str, dict], names: Sequence[str] | None = None
) -> None:
    """A dot a trial: accuracy against KL. Labels stand apart, at the right margin."""
    names = _on_record(trials, names)
    names.sort(key=lambda name: trials[name]["accuracy"][0])
    axes.set(xlabel="KL to the base, nats per answer", ylabel="sampled accuracy")
    for name in names:
        kl = trials[name]["kl"][0]
        accuracy = trials[name]["accuracy"][0]
        axes.plot(kl, accuracy, "o", color=COLORS[0])
    low, high = axes.get_ylim()
    apart = (high - low) / 18
    height = -np.inf  # of the label before
    for name in names:
        kl = trials[name]["kl"][0]
        accuracy = trials[name]["accuracy"][0]
        height = max(accuracy, height + apart)  # never on the label underneath
        axes.annotate(
            name,
            xy=(kl, accuracy),
            xytext=(1.02, height),
            textcoords=("axes fraction", "data"),
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#bbb", "lw": 0.7},
        )
    axes.set_ylim(low, high)


def _on_record(trials: dict[str, dict], names: Sequence[str] | None) -> list[str]:
    """The names that have a trial; None: all that there are."""
    if names is None:
        return list(trials)
    return [name for name in names if name in trials]


def draw_base(axes: Axes, base: dict) -> None:
    """The two lines that every accuracy figure carries.

    Up to `forced to work`, fixing the first token would explain a gain; not beyond.
    """
    forced = base["forced_worked"][0]
    _draw_level(axes, forced, "--", f"base forced to work {forced:.2f}")
    best = base["best_temperature"]["accuracy"][0]
    _draw_level(axes, best, ":", f"base at its best temperature {best:.2f}")


def _draw_level(axes: Axes, height: float, style: str, text: str) -> None:
    """A line across the axes, its text above the right end."""
    axes.axhline(height, color="#444", lw=1.2, ls=style)
    axes.annotate(
        text,
        xy=(1.0, height),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#444",
    )


def draw_styles(axes: Axes, run: dict, x: str, smooth: int = 5) -> None:
    """Shares of the styles, stacked; the run's series hold style_<name>."""
    series = run["series"]
    bands = {}
    for name, color in STYLE_COLORS.items():
        if f"style_{name}" in series:
            bands[name] = (series[f"style_{name}"], color)
    draw_bands(axes, series[x], bands, smooth)
    axes.set(ylabel="share of answers")


def draw_bands(
    axes: Axes,
    x: Sequence[float],
    bands: Mapping[str, tuple[Sequence[float], str]],
    smooth: int = 5,
) -> None:
    """Shares that add up to 1, stacked from below: {name: (shares, color)}. Each band
    carries its name."""
    shares = [smoothed(values, smooth) for values, _ in bands.values()]
    colors = [color for _, color in bands.values()]
    axes.stackplot(x, shares, colors=colors)
    axes.set(ylim=(0, 1))
    axes.margins(x=0)
    axes.grid(False)
    _name_bands(axes, np.asarray(x, dtype=float), list(bands), shares, colors)


def _name_bands(
    axes: Axes,
    x: np.ndarray,
    names: Sequence[str],
    shares: Sequence[np.ndarray],
    colors: Sequence[str],
) -> None:
    """The name of a band where it is thickest; of a thin one beside it, on the right.

    A band that is nowhere a fiftieth has no name: there is nothing to see.
    """
    tops = np.cumsum(shares, axis=0)  # (bands, points)
    near = len(x) // 8  # no name runs over the edges
    beside = -np.inf  # height of the name below
    for name, share, top, color in zip(names, shares, tops, colors, strict=True):
        inner = share[near : len(x) - near] if len(x) > 2 * near else share
        place = int(np.argmax(inner)) + (near if len(x) > 2 * near else 0)
        if share[place] >= 0.1:
            height = top[place] - share[place] / 2
            axes.annotate(
                name,
                (x[place], height),
                ha="center",
                va="center",
                fontweight="bold",
            )
        elif share.max() >= 0.02:
            height = max(top[-1] - share[-1] / 2, beside + 0.07)
            beside = height
            axes.annotate(
                name,
                xy=(1.0, top[-1] - share[-1] / 2),
                xytext=(1.03, height),
                xycoords="axes fraction",
                textcoords="axes fraction",
                va="center",
                fontsize=9,
                color="#444",
                arrowprops={"arrowstyle": "-", "color": color},
                annotation_clip=False,
            )


def smoothed(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average; shorter at the ends, so nothing is shifted or lost."""
    values = np.asarray(values, dtype=float)
    half = window // 2
    means = []
    for middle in range(len(values)):
        first = max(middle - half, 0)
        means.append(values[first : middle + half + 1].mean())
    return np.array(means)
