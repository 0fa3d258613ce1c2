"""Search training options: many short runs, the weak ones ended early, in one table and two figures.

    python experiments/sweep.py --space sweeps/aloha.yaml --trials 16

    python experiments/sweep.py --space sweeps/aloha.yaml --address auto --resources.gpu 1        # on a Ray cluster

    python experiments/sweep.py --space sweeps/aloha.yaml --write-jobs random                     # without Ray

Every trial is an ordinary run of train.py with its own directory under <out>/trials. The same command goes on where it
was interrupted; finished trials are not run again.

Exit codes: 0 done; 2 a mistake; 75 interrupted: the same command goes on.
"""

import json
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from fpo_jax.signals import TRY_AGAIN
from fpo_jax.sweep_report import in_words, register, write_report
from fpo_jax.sweeps import Space, command_line, grid_settings, random_settings, read_space
from fpo_jax.types import FpoError


@dataclass(frozen=True)
class Resources:
    """What each trial occupies on a Ray cluster, or of this machine."""

    cpu: float = 2
    """CPU cores."""
    gpu: float = 0
    """GPUs; a share, as 0.25, lets trials share one (then also limit JAX's memory: XLA_PYTHON_CLIENT_MEM_FRACTION)."""
    tpu: float = 0
    """TPU chips."""


@dataclass(frozen=True)
class Args:
    space: Path
    """Space file, see sweeps/."""
    out: Path | None = None
    """Directory of the sweep; by default runs/sweeps/<name of the space file>. On a cluster, one that all hosts see."""
    trials: int = 16
    """Settings to try; the first is the default's, where the space holds it."""
    seed: int = 0
    """Seed of the search; training seeds are an option like any other (seed)."""
    address: str | None = None
    """Ray cluster to use: auto, or its address; by default this machine alone."""
    resources: Resources = field(default_factory=Resources)
    concurrent: int | None = None
    """Most trials at a time; by default as many as the resources allow."""
    asha: bool = True
    """End weak trials early, by success rate against training episodes."""
    grace_episodes: int = 500
    """Episodes after which a trial is first compared with the others; then at `reduction` times as many, and so on."""
    reduction: int = 3
    """One in so many goes on at each comparison."""
    write_jobs: Literal["random", "grid"] | None = None
    """Do not run anything: write <out>/sweep.jsonl, one command line per trial, drawn at random or as a grid."""
    grid_points: int = 3
    """Values of each range in a grid."""
    report: bool = False
    """Do not run anything: table and figures of what is there."""


def write_jobs(args: Args, space: Space, sweep_dir: Path) -> Path:
    """A JSON object with a command line per trial and line; returns the file."""
    if args.write_jobs == "grid":
        every = grid_settings(space, args.grid_points)
    else:
        every = random_settings(space, args.trials, args.seed)
    path = sweep_dir / "sweep.jsonl"
    with path.open("w") as stream:
        for settings in every:
            run_dir = register(sweep_dir, settings)
            train = ["python", "experiments/train.py"]
            job = {
                "run_dir": str(run_dir),
                "settings": settings,
                "command": shlex.join([*train, *command_line(space, settings, run_dir)]),
                "resume": shlex.join([*train, "--resume", "--run-dir", str(run_dir)]),
            }
            stream.write(json.dumps(job) + "\n")
    return path


def keep(args: Args, space: Space, sweep_dir: Path) -> None:
    """Write down what this sweep is. Raises FpoError where the directory holds another one."""
    how = (
        {}
        if args.write_jobs
        else {n: getattr(args, n) for n in ("trials", "seed", "asha", "grace_episodes", "reduction")}
    )
    saved, record = sweep_dir / "space.yaml", sweep_dir / "sweep.json"
    if saved.exists() and read_space(saved) != space:
        raise FpoError(f"{sweep_dir} holds a sweep of another space; choose another --out.")
    before = json.loads(record.read_text()) if record.exists() else {}
    if changed := [
        f"--{name.replace('_', '-')} {before[name]}" for name in how if before.get(name, how[name]) != how[name]
    ]:
        raise FpoError(f"{sweep_dir} was begun with {', '.join(changed)}; go on with that, or choose another --out.")
    sweep_dir.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(before | how, indent=2) + "\n")
    if not saved.exists():
        shutil.copyfile(args.space, saved)


def run(args: Args, console: Console) -> bool:
    """Whether nothing is left to do: False where the search was interrupted. Raises FpoError."""
    sweep_dir = args.out or Path("runs/sweeps") / args.space.stem
    space = read_space(args.space)
    _check(args)
    if not args.report:
        keep(args, space, sweep_dir)
    if args.write_jobs:
        _check_environment(space)
        path = write_jobs(args, space, sweep_dir)
        count = len(path.read_text().splitlines())
        console.print(f"{count} jobs in {path}; on SLURM: sbatch --array=1-{count} sweeps/slurm_array.sh {path}")
        return True
    ended = None if args.report else _search(args, space, sweep_dir)
    trials = write_report(sweep_dir, space)
    lines = ["The best:", *(in_words(trial) for trial in trials[:5])]
    figures = ", curves.png, parallel.png" if any(trial.curve for trial in trials) else ""
    lines.append(f"What came of it is in {sweep_dir}: results.md, .json, .csv{figures}.")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    unfinished = sum(trial.outcome in ("unfinished", "not started") for trial in trials)
    return ended is None or (unfinished == 0 and ended >= args.trials)


def _check_environment(space: Space) -> None:
    """Raises FpoError for what would fail in every trial."""
    from fpo_jax.envs import resolve_physics

    config = space.config({})
    resolve_physics(config.env, config.physics)


def _check(args: Args) -> None:
    for name, least in (("trials", 1), ("grace_episodes", 1), ("reduction", 2), ("grid_points", 2)):
        if getattr(args, name) < least:
            raise FpoError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}.")
    if args.concurrent is not None and args.concurrent < 1:
        raise FpoError(f"--concurrent must be at least 1 or left out, not {args.concurrent}.")
    wanted = asdict(args.resources)
    if min(wanted.values()) < 0 or not any(wanted.values()):
        raise FpoError("--resources.cpu, .gpu and .tpu must be 0 or more, and one of them more than 0.")


def _search(args: Args, space: Space, sweep_dir: Path) -> int:
    """The number of trials that have ended. Raises FpoError."""
    try:
        import sweep_ray
    except ImportError as error:
        raise FpoError(
            'Ray Tune or Optuna is not installed: pip install "fpo_jax[sweep]", or use --write-jobs and run the '
            "command lines yourself."
        ) from error
    wanted = {name.upper(): value for name, value in asdict(args.resources).items() if value}
    sweep_ray.connect(args.address, wanted)
    _check_environment(space)  # not before: it starts JAX's threads, which do not survive Ray's forks
    return sweep_ray.search(
        space,
        sweep_dir,
        trials=args.trials,
        seed=args.seed,
        resources=wanted,
        concurrent=args.concurrent,
        grace_episodes=args.grace_episodes if args.asha else None,
        reduction=args.reduction,
    )


def main(arguments: list[str]) -> int:
    args = tyro.cli(Args, args=arguments, description=__doc__)
    errors = Console(stderr=True)
    try:
        done = run(args, Console())
    except KeyboardInterrupt:  # before or after the search, which notes it and ends
        done = False
    except (FpoError, OSError) as error:
        errors.print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    if not done:
        errors.print("The sweep was interrupted; the same command goes on.")
    return 0 if done else TRY_AGAIN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
