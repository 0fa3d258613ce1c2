"""What every environment must do: `check_env(env)` is called by the tests of each backend."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fpo_jax.types import Env, EnvState


def check_env(env: Env, num_envs: int = 4, seed: int = 0, thorough: bool = True) -> None:
    """Run all checks; `thorough=False` leaves out the two that compile `step` once more (minutes for MJX)."""
    step = jax.jit(env.step)
    keys = jax.random.split(jax.random.key(seed), num_envs)
    start = jax.jit(env.reset)(keys)
    chunk = gentle_chunk(env, start)
    check_spec(env, start, num_envs)
    check_step_is_pure(step, start, chunk)
    check_independence(env, step, start, chunk, keys)
    if thorough:
        check_scan(env, step, start, chunk)
        check_alone(env, step, start, chunk, keys)
    check_nan_isolated(step, start, chunk)
    check_autoreset(env, step, start, chunk)
    check_truncation(env, step, start, chunk)


def gentle_chunk(env: Env, state: EnvState) -> jax.Array:
    """A chunk that leaves every robot about where it is: it must not end an episode early."""
    num_envs = len(state.reward)
    if env.spec.proprio_dim == env.spec.action_dim == 14:  # position control: command the present posture
        target = state.observation.proprio
    else:
        target = jnp.zeros((num_envs, env.spec.action_dim))
    shape = (num_envs, env.spec.execute_steps + 1, env.spec.action_dim)  # longer than is executed, as π0's chunks are
    return jnp.broadcast_to(target[:, None], shape).astype(jnp.float32)


def check_spec(env: Env, state: EnvState, num_envs: int) -> None:
    spec = env.spec
    chex.assert_shape(state.observation.proprio, (num_envs, spec.proprio_dim))
    if spec.object_pose_dim:
        chex.assert_shape(state.observation.object_pose, (num_envs, spec.object_pose_dim))
    for images in (state.observation.images or {}).values():
        chex.assert_shape(images, (num_envs, None, None, 3))
        chex.assert_type(images, jnp.uint8)
        assert all(len(np.unique(image)) > 1 for image in np.asarray(images)), "a blank picture"
    chex.assert_type([state.observation.proprio, state.reward], jnp.float32)
    chex.assert_type([state.control_steps, state.env_id], jnp.int32)
    flags = (state.terminated, state.truncated, state.success, state.fault)
    chex.assert_type(flags, bool)
    chex.assert_shape([*flags, state.reward, state.control_steps, state.env_id, state.key], (num_envs,))
    chex.assert_tree_shape_prefix(state.physics, (num_envs,))
    assert not any(np.any(flag) for flag in flags)
    assert not np.any(state.control_steps)


def check_step_is_pure(step, start: EnvState, chunk: jax.Array) -> None:
    first = step(start, chunk)
    step(first, chunk)  # whatever the backend keeps between calls must not matter
    assert_states_equal(step(start, chunk), first)


def check_scan(env: Env, step, start: EnvState, chunk: jax.Array) -> None:
    @jax.jit
    def two_steps(state):
        return jax.lax.scan(lambda state, _: (env.step(state, chunk), None), state, length=2)[0]

    scanned, looped = two_steps(start), step(step(start, chunk), chunk)
    chex.assert_trees_all_equal_shapes_and_dtypes(scanned, start)
    assert_states_equal(scanned, looped)


def check_independence(env: Env, step, start: EnvState, chunk: jax.Array, keys: jax.Array) -> None:
    """The last environment does not depend on the ones beside it, through a step and the reset after it."""
    neighbours = jax.random.split(jax.random.key(99), len(keys)).at[-1].set(keys[-1])
    other = jax.jit(env.reset)(neighbours)
    poses = np.asarray(start.observation.object_pose)[:-1], np.asarray(other.observation.object_pose)[:-1]
    assert np.any(poses[0] != poses[1]), "different keys must draw different initial states"
    expected, result = step_and_reset(step, start, chunk), step_and_reset(step, other, chunk)
    assert_states_equal(jax.tree.map(lambda x: x[-1:], result), jax.tree.map(lambda x: x[-1:], expected))


def check_alone(env: Env, step, start: EnvState, chunk: jax.Array, keys: jax.Array) -> None:
    """The last environment of the batch equals the same environment alone."""
    alone = step_and_reset(step, jax.jit(env.reset)(keys[-1:]), chunk[-1:])
    assert_states_equal(alone, jax.tree.map(lambda x: x[-1:], step_and_reset(step, start, chunk)))


def step_and_reset(step, state: EnvState, chunk: jax.Array) -> EnvState:
    state = step(state, chunk)
    return step(state._replace(truncated=jnp.ones_like(state.truncated)), chunk)


def check_nan_isolated(step, start: EnvState, chunk: jax.Array) -> None:
    healthy, broken = step(start, chunk), step(start, chunk.at[0, 0, 0].set(jnp.nan))
    assert broken.truncated[0] and broken.done[0] and not broken.success[0] and not np.any(broken.fault)
    assert broken.control_steps[0] == start.control_steps[0] and broken.reward[0] == 0
    chex.assert_tree_all_finite(broken.observation)
    assert_states_equal(jax.tree.map(lambda x: x[1:], broken), jax.tree.map(lambda x: x[1:], healthy))
    after = step(broken, chunk)
    assert not np.any(after.fault) and after.control_steps[0] == 0


def check_autoreset(env: Env, step, start: EnvState, chunk: jax.Array) -> None:
    """A done environment ignores its chunk (even NaN), starts a new episode and moves on to its next key."""
    state = step(start, chunk)
    state = state._replace(truncated=state.truncated.at[0].set(True))
    after = step(state, chunk)
    two_chunks = min(2 * env.spec.execute_steps, env.spec.episode_length)
    assert after.control_steps[0] == 0 and np.all(after.control_steps[1:] == two_chunks)
    assert not after.done[0] and after.reward[0] == 0
    unchanged = jax.random.key_data(after.key) == jax.random.key_data(state.key)
    assert not np.all(unchanged[0]) and np.all(unchanged[1:])
    ignored = step(state, chunk.at[0].set(jnp.nan))
    assert_states_equal(ignored, after)


def check_truncation(env: Env, step, start: EnvState, chunk: jax.Array) -> None:
    """Truncation comes with the decision that reaches `episode_length`, neither before nor beyond it."""
    state = start
    for decision in range(env.spec.decisions):
        assert not np.any(state.done), decision
        state = step(state, chunk)
    assert np.all(state.truncated) and not np.any(state.terminated)
    assert np.all(state.control_steps == env.spec.episode_length)


def assert_states_equal(a: EnvState, b: EnvState) -> None:
    chex.assert_trees_all_equal(jax.random.key_data(a.key), jax.random.key_data(b.key))
    chex.assert_trees_all_equal(a._replace(key=None), b._replace(key=None))
