"""What bench.py compares: our environments, the raw C loop and gym-aloha's vector environment, on one workload."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Float

from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_expert import plan
from fpo_jax.envs.aloha_mujoco import AlohaMujoco, load_model, simulate
from fpo_jax.envs.aloha_render import RenderPool
from fpo_jax.types import Camera, FpoError

OURS, RAW = "fpo_jax mujoco", "raw mj_step loop"
OURS_PIXELS = {  # quality -> name
    "official": "fpo_jax mujoco, a picture per decision",
    "fast": "fpo_jax mujoco, a fast picture per decision",
}
GYM = "gym_aloha vector env, rendering skipped"
GYM_STATE = "gym_aloha vector env, pictures removed"
GYM_PIXELS = "gym_aloha vector env, as shipped"
PEERS = {  # -> what was changed
    GYM: "its task's get_observation gives a blank picture instead of rendering three; else as shipped",
    GYM_STATE: "that picture has one pixel: gymnasium copies every 480 x 640 picture several times, blank or not",
    GYM_PIXELS: "nothing",
}
CHUNK = 50  # control steps per decision, the task's default
DISTINCT_EPISODES = 16  # larger batches repeat them
PIXEL_STEPS = 40  # gym-aloha renders three pictures for every step: about 0.2 CPU seconds
IMAGE_SIZE = 224  # edge of the pictures for a base policy [pixels], as π0 wants them


class Workload(NamedTuple):
    """Scripted expert episodes up to a step at which none has succeeded, so that nobody stops early or resets."""

    cube_position: Float[np.ndarray, "M 3"]  # [m], of gym-aloha's seeds 0 .. M-1
    actions: Float[np.ndarray, "M T 14"]  # T a multiple of `chunk`
    chunk: int


class Contender(NamedTuple):
    """Something that plays the workload; `play()` returns the control steps it executed."""

    name: str
    num_envs: int
    threads: int
    play: Callable[[], int]
    cpu_seconds: Callable[[], float] = time.process_time  # a clock of all processes that work for it


def workload(max_steps: int) -> Workload:
    """Motions with contacts: right arm grasps (step 75 on), lifts and carries the cube to the other arm."""
    from gym_aloha.utils import sample_box_pose

    cubes = np.stack([sample_box_pose(seed)[:3] for seed in range(DISTINCT_EPISODES)])
    actions = np.stack([plan(cube) for cube in cubes]).astype(np.float32)[:, :max_steps]
    with ThreadPoolExecutor() as pool:
        rewards = [reward for _, reward in pool.map(simulate, cubes, actions)]
    success = np.any(np.stack(rewards) == aloha.SUCCESS_REWARD, axis=0)
    before_success = int(np.argmax(success)) if success.any() else actions.shape[1]
    chunk = min(CHUNK, before_success)
    return Workload(cubes, actions[:, : before_success - before_success % chunk], chunk)


def raw_loop(work: Workload, num_envs: int, threads: int) -> Contender:
    """The yardstick: each thread resets, sets controls and calls `mj_step(m, d, 10)`; no rewards, no observations."""
    model, num_episodes = load_model(), len(work.actions)
    start = np.asarray(aloha.initial_qpos(work.cube_position))
    controls = np.asarray(aloha.control_from_action(work.actions.astype(np.float64)))
    pool = ThreadPoolExecutor(threads)

    def episodes(first: int) -> int:
        data, steps = mujoco.MjData(model), 0
        for i in range(first, num_envs, threads):
            mujoco.mj_resetData(model, data)
            data.qpos[:] = start[i % num_episodes]
            for ctrl in controls[i % num_episodes]:
                data.ctrl[:] = ctrl
                mujoco.mj_step(model, data, aloha.SUBSTEPS)
                steps += 1
        return steps

    return Contender(RAW, num_envs, threads, lambda: sum(pool.map(episodes, range(threads))))


def jax_env(name: str, env: Any, work: Workload, num_envs: int, threads: int) -> Contender:
    """One of our backends as training uses it: reset, then a scan over decisions, in one compiled program."""
    episode = np.arange(num_envs) % len(work.actions)
    starts = np.arange(0, work.actions.shape[1], work.chunk)

    @jax.jit
    def play(cube_position, actions, keys):
        def decide(state, t):
            after = env.step(state, jax.lax.dynamic_slice_in_dim(actions, t, work.chunk, axis=1)[episode])
            return after, jnp.sum(jnp.where(state.done, 0, after.control_steps - state.control_steps))

        return jnp.sum(jax.lax.scan(decide, env.reset_to(cube_position[episode], keys), starts)[1])

    cubes, actions = jnp.asarray(work.cube_position, jnp.float32), jnp.asarray(work.actions)
    keys = jax.random.split(jax.random.key(0), num_envs)
    return Contender(name, num_envs, threads, lambda: int(play(cubes, actions, keys)))


def pixel_env(quality: Literal["official", "fast"], work: Workload, num_envs: int, threads: int) -> Contender:
    """The C backend with a picture of 480 x 640 from camera `top` per decision, resized as a base policy wants it.

    Raises FpoError where there is no OpenGL library.
    """
    pool = RenderPool(threads)
    camera = Camera("top", IMAGE_SIZE, quality)
    env = AlohaMujoco(execute_steps=work.chunk, num_threads=threads, camera=camera, renderer=pool)
    contender = jax_env(OURS_PIXELS[quality], env, work, num_envs, threads)
    return contender._replace(cpu_seconds=lambda: time.process_time() + pool.cpu_seconds())


def _without_rendering(task: Any, picture: np.ndarray, physics: Any) -> dict[str, Any]:
    """What a gym-aloha task observes, but for the pictures."""
    states = {"qpos": task.get_qpos(physics), "qvel": task.get_qvel(physics), "env_state": task.get_env_state(physics)}
    return {**states, "images": {"top": picture}}


def gym_vector(name: str, work: Workload, num_envs: int) -> Contender:
    """gym-aloha's environment in gymnasium's SyncVectorEnv, changed as PEERS says."""
    import gym_aloha  # noqa: F401  (registers the environment)
    import gymnasium

    height, width = (1, 1) if name == GYM_STATE else (480, 640)
    options = {"obs_type": "pixels_agent_pos", "observation_height": height, "observation_width": width}
    make = partial(gymnasium.make, "gym_aloha/AlohaTransferCube-v0", **options)
    env = gymnasium.vector.SyncVectorEnv([make] * num_envs)
    if name != GYM_PIXELS:
        for single in env.envs:
            task = cast(Any, single.unwrapped)._env.task
            task.get_observation = partial(_without_rendering, task, np.zeros((height, width, 3), np.uint8))
    seeds = [i % len(work.actions) for i in range(num_envs)]
    actions = work.actions[seeds].swapaxes(0, 1)[: PIXEL_STEPS if name == GYM_PIXELS else None]

    def play() -> int:
        env.reset(seed=cast(Any, seeds))
        for action in actions:
            env.step(action)
        return len(actions) * num_envs

    return Contender(name, num_envs, 1, play)


def gym_with_pixels(work: Workload) -> Contender:
    """Raises FpoError where gym-aloha cannot render."""
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when gym-aloha's environment is first imported
    try:
        contender = gym_vector(GYM_PIXELS, work, 1)
        contender.play()
    except Exception as error:  # what a missing library raises depends on the library
        hint = "`apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri`, set MUJOCO_GL, or leave --pixels out"
        raise FpoError(f"gym-aloha cannot render ({type(error).__name__}): {hint}.") from error
    return contender
