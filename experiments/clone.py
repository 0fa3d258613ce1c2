"""Clones the small base policy from demonstrations, measures it alone and writes its checkpoint folder.

python experiments/clone.py --out checkpoints/aloha_transfer_cube
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
import tyro
from jaxtyping import Array, Bool, Float, Key

from fpo_jax.clone import CloneConfig, clone
from fpo_jax.demos import Demonstrations, load, save
from fpo_jax.envs.aloha_expert import Mixture, record_mixture
from fpo_jax.envs.aloha_mujoco import AlohaMujoco
from fpo_jax.metrics import wilson_interval
from fpo_jax.policies.small import check_action_space, save_policy
from fpo_jax.types import BasePolicy, Env, FpoError, HostedEnv, Params


@dataclasses.dataclass(frozen=True)
class CloneArgs:
    """What cloning any base takes."""

    out: Path  # checkpoint folder to write
    demos: Path | None = None  # demonstration file (.npz); a mixture is recorded where none is given
    record_episodes: int = 2000  # length of that recording
    save_demos: Path | None = None  # file to keep the recorded demonstrations in, for --demos
    seed: int = 0  # of the recording, the training and the evaluation
    eval_episodes: int = 1000
    eval_envs: int = 250  # simulated side by side
    clone: CloneConfig = dataclasses.field(default_factory=CloneConfig)


@dataclasses.dataclass(frozen=True)
class Args(CloneArgs):
    mixture: Mixture = dataclasses.field(default_factory=Mixture)  # which grasps the recording holds


class Subject(NamedTuple):
    """What is cloned, and where it is tried."""

    about: str  # what the policy sees, of which task
    mixture: Any  # of grasps, as the model card states it
    env: Env
    record: Callable[[Callable[[int], None]], Demonstrations]  # takes on_progress(episodes)


def base_success(env: Env, policy: BasePolicy, params: Params, key: Key[Array, ""], num_envs: int) -> Bool[Array, " N"]:
    """Success of one episode per environment, a fresh N(0, I) noise at every decision."""
    key_reset, key_noise = jax.random.split(key)
    if isinstance(env, HostedEnv):
        env.prepare(num_envs)

    @jax.jit
    def episodes(keys: Key[Array, " N"], key_noise: Key[Array, ""]) -> Bool[Array, " N"]:
        def decide(carry: tuple, key: Key[Array, ""]) -> tuple[tuple, None]:
            state, success, over = carry
            _, context = policy.encode(params, state.observation)
            noise = jax.random.normal(key, (num_envs, policy.horizon, policy.action_dim))
            state = env.step(state, policy.decode(params, context, noise))
            # An environment that finished starts its next episode, which doesn't count.
            return (state, success | (state.success & ~over), over | state.done), None

        none = jnp.zeros(num_envs, bool)
        keys_noise = jax.random.split(key_noise, env.spec.decisions)
        return jax.lax.scan(decide, (env.reset(keys), none, none), keys_noise)[0][1]

    return episodes(jax.random.split(key_reset, num_envs), key_noise)


def rate(success: Float[np.ndarray, " N"]) -> str:
    """`0.412 [0.382, 0.443] (1000 episodes)`: the rate with its 95 % Wilson interval."""
    interval = wilson_interval(int(success.sum()), success.size)
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}] ({success.size} episodes)"


def model_card(
    args: CloneArgs, subject: Subject, demos: Demonstrations, success: np.ndarray, heldout: float, minutes: float
) -> str:
    """The README.md of the checkpoint."""
    config = args.clone
    return f"""# {args.out.name}: small cloned base policy

A flow policy over chunks of {config.policy.horizon} actions, conditioned on {subject.about}. It is
deliberately imperfect: it was cloned from a mixture of correct and displaced grasps, and its noise decides which of
them it makes. Steering that noise is what fpo_jax learns.

| | |
|---|---|
| success alone, fresh noise per decision, 95 % Wilson interval | {rate(success)} |
| success of the demonstrations | {rate(np.asarray(demos.success, float))} |
| held-out loss (normalised actions) | {heldout:.5f} |
| cloning time on {jax.devices()[0].device_kind}, minutes | {minutes:.1f} |

Command: `python {shlex.join(sys.argv)}`

Demonstrations: {args.demos or f"{args.record_episodes} episodes of {subject.mixture}"}

Recipe: {config}

Limits: simulation only; it sees the true position of the object; trained for decisions every
{config.decision_steps} control steps.
Licence: Apache-2.0, as the repository.
"""


def make_base(args: CloneArgs, subject: Subject) -> None:
    """Records demonstrations where no file of them is given, clones them, measures the base and saves it."""
    key_clone, key_eval = jax.random.split(jax.random.key(args.seed))
    check_action_space(args.clone.policy, subject.env.spec)
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("{task.fields[note]}"))
    with rich.progress.Progress(*columns) as progress:
        if args.demos is None:
            bar = progress.add_task("demonstrations", total=args.record_episodes, note="")
            demos = subject.record(lambda n: progress.update(bar, completed=n))
            if args.save_demos:
                save(args.save_demos, demos)
        else:
            demos = load(args.demos)
        bar = progress.add_task("cloning", total=args.clone.steps, note="")
        latest = {}

        def report(step: int, metrics: dict[str, float]) -> None:
            latest.update(metrics)
            note = " ".join(f"{name} {value:.5f}" for name, value in metrics.items())
            progress.update(bar, completed=step, note=note)

        start = time.monotonic()
        params = clone(args.clone, demos, key_clone, report)
        minutes = (time.monotonic() - start) / 60

        bar = progress.add_task("evaluation", total=args.eval_episodes, note="")
        success = np.zeros(0)
        while success.size < args.eval_episodes:
            num_envs = min(args.eval_envs, args.eval_episodes - success.size)
            key = jax.random.fold_in(key_eval, success.size)
            success = np.append(success, base_success(subject.env, args.clone.policy, params, key, num_envs))
            progress.update(bar, completed=success.size, note=f"success {success.mean():.3f}")
    card = model_card(args, subject, demos, success, latest.get("heldout_loss", float("nan")), minutes)
    save_policy(args.out, args.clone.policy, params, card)
    print(f"{args.out}: success {rate(success)}")


def main(args: Args) -> None:
    def record(on_progress: Callable[[int], None]) -> Demonstrations:
        return record_mixture(args.mixture, args.record_episodes, args.seed, on_progress=on_progress)

    about = "robot state and cube position (no images), for\ngym-aloha's AlohaTransferCube-v0"
    make_base(args, Subject(about, args.mixture, AlohaMujoco(), record))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except FpoError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
