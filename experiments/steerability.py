"""Before training: can noise steer this base, and does it take a learned actor?

python experiments/steerability.py --env aloha_transfer_cube --out runs/steerability
"""

import json
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fpo_jax import analysis
from fpo_jax.config import LatentConfig, LiberoOptions, OpenpiOptions, TrainConfig
from fpo_jax.envs.common import num_cpus
from fpo_jax.evaluate import Evaluator
from fpo_jax.rollout import FrozenBase
from fpo_jax.runs import build
from fpo_jax.steerability import CrossEntropySettings, best_constant_latent, floors, success_table, variance_shares
from fpo_jax.types import FpoError, HostedEnv, Quality


@dataclass(frozen=True)
class Args:
    env: str = "aloha_transfer_cube"
    """Environment."""
    base: str | None = None
    """Frozen base policy: a name or a directory; by default the one shipped for the environment."""
    checkpoint: str | None = None
    """Where the weights of an openpi base lie, as in train.py."""
    openpi: OpenpiOptions = field(default_factory=OpenpiOptions)
    """How an openpi base is read, as in train.py."""
    libero: LiberoOptions = field(default_factory=LiberoOptions)
    """As in train.py, but for the turns."""
    render: Quality | None = None
    """Camera images, as in train.py."""
    episode_length: int | None = None
    """Control steps per episode; by default the environment's."""
    execute_steps: int | None = None
    """Control steps executed per decision; by default the environment's."""
    physics: str = "auto"
    """Simulator, as in train.py."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    """Latent space to search and to scale."""
    states: int = 128
    """Initial states."""
    noises: int = 16
    """Noise seeds per initial state."""
    num_envs: int | None = None
    """Environments simulated side by side; by default all (512), or two per CPU where each is a process (LIBERO). Give
    fewer where a large base needs the memory."""
    search: CrossEntropySettings = field(default_factory=CrossEntropySettings)
    """Budget of the search for one constant latent; the default, 4 096 episodes, is more than FPO's own."""
    seed: int = 3_000_017
    """Seed of states and noises."""
    out: Path | None = None
    """Directory for steerability.json and steerability.png."""


def measure(args: Args) -> tuple[dict[str, Any], np.ndarray]:
    """(figures, success rate per initial state). Raises FpoError."""
    if args.states < 1 or args.noises < 2:
        raise FpoError(f"--states must be at least 1 and --noises at least 2, not {args.states} and {args.noises}.")
    if args.num_envs is not None and args.num_envs < 1:
        raise FpoError(f"--num-envs must be at least 1, not {args.num_envs}.")
    if args.search.elites < 1 or args.search.population < args.search.elites:
        raise FpoError("--search.elites must be at least 1 and at most --search.population.")
    shared = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(Args)} - {
        "seed",
        "num_envs",
    }
    config = replace(TrainConfig(), **{name: getattr(args, name) for name in shared})
    # The search gives each environment a latent of its own, so the two halves of a suite's cannot take turns, and all
    # latents must meet the same tasks.
    config = replace(config, libero=replace(config.libero, overlap=False, tasks="uniform"))
    system, params = build(config)
    base = FrozenBase(params)
    num_envs = args.num_envs or (min(64, 2 * num_cpus()) if isinstance(system.env, HostedEnv) else None)
    constant = best_constant_latent(system, base, args.seed + 1, args.search, num_envs)
    evaluator = Evaluator(system, base, args.states, args.seed, batch=num_envs or args.states)
    table = success_table(evaluator, args.noises)
    across_states, across_noise = variance_shares(table)
    rates = table.mean(axis=0).compressed()
    figures = {
        "env": args.env,
        "latent": f"{args.latent.space}, D = {system.dims.latent}",
        "states": args.states,
        "noises": args.noises,
        "invalid_episodes": int(np.ma.count_masked(table)),
        "mean_success": float(table.mean()),
        "variance_share_states": across_states,
        "variance_share_noise": across_noise,
        "state_rate_deciles": np.quantile(rates, np.linspace(0.1, 0.9, 9)).round(3).tolist(),
        "floors": {name: interval._asdict() for name, interval in floors(evaluator, table, constant).items()},
        "search_episodes": args.search.generations * args.search.population * args.search.episodes_per_candidate,
        "constant_latent": constant.round(4).tolist(),
    }
    return figures, rates


def show(console: Console, figures: dict[str, Any]) -> None:
    table = Table(title=f"{figures['env']}: latent {figures['latent']}, {figures['states']} initial states")
    table.add_column("policy")
    table.add_column("success")
    table.add_column("95 % interval")
    for name, floor in figures["floors"].items():
        table.add_row(name, f"{floor['estimate']:.3f}", f"[{floor['low']:.3f}, {floor['high']:.3f}]")
    console.print(table)
    share = figures["variance_share_noise"]
    console.print(
        f"Base: {figures['mean_success']:.3f} over {figures['states']} states x {figures['noises']} noises. "
        f"Noise decides {share:.0%} of the success variance, the initial state {figures['variance_share_states']:.0%}."
    )
    console.print(f"Deciles of the success rate per state: {figures['state_rate_deciles']}")
    gain = figures["floors"]["best constant latent"]["estimate"] - figures["floors"]["base"]["estimate"]
    console.print(
        f"The best constant latent ({figures['search_episodes']} episodes of search) changes success by {gain:+.3f}."
    )


def main(arguments: list[str]) -> int:
    args = tyro.cli(Args, args=arguments, description=__doc__)
    console = Console()
    try:
        figures, rates = measure(args)
    except FpoError as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    show(console, figures)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "steerability.json").write_text(json.dumps(figures, indent=2) + "\n")
        from fpo_jax.metrics import Interval

        bars = {name: Interval(**floor) for name, floor in figures["floors"].items()}
        console.print(f"Figure: {analysis.steerability_png(bars, rates, args.out / 'steerability.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
