"""Figures and videos of finished runs. Matplotlib and ffmpeg are imported where they are used, without a display."""

import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from fpo_jax.metrics import Interval, read_jsonl, wilson_interval
from fpo_jax.types import FpoError

PANELS = {
    "success_rate": "success rate",
    "return": "return (discounted)",
    "episode_length": "episode length [control steps]",
}


class Curves(NamedTuple):
    """What a run's `metrics.jsonl` says of its episodes: one entry per iteration in which some ended."""

    episodes: Float[np.ndarray, " k"]  # since the start of the run
    values: dict[str, Float[np.ndarray, " k"]]  # by the names of `PANELS`: means over the iteration's episodes


def read_curves(metrics_path: str | Path) -> Curves:
    """A run's curves. Raises FpoError where the file is missing or has no finished episode yet."""
    records = [r for r in read_jsonl(metrics_path) if r.get("success_rate") is not None and "episodes" in r]
    if not records:
        raise FpoError(f"{metrics_path} has no finished episode yet, so there is no learning curve to draw.")
    names = [name for name in PANELS if name in records[0]]
    values = {name: np.array([r[name] for r in records], float) for name in names}
    return Curves(np.array([r["episodes"] for r in records], float), values)


def learning_curve_png(metrics_path: str | Path, path: str | Path, *, base: Interval | None = None) -> Path:
    """Draw success rate against training episodes from a run's `metrics.jsonl`; returns `path`.

    Each iteration is a point. The line is the mean over a window of about a tenth of the run, weighted by the
    episodes that ended in each iteration, with the Wilson 95 % interval of that window as a band; so it lags behind
    the policy by half a window. `base` adds the base policy's own rate as a horizontal line and band.

    Raises FpoError where the file is missing or has no `success_rate` yet.
    """
    run = read_curves(metrics_path)
    figure, grid = new_figure(6.4, 4.0)
    axes = grid[0, 0]
    _draw_run(axes, run, "success_rate", default_window(run))
    if base is not None:
        axes.axhline(base.estimate, color="tab:gray", linestyle="--", label=f"base policy ({base.estimate:.2f})")
        axes.axhspan(base.low, base.high, color="tab:gray", alpha=0.12, linewidth=0)
    axes.set(xlabel="training episodes", ylabel="success rate", ylim=(-0.02, 1.02), xlim=(0, None))
    axes.legend(loc="best", frameon=False)
    return save_figure(figure, path)


def training_curves(
    runs: Sequence[Curves], path: str | Path, *, base: Mapping[str, float] | None = None, title: str = ""
) -> Path:
    """Draw success, return and episode length against training episodes (the paper's Fig. 3); returns `path`.

    Moving means over a tenth of a run as in `learning_curve_png`. One run: its iterations as points, and the Wilson
    95 % interval of the success. Several (seeds): each as a thin line, their mean, and a band from the lowest to the
    highest, as far as all have come. `base`: the base policy's own values, by the names of `PANELS`.
    """
    window = default_window(min(runs, key=lambda run: len(run.episodes)))
    figure, grid = new_figure(10.5, 3.4, columns=len(PANELS))
    for axes, (name, label) in zip(grid[0], PANELS.items(), strict=True):
        if len(runs) == 1:
            _draw_run(axes, runs[0], name, window)
        else:
            _draw_seeds(axes, runs, name, window)
        if base and name in base:
            axes.axhline(base[name], color="tab:gray", linestyle="--", label=f"base policy ({base[name]:.3g})")
        limits = (-0.02, 1.02) if name == "success_rate" else None
        axes.set(xlabel="training episodes", ylabel=label, xlim=(0, None), ylim=limits)
        axes.legend(loc="best", frameon=False, fontsize="small")
    ended = np.mean([run.episodes[-1] / len(run.episodes) for run in runs])
    total = " / ".join(f"{run.episodes[-1]:.0f}" for run in runs)
    said = f"moving mean over the last {window} iterations (about {window * ended:.0f} episodes); {total} episodes"
    figure.suptitle("\n".join(filter(None, (title, said))), fontsize="medium")
    return save_figure(figure, path)


def _draw_run(axes: Any, run: Curves, name: str, window: int) -> None:
    axes.plot(run.episodes, run.values[name], ".", color="tab:blue", alpha=0.3, markersize=4, label="one iteration")
    if name == "success_rate":
        smooth = smoothed_success(run.episodes, run.values[name], window)
        axes.plot(run.episodes, smooth[:, 0], color="tab:blue", label="moving mean, Wilson 95 %")
        axes.fill_between(run.episodes, smooth[:, 1], smooth[:, 2], color="tab:blue", alpha=0.15, linewidth=0)
    else:
        axes.plot(run.episodes, moving_mean(run.episodes, run.values[name], window), color="tab:blue", label="mean")


def _draw_seeds(axes: Any, runs: Sequence[Curves], name: str, window: int) -> None:
    lines = [moving_mean(run.episodes, run.values[name], window) for run in runs]
    first, last = max(run.episodes[0] for run in runs), min(run.episodes[-1] for run in runs)
    grid = np.linspace(first, max(first, last), 200)
    common = np.stack([np.interp(grid, run.episodes, line) for run, line in zip(runs, lines, strict=True)])
    for run, line in zip(runs, lines, strict=True):
        axes.plot(run.episodes, line, color="tab:blue", alpha=0.35, linewidth=0.8)
    axes.plot(grid, common.mean(0), color="tab:blue", label=f"mean of {len(runs)} seeds")
    axes.fill_between(grid, common.min(0), common.max(0), color="tab:blue", alpha=0.15, linewidth=0, label="range")


def default_window(run: Curves) -> int:
    """A tenth of the run, at least 5 iterations where there are so many."""
    return min(max(5, len(run.episodes) // 10), len(run.episodes))


def moving_mean(
    episodes: Float[np.ndarray, " k"], values: Float[np.ndarray, " k"], window: int
) -> Float[np.ndarray, " k"]:
    """Mean over the episodes of the `window` iterations up to each; episodes and values as in `Curves`."""
    ended = np.diff(episodes, prepend=0.0)
    parts = [slice(max(0, i + 1 - window), i + 1) for i in range(len(values))]
    return np.array([ended[part] @ values[part] / ended[part].sum() for part in parts], float)


def smoothed_success(
    episodes: Float[np.ndarray, " k"], rate: Float[np.ndarray, " k"], window: int
) -> Float[np.ndarray, "k 3"]:
    """Moving success rate with its Wilson limits: columns estimate, low, high, over the `window` iterations up to each.

    `episodes` counts since the start of the run; iteration i ended episodes[i] - episodes[i-1] of them.
    """
    ended = np.diff(episodes, prepend=0.0)
    rows = []
    for i in range(len(rate)):
        part = slice(max(0, i + 1 - window), i + 1)
        total = round(float(ended[part].sum()))
        rows.append(wilson_interval(min(round(float(ended[part] @ rate[part])), total), total))
    return np.array(rows, float).reshape(-1, 3)


def steerability_png(
    rates: Mapping[str, Interval], state_rates: Float[np.ndarray, " states"], path: str | Path
) -> Path:
    """Draw how far noise steers a base policy; returns `path`.

    Left: a bar with its interval for each entry of `rates` (base, zero noise, best constant latent, ...). Right: the
    histogram of the base's success rate per initial state over noise draws: all mass at 0 and 1 means that noise
    decides nothing.
    """
    figure, grid = new_figure(9.0, 3.6, columns=2)
    left, right = grid[0]
    names = list(rates)
    estimates = np.array([rates[name].estimate for name in names])
    low = np.array([rates[name].low for name in names])
    high = np.array([rates[name].high for name in names])
    errors = np.clip(np.stack([estimates - low, high - estimates]), 0, None)  # rounding may put a limit 1e-17 inside
    left.barh(names, estimates, xerr=errors, color="tab:blue", alpha=0.7, capsize=3)
    left.invert_yaxis()
    left.set(xlabel="success rate (bars: 95 % interval)", xlim=(0, 1))
    right.hist(state_rates, bins=np.linspace(0, 1, 11), color="tab:blue", alpha=0.7, edgecolor="white")
    right.set(xlabel="success rate of one initial state over noise draws", ylabel="initial states", xlim=(0, 1))
    return save_figure(figure, path)


class Span(NamedTuple):
    """Somebody at work, for `timeline`."""

    who: str
    group: str  # for whom, or of which: its colour
    begin: float  # [s]
    end: float


def timeline(panels: Mapping[str, Sequence[Span]], path: str | Path, *, title: str = "") -> Path:
    """Draw who worked when, a panel for each entry by its name, all on one scale of time; returns `path`."""
    from matplotlib.patches import Patch

    longest = max(span.end for spans in panels.values() for span in spans)
    groups = list(dict.fromkeys(span.group for spans in panels.values() for span in spans))
    figure, grid = new_figure(9.0, 1.9 * len(panels) + 0.7, rows=len(panels))
    for axes, (name, spans) in zip(grid[:, 0], panels.items(), strict=True):
        rows = list(dict.fromkeys(span.who for span in spans))
        for number, group in enumerate(groups):
            mine = [span for span in spans if span.group == group]
            heights, begins = [rows.index(span.who) for span in mine], [span.begin for span in mine]
            lengths = [span.end - span.begin for span in mine]
            axes.barh(heights, lengths, left=begins, color=f"C{number}", height=0.7, edgecolor="white")
        axes.set(xlim=(0, longest), yticks=range(len(rows)), yticklabels=rows)
        axes.set_title(name, loc="left", fontsize="medium")
        axes.invert_yaxis()
    grid[-1, 0].set_xlabel("seconds")
    colors = [Patch(color=f"C{number}") for number in range(len(groups))]
    figure.legend(colors, groups, loc="outside lower center", ncols=len(groups), frameon=False)
    figure.suptitle(title, fontsize="medium")
    return save_figure(figure, path)


class FilmRow(NamedTuple):
    """An episode for `film_strip`."""

    name: str
    frames: UInt8[np.ndarray, "k y x 3"]
    steps: Sequence[int]  # control steps before each frame; the last frame is the episode's end
    success: bool


def film_strip(rows: Sequence[FilmRow], path: str | Path, *, title: str = "") -> Path:
    """Draw episodes as rows of frames, with step and outcome written on them (the paper's Fig. 6); returns `path`."""
    columns, (y, x) = len(rows[0].steps), rows[0].frames.shape[1:3]
    title = textwrap.fill(title, 22 * columns)
    height = (1.9 * y / x + 0.02) * len(rows) + 0.15 + 0.17 * len(title.splitlines())
    figure, grid = new_figure(1.9 * columns, height, rows=len(rows), columns=columns)
    for line, row in zip(grid, rows, strict=True):
        color, outcome = ("tab:green", "success") if row.success else ("tab:red", "failure")
        for axes, frame, step in zip(line, row.frames, row.steps, strict=True):
            axes.imshow(frame)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            last = axes is line[-1]
            text = {"s": f"step {step}: {outcome}", "color": color} if last else {"s": f"step {step}"}
            axes.text(0.03, 0.04, transform=axes.transAxes, fontsize="small", bbox=_PAPER, **text)
        line[0].set_ylabel(row.name)
        line[-1].spines[:].set(visible=True, color=color, linewidth=3)
    figure.suptitle(title, fontsize="medium")
    return save_figure(figure, path)


_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 2}  # behind words on a picture


def side_by_side_video(
    base_frames: UInt8[np.ndarray, "t0 y x 3"],
    tuned_frames: UInt8[np.ndarray, "t1 y x 3"],
    path: str | Path,
    *,
    fps: float = 50.0,
    labels: Sequence[str] = ("base", "tuned"),
) -> Path:
    """Write an MP4 of two episodes next to each other, the shorter one holding its last frame; returns `path`.

    Raises FpoError where ffmpeg is missing or fails.
    """
    try:
        import imageio_ffmpeg
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise FpoError('Videos need ffmpeg: pip install "fpo_jax[video]".') from error

    length = max(len(base_frames), len(tuned_frames))
    sides = []
    for frames, label in zip((base_frames, tuned_frames), labels, strict=True):
        width = frames.shape[2]
        title = Image.new("RGB", (width, 20), "white")
        ImageDraw.Draw(title).text((6, 4), label, fill="black")
        held = frames[np.minimum(np.arange(length), len(frames) - 1)]
        bar = np.broadcast_to(np.asarray(title), (length, 20, width, 3))
        sides.append(np.concatenate([bar, held], axis=1))
    video = np.concatenate(sides, axis=2)
    even = video[:, : video.shape[1] // 2 * 2, : video.shape[2] // 2 * 2]  # H.264 halves the colours' resolution
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not through imageio: it forks this process, whose JAX threads do not survive a fork.
    source = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{even.shape[2]}x{even.shape[1]}",
        "-r",
        str(fps),
        "-i",
        "-",
    ]
    codec = ["-c:v", "libx264", "-pix_fmt", "yuv420p"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", *source, *codec, str(path)]
    ffmpeg = subprocess.run(command, input=even.tobytes(), capture_output=True, check=False)
    if ffmpeg.returncode:
        raise FpoError(f"ffmpeg could not write {path}: {ffmpeg.stderr.decode(errors='replace').strip()}")
    return path


def new_figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """(figure of width x height [inch], its axes [rows, columns]); without pyplot: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid


def save_figure(figure: Any, path: str | Path) -> Path:
    path = check_figure_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def check_figure_path(path: str | Path) -> Path:
    """`path` itself. Raises FpoError for a format that figures are not written in."""
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise FpoError(f"{path} is no figure: let its name end in .png, .svg or .pdf.")
    return Path(path)
