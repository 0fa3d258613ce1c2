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
from fpo_jax.evaluate import Evaluator, compare, report, success_summary
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
    checkpoint: Literal["last", "best"] = "last"
    """last: the newest checkpoint; best: the one with the best success during training."""
    seed: int = 2_000_003
    """Seed of the initial states and of the noise; apart from training's and from the evaluation at its end."""
    floors: bool = False
    """Also play zero noise and halved noise."""


def evaluate(args: Args) -> dict[str, Any]:
    """The result as the JSON file holds it. Raises FpoError."""
    if args.episodes < 1:
        raise FpoError(f"--episodes must be at least 1, not {args.episodes}.")
    shelf = "best" if args.checkpoint == "best" else "checkpoints"
    config, system, base_params, state = load_run(args.run_dir, shelf)
    evaluator = Evaluator(system, base_params, args.episodes, args.seed)
    result = compare(evaluator.play_base(), evaluator.play(state.agent))
    if args.floors:
        zero = jnp.zeros(system.dims.latent)
        result["floors"] = {
            name: success_summary(evaluator.play(fixed.FixedLatent(zero, jnp.float32(scale)), fixed))
            for name, scale in (("zero_noise", 0.0), ("half_noise", 0.5))
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


def main(arguments: list[str]) -> int:
    args = tyro.cli(Args, args=arguments, description=__doc__)
    try:
        result = evaluate(args)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=2) + "\n")
    except (FpoError, OSError) as error:
        Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    Console().print(report(result), markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
