"""Evaluate a run: its tuned policy against its base, on the same initial states and noise seeds.

python experiments/evaluate.py --run-dir runs/aloha_transfer_cube-default-s0 --episodes 512 --json result.json
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import tyro
from rich.console import Console

from fpo_jax.algorithms import fixed
from fpo_jax.evaluate import Evaluator, compare, report, versus
from fpo_jax.fit import load_run
from fpo_jax.types import FpoError


@dataclass(frozen=True)
class Args:
    run_dir: Path
    """The directory that train.py wrote."""
    episodes: int = 512
    """Episodes for each policy."""
    json: Path | None = None
    """File to write the result to."""
    base_checkpoint: str | None = None
    """Where the weights of an openpi base lie now; by default where they lay when the run began."""
    checkpoint: Literal["last", "best"] = "last"
    """last: the newest checkpoint; best: the one with the best success during training."""
    seed: int = 2_000_003
    """Seed of the initial states and of the noise; apart from training's and from the evaluation at its end."""
    floors: bool = False
    """Also play zero noise and halved noise."""
    constant: Path | None = None
    """A steerability.json: also play the best constant latent that it found."""


def evaluate(args: Args) -> dict[str, Any]:
    """The result as the JSON file holds it. Raises FpoError."""
    if args.episodes < 1:
        raise FpoError(f"--episodes must be at least 1, not {args.episodes}.")
    shelf = "best" if args.checkpoint == "best" else "checkpoints"
    config, system, base, state = load_run(args.run_dir, shelf, args.base_checkpoint)
    evaluator = Evaluator(system, base, args.episodes, args.seed)
    tuned = evaluator.play(state.agent)
    result = compare(evaluator.play_base(), tuned, system.env.spec)
    result["floors"] = {
        name: versus(evaluator.play(agent, evaluator.fixed_system), tuned)
        for name, agent in floors(args, system.dims.latent).items()
    }
    about = {
        "env": config.env,
        "preset": config.preset,
        "training_seed": config.seed,
        "evaluation_seed": args.seed,
        "iteration": int(state.iteration),
        "training_episodes": int(state.episodes),
        "checkpoint": args.checkpoint,
    }
    return result | {"run": about}


def floors(args: Args, dim: int) -> dict[str, fixed.FixedLatent]:
    """What needs no learned actor, as far as it was asked for."""
    zero = jnp.zeros(dim)
    chosen = {}
    if args.floors:
        chosen = {
            "zero_noise": fixed.FixedLatent(zero, jnp.zeros(())),
            "half_noise": fixed.FixedLatent(zero, jnp.array(0.5)),
        }
    if args.constant:
        try:
            latent = jnp.array(json.loads(args.constant.read_text())["constant_latent"])
        except (OSError, ValueError, KeyError) as error:
            raise FpoError(f"{args.constant} has no constant latent; give what steerability.py --out wrote.") from error
        if latent.shape != (dim,):
            raise FpoError(
                f"The constant latent in {args.constant} has {latent.size} dimensions, this run's has {dim}."
            )
        chosen["constant_latent"] = fixed.FixedLatent(latent, jnp.zeros(()))
    return chosen


def main(arguments: list[str]) -> int:
    args = tyro.cli(Args, args=arguments, description=__doc__)
    try:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        result = evaluate(args)
        Console().print(report(result), markup=False, highlight=False, soft_wrap=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
    except (FpoError, OSError) as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
