"""The paper's Table II on its own task: the full method and each ablation under one budget, beside what it published.

    python experiments/table2_ablations.py --out runs/table2

LIBERO's butter task, from the shipped state-based base (the paper's is π0 on pictures). Every run is a process of its
own; finished ones are not repeated, interrupted ones go on where they stopped, and the table holds all that is finished
in --out.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from ablations import evaluate, row, stop_reason, train
from rich.console import Console

from fpo_jax import checkpoint
from fpo_jax.config import LIBERO_BUTTER
from fpo_jax.metrics import wilson_interval
from fpo_jax.runs import read_config
from fpo_jax.types import FpoError

# preset -> (the paper's name, success that it published [%])
PUBLISHED = {
    LIBERO_BUTTER.preset: ("FPO (complete)", 78.5),
    "no_ratio": ("without CFM ratio proxy", 32.4),
    "no_clip": ("without PPO clipping", 45.1),
    "single_step": ("single-step integration (K = 1)", 61.7),
    "single_critic": ("single critic (without ensemble)", 71.2),
    "paper": ("(our literal reading of the paper)", None),
}


@dataclass(frozen=True)
class Args:
    presets: tuple[str, ...] = tuple(PUBLISHED)
    """What is trained, in this order."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds of the ablations."""
    full_seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds of the full method."""
    iterations: int = LIBERO_BUTTER.iterations
    """Budget of every run."""
    episodes: int = LIBERO_BUTTER.evaluation.episodes
    """Paired evaluation episodes of each run, over the official initial states."""
    train: bool = True
    """Train what is missing; otherwise only what is finished is tabulated."""
    out: Path = Path("runs/table2")
    """Directory of the runs, of table2.md and of table2.json."""


def options(args: Args, name: str) -> list[str]:
    """What a run of this preset is told besides: the task, and how episodes are gathered, as for the full method."""
    told = ["--evaluation.episodes", str(args.episodes), "--evaluation.no-video"]
    if name != LIBERO_BUTTER.preset:
        for option in ("env", "base", "num_envs", "episode_length", "execute_steps"):
            told += [f"--{option.replace('_', '-')}", str(getattr(LIBERO_BUTTER, option))]
        told += ["--rollout.decisions", str(LIBERO_BUTTER.rollout.decisions)]
    return told


def result_of(run_dir: Path, episodes: int) -> dict:
    """A run's own evaluation, or one made now where it stopped itself before it."""
    own = run_dir / "evaluation.json"
    if own.exists():
        return json.loads(own.read_text())
    return evaluate(run_dir, episodes, seed=read_config(run_dir).evaluation.seed)


def finished(out: Path) -> list[tuple[str, int, Path]]:
    """(preset, seed, directory) of every run there that came to its last iteration, or stopped itself."""
    names = {path.name: path for path in out.glob("*-s*")}
    seeds = {name: re.fullmatch(r"(.+)-s(\d+)", name) for name in names}
    runs = [(m[1], int(m[2]), names[name]) for name, m in seeds.items() if m and m[1] in PUBLISHED]
    runs.sort(key=lambda run: (list(PUBLISHED).index(run[0]), run[1]))
    return [run for run in runs if is_finished(run[2])]


def is_finished(run_dir: Path) -> bool:
    if stop_reason(run_dir) or (run_dir / "evaluation.json").exists():
        return True
    begun = (run_dir / "config.json").exists()
    return begun and checkpoint.latest_step(run_dir) == read_config(run_dir).iterations


def tabulate(args: Args) -> list[dict]:
    """Write the table of all that is finished; returns its lines. Raises FpoError."""
    rows = []
    for name, seed, run_dir in finished(args.out):
        result = result_of(run_dir, args.episodes)
        rows.append(row(name, seed, run_dir, result) | {"valid": result["tuned"]["episodes"]})
    lines = summary(rows)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table2.json").write_text(json.dumps({"rows": lines, "runs": rows}, indent=2) + "\n")
    (args.out / "table2.md").write_text(markdown(lines))
    return lines


def summary(rows: list[dict]) -> list[dict]:
    """One line per preset: the episodes of its seeds together, with Wilson's interval."""
    lines = []
    for name, (title, published) in PUBLISHED.items():
        runs = [r for r in rows if r["preset"] == name]
        if not runs:
            continue
        valid = sum(r["valid"] for r in runs)
        interval = wilson_interval(round(sum(r["tuned"][0] * r["valid"] for r in runs)), valid)
        lines.append(
            {
                "preset": name,
                "paper_row": title,
                "published": published,
                "seeds": [r["seed"] for r in runs],
                "success": interval._asdict(),
                "per seed": [r["tuned"][0] for r in runs],
                "base": [r["base"] for r in runs],
                "training episodes": [r["episodes"] for r in runs],
                "stopped": [r["stopped"] for r in runs],
            }
        )
    return lines


def markdown(lines: list[dict]) -> str:
    """The table. Published values are of another base and budget: they stand beside ours, not against them."""
    text = [
        "| paper's row (preset) | seeds | training episodes | base | tuned, % [95 %] | published, % |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        low, high, mean = (100 * line["success"][name] for name in ("low", "high", "estimate"))
        title, stopped = line["paper_row"], " (stopped itself)" if any(line["stopped"]) else ""
        episodes = sum(line["training episodes"]) / len(line["seeds"])
        base = 100 * sum(line["base"]) / len(line["seeds"])
        published = "-" if line["published"] is None else f"{line['published']:.1f}"
        text.append(
            f"| {title} (`{line['preset']}`){stopped} | {len(line['seeds'])} | {episodes:.0f} | {base:.1f} | "
            f"{mean:.1f} [{low:.1f}, {high:.1f}] | {published} |"
        )
    return "\n".join(text) + "\n"


def main(args: Args) -> int:
    try:
        for name in args.presets:
            if name not in PUBLISHED:
                raise FpoError(f"Table II has no row for the preset {name!r}; it has {', '.join(PUBLISHED)}.")
        runs = [(n, s) for n in args.presets for s in (args.full_seeds if n == LIBERO_BUTTER.preset else args.seeds)]
        for name, seed in runs if args.train else ():
            run_dir = args.out / f"{name}-s{seed}"
            train(name, seed, run_dir, args.iterations, options(args, name))
            tabulate(args)
        lines = tabulate(args)
    except FpoError as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    print(markdown(lines), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
