"""MJX backend: the contract on a small batch, and that the trimmed model is the same task as gym-aloha's."""

import importlib.util

import chex
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest

from env_contract import check_env, gentle_chunk
from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_expert import plan
from fpo_jax.envs.aloha_mjx import AlohaMjx, add_contact_sensors, trimmed_spec
from fpo_jax.envs.aloha_mujoco import AlohaMujoco, simulate
from fpo_jax.types import Camera, FpoError
from opengl import opengl_pool


def test_contract():
    check_env(AlohaMjx(episode_length=3, execute_steps=2), num_envs=2, thorough=False)


def test_pictures_are_of_the_state():
    """At a reset; a step is only traced, because the contract has compiled one and C keeps it with pictures."""
    pool, camera = opengl_pool(), Camera("top", 16, "fast")
    env = AlohaMjx(camera=camera)
    state = jax.jit(env.reset)(jax.random.split(jax.random.key(0), 3))
    np.testing.assert_array_equal(state.observation.images["top"], pool.render_rows(env.qpos(state), camera))
    assert len(np.unique(state.observation.images["top"], axis=0)) == 3 and not np.any(state.done)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(env.step, state, gentle_chunk(env, state)), state)


def test_trimmed_model_carries_the_cube_in_the_c_engine():
    """Isolates the model from MJX's arithmetic: same engine, same actions, cube within 2 mm at success."""
    spec = trimmed_spec()
    add_contact_sensors(spec)
    model = spec.compile()
    data = mujoco.MjData(model)
    assert model.nq == 23 and model.nu == 16 and model.ngeom == 6
    for x, y in [(0.05, 0.45), (0.1, 0.5), (0.15, 0.58)]:
        cube = np.array([x, y, 0.05])
        actions = plan(cube)
        qpos, reward = simulate(cube, actions)
        success = int(np.argmax(reward == aloha.SUCCESS_REWARD))
        data.qpos[:] = aloha.initial_qpos(cube)
        data.qvel[:] = data.qacc_warmstart[:] = 0
        stages = []
        for ctrl in aloha.control_from_action(actions[: success + 1]):
            data.ctrl[:] = ctrl
            mujoco.mj_step(model, data, aloha.SUBSTEPS)
            stages.append(aloha.reward_stage(*np.split(data.sensordata > 0, 3)).item())
        assert max(stages) >= 2 and np.linalg.norm(data.qpos[16:19] - qpos[success + 1, 16:19]) < 2e-3


def test_warp_asks_for_what_it_needs():
    if importlib.util.find_spec("warp") and jax.default_backend() == "gpu":
        pytest.skip("MJX-Warp is available")
    with pytest.raises(FpoError, match="NVIDIA GPU"):
        AlohaMjx(impl="warp")
    with pytest.raises(FpoError, match="'jax' and 'warp'"):
        AlohaMjx(impl="cpp")


def run_expert(env, cubes):
    """success [N] of the scripted expert in `env`, in one compiled scan over the decisions."""
    actions = np.stack([plan(cube.astype(np.float64)) for cube in cubes]).astype(np.float32)
    chunks = jnp.asarray(actions.reshape(len(cubes), env.spec.decisions, env.spec.execute_steps, 14).swapaxes(0, 1))

    def decision(carry, chunk):
        state, success, over = carry
        state = env.step(state, chunk)
        return (state, success | (state.success & ~over), over | state.done), None

    state = env.reset_to(jnp.asarray(cubes), jax.random.split(jax.random.key(0), len(cubes)))
    start = (state, state.success, state.done)
    return np.asarray(jax.jit(lambda start: jax.lax.scan(decision, start, chunks)[0][1])(start))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # MJX takes minutes on a CPU, and other tests run beside it
def test_success_rate_agrees_with_the_c_engine():
    """40 fresh scripted episodes; single trajectories may part after contact, success rates must not."""
    cubes = np.asarray(jax.vmap(aloha.sample_cube_position)(jax.random.split(jax.random.key(7), 40)))
    reference, ours = run_expert(AlohaMujoco(), cubes).mean(), run_expert(AlohaMjx(), cubes).mean()
    assert abs(ours - reference) <= 0.05
