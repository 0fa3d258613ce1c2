"""Draw a run: success, return and episode length against episodes (the paper's Fig. 3), and a film strip (Fig. 6).

python experiments/curves.py --runs runs/aloha_transfer_cube-default-s0 runs/aloha_transfer_cube-default-s1 --film

python experiments/curves.py --env libero_10/0 --base pi05_libero --checkpoint ... --num-envs 8   # trains one first

Without --runs, all other options are train.py's.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import train as train_script
import tyro
from rich.console import Console

from fpo_jax.analysis import PANELS, check_figure_path, read_curves, training_curves
from fpo_jax.config import TrainConfig, differences
from fpo_jax.evaluate import Evaluator
from fpo_jax.fit import fit
from fpo_jax.runs import FREE_TO_CHANGE, load_run, read_config
from fpo_jax.types import FpoError
from fpo_jax.video import record_film_strip, take_both, telling_episodes

# In which runs of one figure may differ.
FREE = ("seed", "evaluation.", "libero.test_inits", "libero.seeds", *FREE_TO_CHANGE)
EVALUATIONS = ("evaluation.json", "paired_evaluation.json")  # of train.py, of ablations.py


@dataclass(frozen=True)
class Args:
    runs: tuple[Path, ...] = ()
    """Directories that train.py wrote: one, or several seeds of one configuration."""
    out: Path | None = None
    """Figure to write (.png, .svg or .pdf); by default curves.png in the first run's directory."""
    film: bool = False
    """Also draw one initial state before and after training, in <out>_film: the first that the base fails and the tuned
    policy solves, played again."""
    episode: int | None = None
    """Which episode of the first run's evaluation the film shows, if not one that is looked for."""
    search: int = 64
    """Episodes of the evaluation among which one is looked for."""
    frames: int = 6
    """Pictures of each policy."""
    base_checkpoint: str | None = None
    """Where the weights of an openpi base lie now; by default where they lay when the run began."""


def parse(arguments: list[str]) -> tuple[Args, TrainConfig | None]:
    """(what to draw, what to train before). Raises FpoError."""
    args, rest = tyro.cli(Args, args=arguments, description=__doc__, return_unknown_args=True)
    if args.runs and rest:
        raise FpoError(f"{rest[0]} is none of this script's options, and what trains a run is given without --runs.")
    if not args.runs and not rest:
        raise FpoError("There is nothing to draw: give --runs, or the run to train by train.py's options, as --env.")
    if args.frames < 2 or args.search < 1 or (args.episode or 0) < 0:
        raise FpoError("--frames must be at least 2, --search at least 1 and --episode at least 0.")
    config = train_script.parse(rest) if rest else None
    runs = args.runs if config is None else (Path(config.run_dir or ""),)
    out = check_figure_path(args.out or runs[0] / "curves.png")
    return replace(args, runs=runs, out=out), config


def same_configuration(runs: tuple[Path, ...]) -> list[TrainConfig]:
    """The configuration of each run. Raises FpoError where they differ in more than seed and length."""
    configs = [read_config(run) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        if changed := [text for text in differences(configs[0], config) if not text.startswith(FREE)]:
            raise FpoError(f"{run} is no other seed of {runs[0]}: {'; '.join(changed)}. Draw them in two figures.")
    return configs


def base_values(runs: tuple[Path, ...]) -> dict[str, float]:
    """What the runs' own evaluations say of their base, by the names of `PANELS`; {} where there is none."""
    found = [run / name for run in runs for name in EVALUATIONS if (run / name).exists()]
    bases = [json.loads(path.read_text())["base"] for path in found]
    known = [name for name in PANELS if bases and all(name in base for base in bases)]
    return {name: float(np.mean([base[name] for base in bases])) for name in known}


def draw_curves(args: Args, configs: list[TrainConfig]) -> Path:
    """Fig. 3."""
    assert args.out is not None
    runs = [read_curves(run / "metrics.jsonl") for run in args.runs]
    seeds = ", ".join(str(config.seed) for config in configs)
    base = f", base {Path(configs[0].base).name}" if configs[0].base else ""
    title = f"{configs[0].env}{base}, preset {configs[0].preset}, seed{'s' if len(configs) > 1 else ''} {seeds}"
    return training_curves(runs, args.out, base=base_values(args.runs), title=title)


def draw_film(args: Args, console: Console) -> Path:
    """Fig. 6, of the first run."""
    assert args.out is not None
    config, system, base, state = load_run(args.runs[0], base_checkpoint=args.base_checkpoint)
    episodes = max(args.search, (args.episode or 0) + 1)
    evaluator = Evaluator(system, base, episodes, config.evaluation.seed, batch=config.num_envs)
    if args.episode is None:
        console.print(f"Looking for an initial state among {episodes} that the base fails and the tuned policy solves.")
        chosen = telling_episodes(evaluator.play_base(), evaluator.play(state.agent))
        if not chosen:
            console.print("There is none, so the film shows episode 0.")
    else:
        chosen = [args.episode]
    takes = take_both(evaluator, state.agent, chosen or [0])
    path = args.out.with_stem(f"{args.out.stem}_film")
    record_film_strip(evaluator, takes, path, args.frames)
    base_did, tuned_did = ("solves" if take.success else "fails" for take in takes)
    console.print(f"Episode {takes[0].episode}: the base {base_did} it, the tuned policy {tuned_did} it.")
    return path


def main(arguments: list[str]) -> int:
    console = Console(highlight=False, soft_wrap=True)
    try:
        args, config = parse(arguments)
        if config is not None:
            fit(config, console)
        console.print(f"Curves: {draw_curves(args, same_configuration(args.runs))}", markup=False)
        if args.film:
            console.print(f"Film: {draw_film(args, console)}", markup=False)
    except (FpoError, OSError) as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
