"""What came of a sweep, read from the run directories of its trials: table and figures.

`<sweep>/trials/<name>/` is an ordinary run directory with two files more: `trial.json` (the settings, and how the trial
ended where the run itself cannot know) and `trial.log` (what `train.py` printed).
"""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from fpo_jax.analysis import new_figure, save_figure, smoothed_success
from fpo_jax.metrics import Interval, read_jsonl
from fpo_jax.sweeps import Parameter, Settings, Space, trial_name
from fpo_jax.types import FpoError

WINDOW = 5  # iterations whose episodes are pooled for the success of a moment


class Curve(NamedTuple):
    """Training success of a run, per iteration in which an episode had ended."""

    episodes: Float[np.ndarray, " k"]
    minutes: Float[np.ndarray, " k"]  # wall clock of training so far, compilation included
    success: Float[np.ndarray, "k 3"]  # with its Wilson limits, over the last WINDOW iterations


class Trial(NamedTuple):
    """One trial as it stands on disk."""

    name: str
    settings: Settings
    outcome: str  # finished | stopped early (by the scheduler) | stopped itself | failed | unfinished | not started
    reason: str | None
    curve: Curve | None
    evaluation: dict[str, Any] | None  # evaluation.json

    @property
    def success(self) -> Interval:
        """Of the paired evaluation at the end, or where there is none that of the last training iterations."""
        if self.evaluation:
            return Interval(*(self.evaluation["tuned"][key] for key in ("success_rate", "low", "high")))
        return Interval(*self.curve.success[-1]) if self.curve else Interval(math.nan, 0.0, 1.0)

    @property
    def episodes_to_80(self) -> int | None:
        """Training episodes until WINDOW iterations together reach a success rate of .80."""
        if self.curve is None:
            return None
        reached = np.flatnonzero(self.curve.success[WINDOW - 1 :, 0] >= 0.8)
        return int(self.curve.episodes[WINDOW - 1 + reached[0]]) if len(reached) else None


# --- reading --------------------------------------------------------------------------------------------------------


def register(sweep_dir: Path, settings: Settings) -> Path:
    """The run directory of a trial, made with its `trial.json` where it was not there."""
    run_dir = sweep_dir / "trials" / trial_name(settings)
    if not (run_dir / "trial.json").exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        note(run_dir, settings=settings)
    return run_dir


def note(run_dir: Path, **entries: Any) -> None:
    """Add entries to a trial's `trial.json`."""
    path = run_dir / "trial.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(known | entries, indent=2) + "\n")
    partial.replace(path)


def read_trials(sweep_dir: Path) -> list[Trial]:
    """Every trial of a sweep, best first. Raises FpoError where there is none."""
    paths = sorted((sweep_dir / "trials").glob("*/trial.json"))
    if not paths:
        raise FpoError(f"{sweep_dir} holds no trials; run the sweep or its jobs first.")
    trials = [read_trial(path.parent) for path in paths]
    return sorted(trials, key=lambda t: -t.success.estimate if t.curve else 1.0)


def read_trial(run_dir: Path) -> Trial:
    """One trial, from its run directory."""
    about = json.loads((run_dir / "trial.json").read_text())
    evaluation = _json(run_dir / "evaluation.json")
    outcome, reason = _outcome(run_dir, about, evaluation)
    return Trial(run_dir.name, about["settings"], outcome, reason, read_curve(run_dir), evaluation)


def _outcome(run_dir: Path, about: dict[str, Any], evaluation: Any) -> tuple[str, str | None]:
    if evaluation or _trained_without_evaluation(run_dir):
        return "finished", None
    if stopped := _json(run_dir / "stopped.json"):
        return "stopped itself", stopped["reason"]
    if "outcome" in about:
        return about["outcome"], about.get("reason")
    if last := last_words(run_dir / "trial.log"):
        return "failed", last
    return ("unfinished" if (run_dir / "config.json").exists() else "not started"), None


def _trained_without_evaluation(run_dir: Path) -> bool:
    config = _json(run_dir / "config.json")
    metrics = run_dir / "metrics.jsonl"
    if config is None or config["evaluation"]["episodes"] or not metrics.exists():
        return False
    records = read_jsonl(metrics)
    return bool(records) and records[-1]["iteration"] >= config["iterations"]


def last_words(log: Path) -> str | None:
    """The error with which a run's log ends, or None."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].removeprefix("Error: ") if lines and lines[-1].startswith("Error: ") else None


def read_curve(run_dir: Path) -> Curve | None:
    """Training success so far, or None where no episode has ended yet."""
    if not (run_dir / "metrics.jsonl").exists():
        return None
    records = read_jsonl(run_dir / "metrics.jsonl")
    seconds = np.cumsum([r["iteration_seconds"] for r in records])
    ended = [i for i, r in enumerate(records) if r["success_rate"] is not None]
    if not ended:
        return None
    episodes = np.array([records[i]["episodes"] for i in ended], float)
    rates = np.array([records[i]["success_rate"] for i in ended], float)
    return Curve(episodes, seconds[ended] / 60, smoothed_success(episodes, rates, WINDOW))


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


# --- tables ---------------------------------------------------------------------------------------------------------


def row(trial: Trial) -> dict[str, Any]:
    """A trial as plain values."""
    difference = trial.evaluation["difference"] if trial.evaluation else None
    curve = trial.curve
    return {
        "trial": trial.name,
        "outcome": trial.outcome,
        "reason": trial.reason,
        "settings": trial.settings,
        "success": list(trial.success) if curve else None,
        "evaluated_episodes": trial.evaluation["tuned"]["episodes"] if trial.evaluation else None,
        "tuned_minus_base": [difference[k] for k in ("success_rate", "low", "high")] if difference else None,
        "episodes": int(curve.episodes[-1]) if curve else 0,
        "episodes_to_80": trial.episodes_to_80,
        "minutes": float(curve.minutes[-1]) if curve else 0.0,
    }


def in_words(trial: Trial) -> str:
    """A trial in one line."""
    success = "success {:.3f} [{:.3f}, {:.3f}]".format(*trial.success) if trial.curve else "no episode"
    reason = f" ({trial.reason})" if trial.reason else ""
    settings = ", ".join(f"{name} {value}" for name, value in trial.settings.items())
    return f"{trial.name}: {trial.outcome}{reason}, {success}; {settings}"


def markdown(trials: Sequence[Trial], space: Space) -> str:
    """The trials as a table, best first."""
    names = [parameter.name for parameter in space.parameters]
    head = ["trial", *names, "success", "episodes", "until 80 %", "minutes", "outcome"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for trial in trials:
        r = row(trial)
        success = "–" if r["success"] is None else "{:.3f} [{:.3f}, {:.3f}]".format(*r["success"])
        cells = [
            r["trial"],
            *(str(trial.settings.get(name, "–")) for name in names),
            success + ("" if trial.evaluation or not trial.curve else " ¹"),
            str(r["episodes"]),
            str(r["episodes_to_80"] or "–"),
            f"{r['minutes']:.1f}",
            trial.outcome + (f": {trial.reason}" if trial.reason else ""),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    notes = f"¹ Of the last {WINDOW} training iterations; the others by the evaluation at the end. Wilson 95 %."
    return "\n".join([*lines, "", notes, ""])


def write_report(sweep_dir: Path, space: Space) -> list[Trial]:
    """Write results.md, .json and .csv, and figures of the trials that began; returns the trials, best first."""
    trials = read_trials(sweep_dir)
    rows = [row(trial) for trial in trials]
    (sweep_dir / "results.md").write_text(markdown(trials, space))
    (sweep_dir / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    names = [parameter.name for parameter in space.parameters]
    with (sweep_dir / "results.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        plain = ["episodes", "episodes_to_80", "minutes", "outcome", "reason"]
        writer.writerow(["trial", *names, "success", "success_low", "success_high", *plain])
        for r in rows:
            settings = [r["settings"].get(name, "") for name in names]
            writer.writerow([r["trial"], *settings, *(r["success"] or ["", "", ""]), *(r[name] for name in plain)])
    if any(trial.curve for trial in trials):
        curves_png(trials, sweep_dir / "curves.png")
        parallel_png(trials, space, sweep_dir / "parallel.png")
    return trials


# --- figures --------------------------------------------------------------------------------------------------------


def curves_png(trials: Sequence[Trial], path: Path) -> Path:
    """Draw training success against episodes and against wall clock, a line per trial; returns `path`."""
    figure, ((left, right),) = new_figure(10.0, 4.0, columns=2)
    colours = _colours(trials)
    for trial in reversed(trials):  # the best on top
        if trial.curve:
            style = {"color": colours(trial), "linewidth": 1.2, "label": f"{trial.name}  {trial.success.estimate:.2f}"}
            left.plot(trial.curve.episodes, trial.curve.success[:, 0], **style)
            right.plot(trial.curve.minutes, trial.curve.success[:, 0], **style)
    left.set(xlabel="training episodes", ylabel=f"success rate, last {WINDOW} iterations", ylim=(-0.02, 1.02))
    right.set(xlabel="wall clock of training [min]", ylim=(-0.02, 1.02))
    handles, labels = right.get_legend_handles_labels()
    right.legend(
        handles[::-1][:16], labels[::-1][:16], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7
    )
    return save_figure(figure, path)


def parallel_png(trials: Sequence[Trial], space: Space, path: Path) -> Path:
    """Draw parallel coordinates: an axis per parameter and one for success, a line per trial; returns `path`."""
    parameters = space.parameters
    figure, ((axes,),) = new_figure(1.7 * (len(parameters) + 1) + 0.6, 3.8)
    colours = _colours(trials)
    for trial in reversed(trials):
        if trial.curve:
            heights = [_height(parameter, trial.settings) for parameter in parameters]
            axes.plot([*heights, trial.success.estimate], color=colours(trial), linewidth=1.2, alpha=0.9)
    ticks = [*map(_ticks, parameters), [(f"{height:g}", height) for height in (0.0, 0.5, 1.0)]]
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    for x, axis in enumerate(ticks):
        axes.axvline(x, color="0.7", linewidth=0.8, zorder=0)
        for value, height in axis:
            axes.text(x + 0.03, height, str(value), fontsize=7, va="center", ha="left", color="0.25", bbox=paper)
    axes.set_xticks(range(len(parameters) + 1), [*(p.name for p in parameters), "success"], fontsize=8)
    axes.set(xlim=(-0.1, len(parameters) + 0.5), ylim=(_ABSENT - 0.05, 1.05), yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)
    return save_figure(figure, path)


_ABSENT = -0.1  # height of a parameter that a trial does not have


def _height(parameter: Parameter, settings: Settings) -> float:
    """Where a value lies on its axis, 0 to 1."""
    if parameter.name not in settings:
        return _ABSENT
    value = settings[parameter.name]
    if parameter.kind == "choice":
        value = tuple(value) if isinstance(value, list) else value
        return parameter.values.index(value) / max(len(parameter.values) - 1, 1)
    scale = math.log if parameter.kind == "loguniform" else float
    low, high = map(scale, parameter.values)
    return (scale(value) - low) / (high - low)


def _ticks(parameter: Parameter) -> list[tuple[Any, float]]:
    ticks = [(value, _height(parameter, {parameter.name: value})) for value in parameter.values]
    return [*ticks, ("–", _ABSENT)] if parameter.when else ticks


def _colours(trials: Sequence[Trial]) -> Any:
    """A colour for each trial by its success, over the range that the sweep reached."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    reached = [trial.success.estimate for trial in trials if trial.curve]
    scale = Normalize(min(reached), max(reached) + 1e-6)
    return lambda trial: colormaps["viridis_r"](0.05 + 0.9 * float(scale(trial.success.estimate)))
