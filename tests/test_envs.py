"""The environment contract, for the cheap backends (aloha_mjx has its own file)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from env_contract import check_env
from fpo_jax.envs import make_env
from fpo_jax.envs.aloha_mujoco import AlohaMujoco
from fpo_jax.envs.point_mass import GOALS, PointMass
from fpo_jax.types import Env, FpoError


def test_point_mass_contract():
    check_env(PointMass(), num_envs=8)


def test_point_mass_last_chunk_is_shortened():
    check_env(PointMass(episode_length=7, execute_steps=3), num_envs=4, seed=1)


def test_aloha_mujoco_contract():
    check_env(AlohaMujoco(episode_length=20, execute_steps=10), num_envs=8)


def test_aloha_mujoco_last_chunk_is_shortened():
    check_env(AlohaMujoco(episode_length=25, execute_steps=10, num_threads=1), num_envs=3)


def test_point_mass_reaches_its_goal_and_only_its_own():
    env, num_envs = PointMass(), 32
    state = env.reset(jax.random.split(jax.random.key(0), num_envs))
    heading = jnp.array(GOALS[0])
    chunk = jnp.broadcast_to(heading, (num_envs, 2, 2))
    ours = np.all(np.asarray(state.observation.object_pose) == np.asarray(heading), axis=1)
    assert 0 < ours.sum() < num_envs
    state = env.step(env.step(state, chunk), chunk)
    np.testing.assert_array_equal(state.success, ours)
    # 3 steps of 0.25 m bring it within 0.3 m of 1 m: it stops there, one step short of the two chunks
    np.testing.assert_array_equal(state.control_steps, np.where(ours, 3, 4))
    np.testing.assert_allclose(state.observation.proprio[:, 0], np.where(ours, 0.75, 1.0))


@pytest.mark.parametrize("num_envs", [1, 2, 64, 256])
def test_callbacks_do_not_deadlock(num_envs):
    """Operands beyond 100 KiB in a callback can starve XLA's thread pool (see `_OPERAND_BYTES`)."""
    env = AlohaMujoco(episode_length=3, execute_steps=1)
    chunk = jnp.zeros((num_envs, 50, 14))

    @jax.jit
    def rollout(state):
        return jax.lax.scan(lambda state, _: (env.step(state, chunk), state.done.mean()), state, length=12)

    state = env.reset(jax.random.split(jax.random.key(0), num_envs))
    for _ in range(2):
        state, done = rollout(state)
        np.testing.assert_array_equal(done, np.tile([0.0, 0.0, 0.0, 1.0], 3))


def test_make_env_builds_each_backend_and_names_mistakes():
    assert isinstance(make_env("point_mass"), PointMass)
    env = make_env("aloha_transfer_cube", "mujoco", execute_steps=10)
    assert isinstance(env, AlohaMujoco) and isinstance(env, Env)
    assert env.spec.execute_steps == 10 and env.spec.episode_length == 300 and env.spec.decisions == 30
    if jax.default_backend() == "cpu":
        assert isinstance(make_env("aloha_transfer_cube"), AlohaMujoco)
    with pytest.raises(FpoError, match="did you mean 'aloha_transfer_cube'"):
        make_env("aloha_transfer")
    with pytest.raises(FpoError, match="did you mean 'mujoco'"):
        make_env("aloha_transfer_cube", "mujocoo")
    with pytest.raises(FpoError, match="choose one of jax"):
        make_env("point_mass", "warp")
    with pytest.raises(FpoError, match="execute_steps must be at least 1"):
        make_env("point_mass", execute_steps=0)
