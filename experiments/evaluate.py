"""Evaluate a run, its tuned policy against its base on the same initial states and noise seeds; or a base alone.

    python experiments/evaluate.py --run-dir runs/aloha_transfer_cube-default-s0 --episodes 512 --json result.json

    python experiments/evaluate.py --env libero_spatial --base pi05_libero --num-envs 8 --json spatial.json

With --json, every finished episode is kept beside it (spatial.base.jsonl), and the same command goes on after them.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import tyro
from rich.console import Console

from fpo_jax.algorithms import fixed
from fpo_jax.config import LiberoOptions, OpenpiOptions, TrainConfig, differences
from fpo_jax.evaluate import EpisodeLog, Evaluator, Outcomes, compare, report, summarize, versus
from fpo_jax.provenance import tree_crc32
from fpo_jax.rollout import FrozenBase, System
from fpo_jax.runs import build, load_run, read_config, settled
from fpo_jax.signals import StopSignal, stop_signals
from fpo_jax.train import TrainState
from fpo_jax.types import FpoError, Quality

SYSTEM = ("env", "base", "physics", "episode_length", "execute_steps", "render", "openpi")  # a run has its own
DEFAULT_EPISODES = 512
GO_ON = "with --json, the same command goes on after the episodes that are finished"


@dataclass(frozen=True)
class Args:
    run_dir: Path | None = None
    """The directory that train.py wrote: base and tuned policy are played. Without it: the base alone, in --env."""
    episodes: int | None = None
    """Episodes for each policy; by default every test episode there is (LIBERO: 50 per task), else 512."""
    json: Path | None = None
    """File to write the result to, and the finished episodes beside it."""
    agent: Literal["last", "best"] = "last"
    """last: the run's newest checkpoint; best: the one with the best success during training."""
    seed: int = 2_000_003
    """Seed of the initial states and of the noise; apart from training's and from the evaluation at its end."""
    floors: bool = False
    """Also play zero noise and halved noise."""
    constant: Path | None = None
    """A steerability.json: also play the best constant latent that it found."""
    num_envs: int | None = None
    """Episodes that are played at a time; by default as many as the run has environments, else 64."""
    checkpoint: str | None = None
    """Where the weights of an openpi base lie; by default where they lay when the run began, else openpi's own."""
    env: str | None = None
    """Environment of a base without a run: aloha_transfer_cube, a LIBERO suite (libero_spatial), or a task of it."""
    base: str | None = None
    """Frozen base policy, as for train.py; by default the one shipped for the environment."""
    physics: Literal["auto", "mujoco", "mjx", "warp", "jax"] = "auto"
    """Simulator, as for train.py."""
    episode_length: int | None = None
    """Control steps per episode; by default the environment's."""
    execute_steps: int | None = None
    """Control steps executed per decision; by default the environment's."""
    render: Quality | None = None
    """Camera images, by default as the base was trained on."""
    openpi: OpenpiOptions = field(default_factory=OpenpiOptions)
    libero: LiberoOptions = field(default_factory=LiberoOptions)


def parse(arguments: list[str]) -> Args:
    """The options; what belongs to a run is by default the run's own. Raises FpoError where there is no run."""
    args = tyro.cli(Args, args=arguments, description=__doc__)
    if args.run_dir is None:
        return args
    config = read_config(args.run_dir)
    own = Args(**{name: getattr(config, name) for name in (*SYSTEM, "libero")})
    return tyro.cli(Args, args=arguments, default=own, description=__doc__)


def load(args: Args) -> tuple[TrainConfig, System, FrozenBase, TrainState | None]:
    """(config, system, base, state) of the run; of a base alone there is no state. Raises FpoError."""
    options = {name: getattr(args, name) for name in SYSTEM}
    if args.run_dir:
        saved = read_config(args.run_dir)
        trained = {name: getattr(args.libero, name) for name in ("train_inits", "tasks")}
        if changed := differences(saved, replace(saved, **options, libero=replace(saved.libero, **trained))):
            raise FpoError(f"A run is evaluated as it was trained; changed here: {'; '.join(changed)}. Drop that.")
        shelf = "best" if args.agent == "best" else "checkpoints"
        return load_run(args.run_dir, shelf, args.checkpoint, args.libero)
    if args.env is None:
        raise FpoError("There is nothing to evaluate: give a run by --run-dir, or a base by --env and --base.")
    if args.floors or args.constant or args.agent == "best":
        raise FpoError("--floors, --constant and --agent best need a tuned policy: give its --run-dir.")
    num_envs = TrainConfig().num_envs if args.num_envs is None else args.num_envs
    config = TrainConfig(checkpoint=args.checkpoint, libero=args.libero, num_envs=num_envs)
    config = settled(replace(config, **options))
    system, params = build(config)
    return config, system, FrozenBase(params), None


def evaluate(args: Args, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The result as the JSON file holds it; `say` is told how far it is. Raises FpoError."""
    for option in ("episodes", "num_envs"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise FpoError(f"--{option.replace('_', '-')} must be at least 1, not {value}.")
    config, system, base, state = load(args)
    episodes = args.episodes or system.env.spec.test_episodes or DEFAULT_EPISODES
    evaluator = Evaluator(system, base, episodes, args.seed, args.num_envs)
    policies = {"base": (evaluator.base_agent, evaluator.base_system)}
    if state:
        policies["tuned"] = (state.agent, system)
    low = floors(args, system.dims.latent)
    policies |= {name: (agent, evaluator.fixed_system) for name, agent in low.items()}
    about = settings(args, config, evaluator)
    with ExitStack() as stack:
        logs = {}
        if args.json:
            for name, (agent, _) in policies.items():
                of_policy = about | {"agent_crc32": tree_crc32(agent), "protocol": system.env.spec.protocol}
                log = EpisodeLog(args.json.with_suffix(f".{name}.jsonl"), of_policy, say)
                logs[name] = stack.enter_context(closing(log))
        played = {name: evaluator.play(*policy, log=logs.get(name)) for name, policy in policies.items()}
    constant = {"constant_latent": read_constant(args.constant)} if args.constant else {}
    return summary(system, played) | {"evaluation": about} | constant | training(args, config, state)


def summary(system: System, played: dict[str, Outcomes]) -> dict[str, Any]:
    """What the policies achieved, each beside the tuned one where there is one."""
    spec, prompt = system.env.spec, system.config.openpi.prompt
    if spec.protocol and spec.prompts and prompt is not None:
        deviations = spec.protocol["deviations"] | {"prompt": f"{prompt!r} instead of the task's name"}
        spec = spec._replace(protocol=spec.protocol | {"prompt": prompt, "deviations": deviations})
    if "tuned" not in played:
        return summarize(played, spec)
    base, tuned = played["base"], played["tuned"]
    beside = {name: versus(outcomes, tuned) for name, outcomes in played.items() if name not in ("base", "tuned")}
    return compare(base, tuned, spec) | {"floors": beside}


def settings(args: Args, config: TrainConfig, evaluator: Evaluator) -> dict[str, Any]:
    """All that the episodes depend on besides the agent and the environment's protocol."""
    spec = evaluator.system.env.spec
    return {
        "env": config.env,
        "base": config.base or config.env,
        "base_crc32": tree_crc32(evaluator.base.params),
        "seed": args.seed,
        "episodes": evaluator.episodes,
        "num_envs": evaluator.batch,
        "physics": config.physics,
        "episode_length": spec.episode_length,
        "execute_steps": spec.execute_steps,
        "render": config.render,
        "latent": asdict(config.latent),
        "openpi": asdict(config.openpi),
    }


def training(args: Args, config: TrainConfig, state: TrainState | None) -> dict[str, Any]:
    """Which run the tuned policy is of; {} where there is none."""
    if state is None:
        return {}
    about = {
        "env": config.env,
        "preset": config.preset,
        "training_seed": config.seed,
        "evaluation_seed": args.seed,
        "iteration": int(state.iteration),
        "training_episodes": int(state.episodes),
        "agent": args.agent,
    }
    return {"run": about}


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
        latent = jnp.array(read_constant(args.constant))
        if latent.shape != (dim,):
            raise FpoError(
                f"The constant latent in {args.constant} has {latent.size} dimensions, this run's has {dim}."
            )
        chosen["constant_latent"] = fixed.FixedLatent(latent, jnp.zeros(()))
    return chosen


def read_constant(path: Path) -> list[float]:
    """The best constant latent that steerability.py found. Raises FpoError where there is none."""
    try:
        return json.loads(path.read_text())["constant_latent"]
    except (OSError, ValueError, KeyError) as error:
        raise FpoError(f"{path} has no constant latent; give what steerability.py --out wrote.") from error


def main(arguments: list[str]) -> int:
    say = partial(Console().print, markup=False, highlight=False, soft_wrap=True)
    errors = Console(stderr=True)
    try:
        with stop_signals(StopSignal(at_once=True, advice=GO_ON)):  # what is finished is on disk
            args = parse(arguments)
            result = evaluate(args, say)
        say(report(result))
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
    except KeyboardInterrupt:
        errors.print(f"Interrupted; {GO_ON}.")
        return 130
    except (FpoError, OSError) as error:
        errors.print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
