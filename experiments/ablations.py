"""Train and evaluate several presets and seeds under the same budget, and put them in one table (paper, Table II).

    python experiments/ablations.py --seeds 0 1 2

    python experiments/ablations.py --presets paper no_clip single_step single_critic no_ratio

Every run is a process of its own; finished ones are not repeated and interrupted ones go on where they stopped.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from evaluate import Args as Evaluation
from evaluate import read_constant
from rich.console import Console
from rich.table import Table

from fpo_jax import checkpoint
from fpo_jax.config import preset
from fpo_jax.types import FpoError

HERE = Path(__file__).parent
VERDICTS = ("non-finite", "collapsed", "every simulation broke")  # of fpo_jax.health, not of simulators that were lost


@dataclass(frozen=True)
class Args:
    env: str = "aloha_transfer_cube"
    """Environment."""
    presets: tuple[str, ...] = ("default",)
    """Presets of fpo_jax.config to compare."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    iterations: int | None = None
    """Budget of each run; by default the preset's."""
    episodes: int = 512
    """Paired evaluation episodes of each run."""
    constant: Path | None = None
    """A steerability.json, to compare with its best constant latent too."""
    out: Path = Path("runs/ablations")
    """Directory of the runs and of the table."""


def stop_reason(run_dir: Path) -> str | None:
    """Why the run stopped itself, None where it did not: a run that lost its simulators is to be resumed."""
    stopped = run_dir / "stopped.json"
    reason = json.loads(stopped.read_text())["reason"] if stopped.exists() else ""
    return reason if any(verdict in reason for verdict in VERDICTS) else None


def train(name: str, seed: int, run_dir: Path, iterations: int, options: Sequence[str]) -> None:
    """Train one run to its last iteration, or until it stops itself with a reason; `options` are train.py's."""
    if stop_reason(run_dir) or checkpoint.latest_step(run_dir) == iterations:
        return
    command = [sys.executable, str(HERE / "train.py"), "--run-dir", str(run_dir), "--iterations", str(iterations)]
    if (run_dir / "config.json").exists():
        command += ["--resume"]
    else:
        command += ["--preset", name, "--seed", str(seed), *options]
    code = subprocess.run(command, check=False).returncode
    if code and not stop_reason(run_dir):
        raise FpoError(f"Training {run_dir} failed with exit status {code}; its message is above.")


def evaluate(run_dir: Path, episodes: int, constant: Path | None = None, seed: int = Evaluation.seed) -> dict:
    """The paired evaluation of a run's last checkpoint; an earlier one with the same settings is gone on with."""
    target = run_dir / "paired_evaluation.json"
    if target.exists():
        result = json.loads(target.read_text())
        about = result["run"]
        played = result["tuned"]["episodes"] + result["tuned"]["invalid_episodes"]
        found = (about["iteration"], about["evaluation_seed"], played, result.get("constant_latent"))
        if found == (checkpoint.latest_step(run_dir), seed, episodes, read_constant(constant) if constant else None):
            return result
        # The result first: the logs of an interrupted evaluation are of these settings.
        for old in (target, *run_dir.glob(f"{target.stem}.*.jsonl")):
            old.unlink()
    command = [sys.executable, str(HERE / "evaluate.py"), "--run-dir", str(run_dir), "--seed", str(seed)]
    command += ["--episodes", str(episodes), "--json", str(target)]
    command += ["--constant", str(constant)] if constant else []
    if subprocess.run(command, check=False).returncode:
        raise FpoError(f"Evaluating {run_dir} failed; its message is above.")
    return json.loads(target.read_text())


def row(name: str, seed: int, run_dir: Path, result: dict) -> dict:
    """One line of the table."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    tuned, base, difference = result["tuned"], result["base"], result["difference"]
    reached = [r["episodes"] for r in records if _recent(records, r["iteration"]) >= 0.8]
    return {
        "preset": name,
        "seed": seed,
        "episodes": records[-1]["episodes"],
        "minutes": sum(r["iteration_seconds"] for r in records) / 60,
        "base": base["success_rate"],
        "tuned": [tuned["success_rate"], tuned["low"], tuned["high"]],
        "difference": [difference["success_rate"], difference["low"], difference["high"]],
        "above_constant": result.get("floors", {}).get("constant_latent", {}).get("tuned_above"),
        "episodes_to_80": reached[0] if reached else None,
        "stopped": stop_reason(run_dir),
    }


def _recent(records: list[dict], iteration: int, window: int = 5) -> float:
    """Mean success rate of the `window` iterations up to `iteration`; 0 where there are fewer."""
    part = [r for r in records if iteration - window < r["iteration"] <= iteration and r["success_rate"] is not None]
    return float(np.mean([r["success_rate"] for r in part])) if len(part) == window else 0.0


def show(rows: list[dict], episodes: int) -> Table:
    table = Table(title=f"tuned against base, {episodes} paired episodes each, 95 % intervals")
    for column in ("preset", "seed", "episodes", "minutes", "base", "tuned", "tuned - base", "episodes to 80 %"):
        table.add_column(column, no_wrap=True)
    for r in rows:
        tuned, difference = r["tuned"], r["difference"]
        table.add_row(
            r["preset"] + (" (stopped itself)" if r["stopped"] else ""),
            str(r["seed"]),
            str(r["episodes"]),
            f"{r['minutes']:.1f}",
            f"{r['base']:.3f}",
            f"{tuned[0]:.3f} [{tuned[1]:.3f}, {tuned[2]:.3f}]",
            f"{difference[0]:+.3f} [{difference[1]:+.3f}, {difference[2]:+.3f}]",
            str(r["episodes_to_80"] or "-"),
        )
    return table


def main(args: Args) -> int:
    rows = []
    try:
        for name in args.presets:
            for seed in args.seeds:
                run_dir = args.out / f"{name}-s{seed}"
                iterations = args.iterations or preset(name).iterations
                train(name, seed, run_dir, iterations, ("--env", args.env, "--evaluation.episodes", "0"))
                rows.append(row(name, seed, run_dir, evaluate(run_dir, args.episodes, args.constant)))
                (args.out / "table.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    except FpoError as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    Console().print(show(rows, args.episodes))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
