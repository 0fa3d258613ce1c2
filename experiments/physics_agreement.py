"""Do the physics backends agree on the task? Success rates and cube positions of the same scripted episodes.

    python experiments/physics_agreement.py --physics mujoco mjx --num-episodes 64

Cubes are drawn from `--seed`; the C engine (bit-exact to gym-aloha) is always run and is the reference. "error" is the
distance between the cube and its place in the C engine when the episode ends.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from fpo_jax.envs import aloha, make_env
from fpo_jax.envs.aloha_expert import plan


@dataclass(frozen=True)
class Args:
    physics: tuple[str, ...] = ("mjx",)  # backends to compare with "mujoco": mjx, warp
    num_episodes: int = 64
    seed: int = 0
    noise: float = 0.0  # [rad] standard deviation of noise on every action: a harder comparison


def run(env, cube_position, actions, keys):
    """(success [N], fault [N], cube position at the end of each episode [N, 3], seconds, without compilation)."""
    execute_steps = env.spec.execute_steps
    state = env.reset_to(jnp.asarray(cube_position), keys)
    chunks = [jnp.asarray(actions[:, t : t + execute_steps]) for t in range(0, actions.shape[1], execute_steps)]
    step = jax.jit(env.step).lower(state, chunks[0]).compile()
    running = np.ones(len(cube_position), bool)
    success, fault, final = ~running, ~running, np.zeros((len(cube_position), 3))
    begin = time.perf_counter()
    for chunk in chunks:
        state = step(state, chunk)
        ends = running & np.asarray(state.done)
        success, fault = success | ends & np.asarray(state.success), fault | ends & np.asarray(state.fault)
        final[ends] = env.qpos(state)[ends, aloha.CUBE][:, :3]
        running &= ~ends
    return success, fault, final, time.perf_counter() - begin


def main(args: Args) -> None:
    """Print one line per backend."""
    keys = jax.random.split(jax.random.key(args.seed), args.num_episodes)
    cube_position = np.asarray(jax.vmap(aloha.sample_cube_position)(keys))
    actions = np.stack([plan(cube.astype(np.float64)) for cube in cube_position])
    actions = actions + args.noise * np.random.default_rng(args.seed).standard_normal(actions.shape)
    reference = None
    print("backend   success  agree  fault  error [mm] 50% / 90% / max  env-steps per second")
    for physics in ("mujoco", *args.physics):
        env = make_env("aloha_transfer_cube", physics)
        success, fault, final, seconds = run(env, cube_position, actions.astype(np.float32), keys)
        if reference is None:
            reference = success, final
        error = 1e3 * np.quantile(np.linalg.norm(final - reference[1], axis=1), [0.5, 0.9, 1.0])
        agree = (success == reference[0]).mean()
        speed = args.num_episodes * env.spec.episode_length / seconds
        print(
            f"{physics:9s} {success.mean():7.3f} {agree:6.3f} {fault.mean():6.3f}"
            f"  {error[0]:8.1f} / {error[1]:.1f} / {error[2]:.1f} {speed:16.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
