"""Figures and videos of finished runs. Matplotlib and ffmpeg are imported where they are used, without a display."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from fpo_jax.metrics import Interval, read_jsonl, wilson_interval
from fpo_jax.types import FpoError


def learning_curve_png(metrics_path: str | Path, path: str | Path, *, base: Interval | None = None) -> Path:
    """Draw success rate against training episodes from a run's `metrics.jsonl`; returns `path`.

    Each iteration is a point. The line is the mean over a window of about a tenth of the run, weighted by the
    episodes that ended in each iteration, with the Wilson 95 % interval of that window as a band; so it lags behind
    the policy by half a window. `base` adds the base policy's own rate as a horizontal line and band.

    Raises FpoError where the file is missing or has no `success_rate` yet.
    """
    records = [r for r in read_jsonl(metrics_path) if r.get("success_rate") is not None and "episodes" in r]
    if not records:
        raise FpoError(f"{metrics_path} has no finished episode yet, so there is no learning curve to draw.")
    episodes = np.array([r["episodes"] for r in records], float)
    rate = np.array([r["success_rate"] for r in records], float)
    smooth = smoothed_success(episodes, rate)

    figure, axes = _figure(6.4, 4.0)
    axes.plot(episodes, rate, ".", color="tab:blue", alpha=0.3, markersize=4, label="one iteration")
    axes.plot(episodes, smooth[:, 0], color="tab:blue", label="moving mean, Wilson 95 %")
    axes.fill_between(episodes, smooth[:, 1], smooth[:, 2], color="tab:blue", alpha=0.15, linewidth=0)
    if base is not None:
        axes.axhline(base.estimate, color="tab:gray", linestyle="--", label=f"base policy ({base.estimate:.2f})")
        axes.axhspan(base.low, base.high, color="tab:gray", alpha=0.12, linewidth=0)
    axes.set(xlabel="training episodes", ylabel="success rate", ylim=(-0.02, 1.02), xlim=(0, None))
    axes.legend(loc="best", frameon=False)
    return _save(figure, path)


def smoothed_success(
    episodes: Float[np.ndarray, " k"], rate: Float[np.ndarray, " k"], window: int | None = None
) -> Float[np.ndarray, "k 3"]:
    """Moving success rate with its Wilson limits: columns estimate, low, high, over the `window` iterations up to each.

    `episodes` counts since the start of the run; iteration i ended episodes[i] - episodes[i-1] of them. Default window:
    a tenth of the run, at least 5 iterations.
    """
    ended = np.diff(episodes, prepend=0.0)
    window = window or max(5, len(rate) // 10)
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
    figure, (left, right) = _figure(9.0, 3.6, columns=2)
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
    return _save(figure, path)


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


def _figure(width: float, height: float, *, columns: int = 1) -> tuple[Any, Any]:
    """A figure of width x height [inch]; without pyplot, so that no display and no global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
