from dataclasses import replace
from functools import partial
from itertools import pairwise

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpo_jax import train
from fpo_jax.algorithms import fixed
from fpo_jax.config import PRESETS
from fpo_jax.rollout import Episodes, FrozenBase, base_system, feature_stats, standardize
from tiny import TINY, begin_training, iterate, jit, make_system, run_rollout, shrink

EPISODE_METRICS = {"success_rate", "return", "episode_length", "invalid_episodes"}
METRICS = {
    "fpo": "first_ratio_error advantage_std latent_std critic_loss q_mean q_spread td_target_mean actor_loss anchor "
    "cfm_loss ratio_mean clip_fraction effective_sample_size delta_std actor_grad_norm",
    "sac": "latent_std critic_loss q_mean q_spread td_target_mean actor_loss entropy temperature",
}


def expected_metrics(algorithm):
    return {"iteration", "episodes", "env_steps", *EPISODE_METRICS, *METRICS[algorithm].split()}


def plain(state: train.TrainState):
    """NumPy arrays, random keys as their bits."""

    def one(leaf):
        return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    return jax.tree.map(one, state)


def assert_finite(state: train.TrainState, metrics: dict):
    floats = [leaf for leaf in jax.tree.leaves(plain(state)) if np.issubdtype(leaf.dtype, np.floating)]
    chex.assert_tree_all_finite((floats, metrics))


@pytest.fixture(scope="module")
def system():
    return make_system()


once = jit(chex.assert_max_traces(train.train_iteration, n=1), static_argnums=0)  # a second trace would raise


@pytest.fixture(scope="module")
def history(system):
    """Three iterations: [(state after it, its metrics)], the state before the first in front."""
    states = [(begin_training(system, {}), {})]
    for _ in range(3):
        states.append(once(system, {}, states[-1][0]))
    return states


def test_three_iterations_compile_once_and_stay_finite(history):
    for i, (state, metrics) in enumerate(history[1:], start=1):
        assert set(metrics) == expected_metrics("fpo")
        assert_finite(state, metrics)
        assert state.iteration == metrics["iteration"] == i


def test_the_ratio_is_one_before_the_first_step(history):
    for _, metrics in history[1:]:
        assert metrics["first_ratio_error"] <= 1e-5


def test_everything_that_learns_changes(history):
    (before, _), (after, _) = history[0], history[-1]
    for part in ("actor", "critic", "target_critic"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), getattr(before.agent, part), getattr(after.agent, part))
        assert max(jax.tree.leaves(moved)) > 1e-5, part


def test_counters_count(history):
    """Five slots hold each episode of at most four decisions and the reset after it."""
    for (before, _), (after, metrics) in pairwise(history):
        assert after.episodes - before.episodes >= 4
        assert 0 < after.env_steps - before.env_steps <= 4 * 5 * 2
        assert 0 <= metrics["success_rate"] <= 1 and metrics["invalid_episodes"] == 0
        assert 0 < metrics["episode_length"] <= 8


def test_the_window_holds_the_newest_rollouts(history):
    states = [plain(state).window for state, _ in history]
    assert not states[0].valid.any()
    assert states[1].valid[1].any() and not states[1].valid[0].any()
    for old, new in pairwise(states[1:]):
        jax.tree.map(lambda o, n: np.testing.assert_array_equal(n[0], o[1]), old, new)


def test_the_same_seed_gives_the_same_run_and_another_does_not(system, history):
    state = begin_training(system, {})
    for _ in range(3):
        state, metrics = once(system, {}, state)
    jax.tree.map(np.testing.assert_array_equal, plain(state), plain(history[-1][0]))
    assert metrics == history[-1][1]
    other = begin_training(make_system(replace(TINY, seed=1)), {})
    states = [plain(s).rollout.env.observation.object_pose for s in (other, history[0][0])]
    assert np.any(states[0] != states[1])


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith(("default", "libero"))])
def test_every_other_preset_runs(name):
    config = shrink(PRESETS[name])
    system = make_system(config)
    state, metrics = iterate(system, {}, begin_training(system, {}))
    assert set(metrics) == expected_metrics(config.algorithm)
    assert_finite(state, metrics)
    assert metrics["critic_loss"] > 0


def test_minibatches_cover_the_window_by_default(system, history):
    """An epoch takes every valid sample: 40 slots in minibatches of 16 are three."""
    seen = []

    class Counting:
        @staticmethod
        def prepare(config, agent, window, key):
            return jax.tree.map(lambda leaf: leaf.reshape(40, *leaf.shape[3:]), window), {}

        @staticmethod
        def update(config, agent, minibatch, key):
            seen.append(minibatch.valid.shape)
            return agent + 1, {}

    config = replace(TINY, update=replace(TINY.update, minibatches=None, epochs=2))
    counting = replace(system, config=config, algorithm=Counting)
    steps, _ = jax.jit(partial(train.update_phase, counting))(0, history[-1][0].window, jax.random.key(0))
    assert steps == 2 * 3 and set(seen) == {(16,)}


def test_episode_metrics():
    ended = np.array([[True, False], [False, True], [True, False]])
    zeros = np.zeros((3, 2))
    episodes = Episodes(
        ended=ended,
        success=np.array([[True, False], [False, False], [True, False]]),
        fault=np.array([[False, True], [False, False], [False, False]]),
        ret=np.array([[0.5, 9.0], [9.0, 0.1], [0.3, 9.0]]),
        control_steps=np.array([[4, 9], [9, 8], [6, 9]]),
        executed=zeros.astype(int),
        env_id=zeros.astype(int),
    )
    metrics = train.episode_metrics(jax.tree.map(jnp.asarray, episodes))
    # three episodes ended: two successes, returns 0.5 + 0.1 + 0.3, lengths 4 + 8 + 6; one broke and is not counted
    expected = {
        "episodes_ended": 3,
        "success_rate": 2 / 3,
        "return": 0.3,
        "episode_length": 6,
        "invalid_episodes": 1,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
    nothing = train.episode_metrics(jax.tree.map(jnp.zeros_like, episodes))
    assert nothing["episodes_ended"] == 0 and np.isnan(nothing["success_rate"])


def test_a_base_that_asks_for_it_gets_statistics_of_its_first_rollout():
    system = make_system()
    system = replace(system, base=replace(system.base, standardize=True))
    first = begin_training(system, {})
    assert first.features.mean.shape == (system.base.feature_dim,)
    assert (first.iteration, first.env_steps > 0) == (0, True)  # what it cost is counted
    second, _ = iterate(system, {}, first)
    chex.assert_trees_all_equal(first.features, second.features)
    # They are those of whole episodes of the base alone ...
    alone, key = base_system(system), jax.random.fold_in(jax.random.key(TINY.seed), 3)
    assert system.env.spec.decisions <= 5 == TINY.rollout.decisions
    _, transition, _ = run_rollout(alone, FrozenBase({}), fixed.base(system.dims.latent), first.rollout, key, 5)
    features, valid = transition.state[..., :4].reshape(-1, 4), transition.valid.reshape(-1)
    chex.assert_trees_all_close(first.features, feature_stats(features, valid), rtol=1e-5)
    # ... and the learner sees its states through them.
    newest = jax.tree.map(lambda leaf: leaf[-1], second.window)
    raw, _ = system.base.encode({}, first.rollout.env.observation)
    np.testing.assert_allclose(newest.state[0, :, :4], standardize(first.features, raw), rtol=1e-5)
    assert begin_training(make_system(), {}).features is None
