"""Side-by-side video of base and tuned policy from the same initial state (ALOHA)."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from fpo_jax import analysis
from fpo_jax.evaluate import Evaluator, Outcomes
from fpo_jax.rollout import FrozenBase, System, select_action, slot_keys
from fpo_jax.types import EnvState, FpoError


def _chunks(
    system: System, base: FrozenBase, agent: PyTree, env_keys: Key[Array, " N"], key: Key[Array, ""]
) -> tuple[EnvState, Float[Array, "T N h a"]]:
    """The chunks that `evaluate` executed from these keys, and the states they began in."""

    def decide(state, slot_key):
        keys = slot_keys(slot_key, state.reward.shape[0])
        chunk, _, _ = select_action(system, base, agent, state, keys)
        return system.env.step(state, chunk), chunk

    first = system.env.reset(env_keys)
    _, chunks = jax.lax.scan(decide, first, jax.random.split(key, system.env.spec.decisions))
    return first, chunks


def episode_qpos(
    evaluator: Evaluator, system: System, agent: PyTree, episode: int, length: int
) -> Float[np.ndarray, "T 23"]:
    """Joint positions after each control step of one evaluated episode, replayed open-loop on MuJoCo's C engine."""
    from fpo_jax.envs.aloha_mujoco import simulate

    env_keys, key, column = evaluator.keys_of(episode)
    first, chunks = jax.jit(partial(_chunks, system))(evaluator.base, agent, env_keys, key)
    actions = np.asarray(chunks)[:, column, : system.env.spec.execute_steps]
    object_pose = first.observation.object_pose
    assert object_pose is not None  # ALOHA always shows it
    qpos, _ = simulate(np.asarray(object_pose[column, :3], np.float64), actions.reshape(-1, actions.shape[-1])[:length])
    return qpos


def most_telling_episode(base: Outcomes, tuned: Outcomes) -> int:
    """An episode that base fails and tuned solves; else the first."""
    return int(np.argmax(tuned.success & ~base.success & ~base.invalid))


def record_comparison(evaluator: Evaluator, base: Outcomes, tuned: Outcomes, tuned_agent: PyTree, path: Path) -> Path:
    """Render the most telling episode of both policies next to each other; returns `path`.

    Raises FpoError where the environment has no renderer, no OpenGL library is found or imageio is missing.
    """
    if not evaluator.system.env.spec.name.startswith("aloha"):
        raise FpoError(f"{evaluator.system.env.spec.name} has no renderer.")
    from fpo_jax.envs.aloha_render import render_episode

    episode = most_telling_episode(base, tuned)
    frames = []
    players = (
        (evaluator.base_system, evaluator.base_agent, base),
        (evaluator.system, tuned_agent, tuned),
    )
    for system, agent, outcome in players:
        qpos = episode_qpos(evaluator, system, agent, episode, int(outcome.control_steps[episode]))
        frames.append(render_episode(qpos[::2], camera="angle"))  # 25 frames per second are enough, and half the time
    return analysis.side_by_side_video(frames[0], frames[1], path, fps=25.0)
