"""Parity of the C thread pool with the gym-aloha package, step for step and bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax.envs import aloha
from fpo_jax.envs.aloha_expert import plan
from fpo_jax.envs.aloha_mujoco import AlohaMujoco, load_model, simulate

HOME = np.array([0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.5] * 2)


def smooth_actions(seed, num_steps=300):
    """Random smooth motion, violent enough to hit the table and sometimes the cube."""
    knots = np.random.default_rng(seed).normal(0.0, 0.4, (8, 14))
    time = np.linspace(0, 7, num_steps)
    motion = np.stack([np.interp(time, np.arange(8), column) for column in knots.T], axis=1)
    return (HOME + motion).astype(np.float32)


@pytest.fixture(scope="module")
def gym_episode():
    """(cube_position[3], actions[T, 14]) -> (qpos[T+1, 23], reward[T]) by gym-aloha's own stepping."""
    from gym_aloha.env import AlohaEnv
    from gym_aloha.tasks import sim

    env = AlohaEnv("transfer_cube")._env
    env.task.get_observation = lambda physics: {}  # the only change: do not render (it needs a GL context)

    def run(cube_position, actions):
        sim.BOX_POSE[0] = np.concatenate([cube_position, [1, 0, 0, 0]])
        env.reset()
        qpos, reward = [env.physics.data.qpos.copy()], []
        for action in actions.astype(np.float64):
            reward.append(env.step(action).reward)
            qpos.append(env.physics.data.qpos.copy())
        return np.array(qpos), np.array(reward)

    return run


def cube_position(seed):
    """In float32, which is what JAX hands to the backend."""
    return np.array(aloha.sample_cube_position(jax.random.key(seed))).astype(np.float64)


@pytest.mark.parametrize("seed", range(5))
def test_random_motion_is_bit_exact(gym_episode, seed):
    actions, cube = smooth_actions(seed), cube_position(seed)
    expected_qpos, expected_reward = gym_episode(cube, actions)
    qpos, reward = simulate(cube, actions)
    np.testing.assert_array_equal(qpos, expected_qpos)
    np.testing.assert_array_equal(reward, expected_reward)


def test_successful_expert_episode_is_bit_exact(gym_episode):
    """Grasp, lift, hand-over and success, where contacts and the warm start matter most; the env stops at success."""
    cube = cube_position(0)
    actions = plan(cube).astype(np.float32)
    expected_qpos, expected_reward = gym_episode(cube, actions)
    qpos, reward = simulate(cube, actions)
    np.testing.assert_array_equal(qpos, expected_qpos)
    np.testing.assert_array_equal(reward, expected_reward)
    assert set(reward) >= {0, 2, 4}

    env = AlohaMujoco(execute_steps=50)
    state = env.reset_to(jnp.asarray(cube, jnp.float32)[None], jax.random.split(jax.random.key(0), 1))
    step = jax.jit(env.step)
    for chunk in actions.reshape(6, 1, 50, 14):
        state = step(state, jnp.asarray(chunk))
        if state.done[0]:
            break
    first_success = int(np.argmax(expected_reward == aloha.SUCCESS_REWARD)) + 1
    assert state.success[0] and state.terminated[0] and not state.truncated[0]
    assert state.reward[0] == aloha.SUCCESS_REWARD and state.control_steps[0] == first_success
    np.testing.assert_array_equal(env.qpos(state)[0], expected_qpos[first_success])


def test_chunked_episodes_under_jit_are_bit_exact(gym_episode):
    """Packing the float64 state into uint32 between decisions loses nothing; several environments per thread."""
    seeds, num_steps = range(4), 60
    env = AlohaMujoco(execute_steps=7)
    actions = np.stack([smooth_actions(seed, num_steps) for seed in seeds])
    cubes = np.stack([cube_position(seed) for seed in seeds])
    state = env.reset_to(jnp.asarray(cubes, jnp.float32), jax.random.split(jax.random.key(0), len(seeds)))
    step = jax.jit(env.step)
    for t in range(0, num_steps - num_steps % 7, 7):
        state = step(state, jnp.asarray(actions[:, t : t + 7]))
    for i, cube in enumerate(cubes):
        expected_qpos, _ = gym_episode(cube, actions[i])
        np.testing.assert_array_equal(env.qpos(state)[i], expected_qpos[56])


def test_diverged_physics_is_a_fault(tmp_path, monkeypatch):
    """MuJoCo would reset silently; only the broken environment may be affected."""
    monkeypatch.chdir(tmp_path)  # MuJoCo logs its warning into the working folder
    env = AlohaMujoco(execute_steps=2)
    state = env.reset(jax.random.split(jax.random.key(0), 2))
    physics = np.array(state.physics)
    physics.view(np.float64)[0, 30] = 1e14  # an absurd velocity
    chunk = jnp.asarray(np.broadcast_to(HOME, (2, 2, 14)), jnp.float32)
    state = env.step(state._replace(physics=jnp.asarray(physics)), chunk)
    np.testing.assert_array_equal(state.fault, [True, False])
    after = env.step(state, chunk)
    assert not np.any(after.fault)
    np.testing.assert_allclose(env.qpos(after)[0, :16], aloha.START_ARMS)


def test_reward_stages_by_hand():
    right = np.array([0, 1, 1, 0, 0, 1, 0, 1], bool)
    left = np.array([0, 0, 0, 1, 1, 1, 0, 1], bool)
    table = np.array([1, 1, 0, 1, 0, 0, 0, 1], bool)
    np.testing.assert_array_equal(aloha.reward_stage(right, left, table), [0, 1, 2, 3, 4, 4, 0, 3])
    np.testing.assert_array_equal(aloha.reward_stage(*map(jnp.asarray, (right, left, table))), [0, 1, 2, 3, 4, 4, 0, 3])


def test_task_arrays_in_numpy_and_jax():
    qpos = aloha.initial_qpos(np.array([0.1, 0.5, 0.05]))
    assert qpos.shape == (load_model().nq,)
    proprio = aloha.proprio_from_qpos(qpos)
    np.testing.assert_allclose(proprio, [0, -0.96, 1.16, 0, -0.3, 0, (0.02239 - 0.01844) / 0.03956] * 2)
    np.testing.assert_allclose(aloha.control_from_action(proprio), aloha.START_ARMS, atol=1e-15)
    np.testing.assert_allclose(aloha.initial_qpos(jnp.array([0.1, 0.5, 0.05])), qpos, rtol=1e-6)
    batch = jnp.broadcast_to(jnp.asarray(proprio), (3, 2, 14))
    assert aloha.control_from_action(batch).shape == (3, 2, 16)
    np.testing.assert_allclose(aloha.observe(jnp.asarray(qpos[None])).object_pose[0], [0.1, 0.5, 0.05, 1, 0, 0, 0])
    positions = np.asarray(jax.vmap(aloha.sample_cube_position)(jax.random.split(jax.random.key(0), 200)))
    assert np.all(positions >= np.float32(aloha.CUBE_LOW)) and np.all(positions <= np.float32(aloha.CUBE_HIGH))
    np.testing.assert_allclose(positions.mean(axis=0), [0.1, 0.5, 0.05], atol=0.02)
