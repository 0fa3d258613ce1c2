"""Base and tuned policy from the same initial state: a side-by-side video, and a film strip (ALOHA, LIBERO)."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from fpo_jax import analysis
from fpo_jax.evaluate import Evaluator, Outcomes
from fpo_jax.rollout import FrozenBase, System, select_action, start
from fpo_jax.types import EnvState, FpoError

_ATTEMPTS = 3  # episodes that are played again in search of one that shows what was counted


class Take(NamedTuple):
    """An evaluated episode, played again alone."""

    episode: int
    env_id: int  # which task of a suite
    object_pose: Float[np.ndarray, " o"]  # at its beginning, as observed
    actions: Float[np.ndarray, "t a"]  # executed
    success: bool


def _alone(
    system: System,
    base: FrozenBase,
    agent: PyTree,
    env_key: Key[Array, ""],
    number: Int[Array, ""],
    keys: Key[Array, " T"],
) -> tuple[EnvState, Float[Array, "T h a"], tuple[Array, Array, Array, Array]]:
    """(first state, chunks, what came of each: done, fault, success, control steps) of one environment.

    `keys`: its own, one per decision.
    """

    def decide(state: EnvState, key: Key[Array, ""]):
        chunk, _, _ = select_action(system, base, agent, state, key[None])
        after = system.env.step(state, chunk)
        return after, (chunk[0], (after.done[0], after.fault[0], after.success[0], after.control_steps[0]))

    first = start(system, env_key[None], number[None] if system.env.spec.test_episodes else None).env
    _, (chunks, came_of_it) = jax.lax.scan(decide, first, keys)
    return first, chunks, came_of_it


class Player:
    """Plays single episodes of an evaluation again, with one policy: their initial state and their noise.

    Alone, a batch of one may round otherwise than the evaluation's batch did, and contacts can make much of that: what
    counts for a film is the outcome of the take.
    """

    def __init__(self, evaluator: Evaluator, system: System, agent: PyTree):
        self.evaluator, self.agent = evaluator, agent
        self._spec = system.env.spec
        self._play = jax.jit(partial(_alone, system))

    def play(self, episode: int) -> Take:
        """The take of an episode. Raises FpoError where its simulation breaks."""
        env_keys, key, column = self.evaluator.keys_of(episode)
        keys = jax.vmap(partial(jax.random.fold_in, data=column))(jax.random.split(key, self._spec.decisions))
        first, chunks, came_of_it = self._play(
            self.evaluator.base, self.agent, env_keys[column], jnp.array(episode), keys
        )
        done, fault, success, control_steps = map(np.asarray, came_of_it)
        last = int(np.argmax(done))  # what follows is another episode
        if not done.any() or fault[last] or first.fault[0]:
            raise FpoError(f"Episode {episode} broke when it was played again.")
        actions = np.asarray(chunks)[:, : self._spec.execute_steps].reshape(-1, chunks.shape[-1])
        pose = np.zeros(0) if first.observation.object_pose is None else np.asarray(first.observation.object_pose[0])
        return Take(episode, int(first.env_id[0]), pose, actions[: control_steps[last]], bool(success[last]))


def telling_episodes(base: Outcomes, tuned: Outcomes) -> list[int]:
    """The episodes that base fails and tuned solves."""
    return np.flatnonzero(tuned.success & ~base.success & ~base.invalid).tolist()


def take_both(evaluator: Evaluator, tuned_agent: PyTree, episodes: Sequence[int]) -> tuple[Take, Take]:
    """(base's take, tuned's) of the first of `episodes` in which only tuned succeeds again, else of the very first.

    Raises FpoError where the environment has no renderer or the simulation breaks.
    """
    name = evaluator.system.env.spec.name
    if not name.startswith(("aloha", "libero")):
        raise FpoError(f"{name} has no renderer.")
    base = Player(evaluator, evaluator.base_system, evaluator.base_agent)
    tuned = Player(evaluator, evaluator.system, tuned_agent)
    takes = []
    for episode in episodes[:_ATTEMPTS]:
        takes.append((base.play(episode), tuned.play(episode)))
        if takes[-1][1].success and not takes[-1][0].success:
            return takes[-1]
    return takes[0]


def pictures(evaluator: Evaluator, take: Take, steps: Sequence[int]) -> UInt8[np.ndarray, "k y x 3"]:
    """What people see after each of `steps` control steps of a take (rising from 0), replayed open-loop.

    ALOHA on MuJoCo's C engine, LIBERO in a worker of its own; no camera of the policy is needed.

    Raises FpoError where no OpenGL library is found.
    """
    env = evaluator.system.env
    if env.spec.name.startswith("libero"):
        from fpo_jax.envs.host import HostEnv
        from fpo_jax.envs.libero import picture_episode

        assert isinstance(env, HostEnv)
        env_keys, _, column = evaluator.keys_of(take.episode)
        return picture_episode(env, jnp.array(take.episode), env_keys[column], take.actions, steps)
    from fpo_jax.envs.aloha_mujoco import simulate
    from fpo_jax.envs.aloha_render import render_episode

    qpos, _ = simulate(take.object_pose[:3].astype(np.float64), take.actions)
    return render_episode(qpos[list(steps)], camera="angle")


def record_comparison(evaluator: Evaluator, base: Outcomes, tuned: Outcomes, tuned_agent: PyTree, path: Path) -> Path:
    """Write a video of both policies in an episode that base fails and tuned solves, or the first; returns `path`.

    Raises FpoError where the environment has no renderer, no OpenGL library is found or ffmpeg is missing.
    """
    takes = take_both(evaluator, tuned_agent, telling_episodes(base, tuned) or [0])
    # Every second step: 25 frames per second of ALOHA are enough, and half the time.
    frames = [pictures(evaluator, take, range(0, len(take.actions) + 1, 2)) for take in takes]
    fps = evaluator.system.env.spec.control_hz / 2
    return analysis.side_by_side_video(frames[0], frames[1], path, fps=fps)


def record_film_strip(evaluator: Evaluator, takes: tuple[Take, Take], path: Path, frames: int = 6) -> Path:
    """Draw base's take over tuned's, each by `frames` pictures evenly over its episode; returns `path`.

    Raises FpoError where no OpenGL library is found.
    """
    rows = []
    for name, take in zip(("base", "tuned"), takes, strict=True):
        steps = np.linspace(0, len(take.actions), frames).round().astype(int).tolist()
        rows.append(analysis.FilmRow(name, pictures(evaluator, take, steps), steps, take.success))
    spec = evaluator.system.env.spec
    task = spec.tasks[takes[0].env_id] if spec.tasks else ""
    title = f"{spec.name}, evaluation episode {takes[0].episode}" + (f": {task.replace('_', ' ')}" if task else "")
    return analysis.film_strip(rows, path, title=title)
